"""What the PyTorch models share: constants, attention, transformer blocks, resizing.

Submodules bear the names of those in refseg_jax/models, so that `load` finds them.
"""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refseg_jax.models.layers.positions import sine_positions


class _Constants:
    """Each tensor is an attribute: by their names torch.compile tells one from another."""


_constants = _Constants()


@functools.cache
def _store(make: Callable[..., np.ndarray], arguments: tuple, device: torch.device) -> str:
    name = f"tensor{len(vars(_constants))}"
    with torch.inference_mode(False):
        setattr(_constants, name, torch.tensor(make(*arguments), device=device))
    return name


@torch.compiler.assume_constant_result
def _name(make: Callable[..., np.ndarray], *arguments, device: torch.device) -> str:
    return _store(make, arguments, device)


def constant(make: Callable[..., np.ndarray], *arguments, device: torch.device) -> Tensor:
    """The array make(*arguments) on `device`, where it is moved once.

    `make` is a plain function: at one under `functools.cache` torch.compile would break its graph.
    """
    return getattr(_constants, _name(make, *arguments, device=device))


def map_positions(h: int, w: int, dim: int) -> np.ndarray:
    """`sine_positions` for `constant`: float32 [h*w,dim]."""
    return sine_positions(h, w, dim)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """query [B,N,D], key and value [B,T,D], mask bool [B,T] of the real keys -> [B,N,D]."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if mask is not None:
        mask = mask[:, None, None]
    y = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    return y.transpose(1, 2).flatten(2)


class MultiHeadAttention(nn.Module):
    """Queries [B,N,dim] over keys and values [B,T,dim], of which `mask` bool [B,T] are real."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        projected = self.query(queries), self.key(keys), self.value(values)
        return self.out(attend(*projected, self.heads, mask))


class MLP(nn.Module):
    """Linear, activation, dropout, linear."""

    def __init__(
        self,
        width_in: int,
        hidden: int,
        width: int,
        activation: Callable[[Tensor], Tensor] = F.relu,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.activation = activation
        self.Dense_0, self.Dense_1 = nn.Linear(width_in, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.Dense_1(self.dropout(self.activation(self.Dense_0(x))))


class AddNorm(nn.Module):
    """The end of a post-norm block."""

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        return self.norm(x + self.dropout(update))


class FeedForward(nn.Module):
    """Post-norm feed-forward block."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.mlp = MLP(dim, hidden, dim, dropout=dropout)
        self.end = AddNorm(dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x, self.mlp(x))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; post-norm or pre-norm."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, pre_norm: bool = False):
        super().__init__()
        self.pre_norm, self.dropout = pre_norm, nn.Dropout(dropout)
        for name in ("self_attention", "cross_attention"):
            self.add_module(name, MultiHeadAttention(dim, heads))
            if pre_norm:
                self.add_module(f"{name}_norm", nn.LayerNorm(dim))
            else:
                self.add_module(f"{name}_end", AddNorm(dim, dropout))
        if pre_norm:
            self.feed_forward_norm = nn.LayerNorm(dim)
            self.feed_forward = MLP(dim, hidden, dim, dropout=dropout)
        else:
            self.feed_forward = FeedForward(dim, hidden, dropout)

    def forward(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor | float = 0.0,
        mask: Tensor | None = None,
    ) -> Tensor:
        """x [B,N,dim], keys and values [B,S,dim] -> like x.

        `positions` are added to x where it asks, and to x as keys; `keys` contain theirs. `mask`
        bool [B,S] marks the real ones.
        """
        if self.pre_norm:
            x = x + self.dropout(self._among(self.self_attention_norm(x), positions))
            asking = self.cross_attention_norm(x) + positions
            x = x + self.dropout(self.cross_attention(asking, keys, values, mask))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = self.self_attention_end(x, self._among(x, positions))
        update = self.cross_attention(x + positions, keys, values, mask)
        return self.feed_forward(self.cross_attention_end(x, update))

    def _among(self, x: Tensor, positions: Tensor | float) -> Tensor:
        asking = x + positions
        return self.self_attention(asking, asking, x)


def to_windows(x: Tensor, window: int) -> Tensor:
    """[B,h,w,C] -> [B * windows, window², C]."""
    B, h, w, C = x.shape
    x = x.view(B, h // window, window, w // window, window, C).transpose(2, 3)
    return x.reshape(-1, window * window, C)


def from_windows(x: Tensor, window: int, h: int, w: int) -> Tensor:
    """The inverse: [B * windows, window², C] -> [B,h,w,C]."""
    x = x.view(-1, h // window, w // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, h, w, x.shape[-1])


def to_map(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B,h*w,C] -> [B,C,h,w], a view in the channels-last format."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def resize(x: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """[B,C,h,w] -> [B,C,*size], bilinear."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def majority_downsample(mask: Tensor, factor: int) -> Tensor:
    """bool [B,H,W] -> [B,ceil(H/factor),ceil(W/factor)]; of a tie the foreground gets the cell."""
    blocks = F.avg_pool2d(mask[:, None].float(), factor, ceil_mode=True, count_include_pad=False)
    return blocks[:, 0] >= 0.5


class GatedResidual(nn.Module):
    """x + gate(update) * update: [...,width] -> same."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(update))).tanh() * update


class ConvBlock(nn.Module):
    """Twice 3x3 convolution, batch norm, ReLU; or with biases and the ReLU before the norm."""

    def __init__(self, width: int, dim: int, relu_first: bool = False):
        super().__init__()
        self.relu_first = relu_first
        for i, channels in ((1, width), (2, dim)):
            conv = nn.Conv2d(channels, dim, 3, padding=1, bias=relu_first)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"norm{i}", nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = norm(F.relu(conv(x))) if self.relu_first else F.relu(norm(conv(x)))
        return x
