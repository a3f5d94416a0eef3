"""CLIP's two encoders in PyTorch, under the names of refseg_jax/models/encoders/clip.py.

Maps are [B,C,h,w], words [B,T,D].
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pytorch.layers import attend, to_map
from refseg_jax.models.encoders.clip import ClipTextConfig, ClipVisionConfig


class ConvNorm(nn.Module):
    """Convolution without a bias, batch norm, activation, which may overwrite its argument."""

    def __init__(
        self,
        width_in: int,
        width: int,
        size: int,
        stride: int = 1,
        dilation: int = 1,
        activation: Callable[[Tensor], Tensor] | None = F.relu_,
    ):
        super().__init__()
        padding = size // 2 * dilation
        self.conv = nn.Conv2d(width_in, width, size, stride, padding, dilation, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x if self.activation is None else self.activation(x)


class Bottleneck(nn.Module):
    def __init__(self, width_in: int, width: int, pooled: bool):
        super().__init__()
        self.pooled = pooled
        self.conv1 = ConvNorm(width_in, width // 4, 1)
        self.conv2 = ConvNorm(width // 4, width // 4, 3)
        self.conv3 = ConvNorm(width // 4, width, 1, activation=None)
        projected = width_in != width
        self.shortcut = ConvNorm(width_in, width, 1, activation=None) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        if self.pooled:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        y = self.conv3(y)
        y += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(y)


class AttentionPool(nn.Module):
    """[B,C,h,w] -> [B,embed_dim,h,w]."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        C, self.grid, self.heads = config.widths[-1], config.pool_grid, config.pool_heads
        self.positions = nn.Parameter(torch.zeros(1 + self.grid**2, C))
        self.query, self.key, self.value = (nn.Linear(C, C) for _ in range(3))
        self.out = nn.Linear(C, config.embed_dim)
        self.connect = ConvNorm(C, config.embed_dim, 1, activation=None)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        table = self.positions[1:].T.unflatten(1, (self.grid, self.grid))[None]
        cells = x + F.interpolate(table, size, mode="bicubic", align_corners=False)
        cells = cells.flatten(2).transpose(1, 2)
        y = attend(self.query(cells), self.key(cells), self.value(cells), self.heads)
        return F.relu_(to_map(self.out(y), size) + self.connect(x))


class ClipVision(nn.Module):
    """image [B,3,H,W] -> each stage's map, and the attention pool's, if there is one."""

    def __init__(self, config: ClipVisionConfig):
        super().__init__()
        assert config.variant == "clip" and not (config.frozen_stats or config.positions)
        half = config.width // 2
        self.stem_0 = ConvNorm(3, half, 3, 2)
        self.stem_1 = ConvNorm(half, half, 3)
        self.stem_2 = ConvNorm(half, config.width, 3)
        self.stages, width_in = [], config.width
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            self.stages.append([f"blocks_{i}_{j}" for j in range(depth)])
            for j, name in enumerate(self.stages[-1]):
                self.add_module(name, Bottleneck(width_in, width, pooled=i > 0 and j == 0))
                width_in = width
        self.attention_pool = AttentionPool(config) if config.pool else None

    def forward(self, image: Tensor) -> list[Tensor]:
        x = F.avg_pool2d(self.stem_2(self.stem_1(self.stem_0(image))), 2)
        maps = []
        for stage in self.stages:
            for name in stage:
                x = self.get_submodule(name)(x)
            maps.append(x)
        return maps if self.attention_pool is None else [*maps, self.attention_pool(x)]


class TextLayer(nn.Module):
    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        y = self.fc1(self.norm2(x))
        return x + self.fc2(y * torch.sigmoid(1.702 * y))


class ClipText(nn.Module):
    """tokens int64 [B,T], token_mask bool [B,T] -> words [B,T,D], sentence [B,embed_dim]."""

    def __init__(self, config: ClipTextConfig):
        super().__init__()
        D = config.hidden
        self.word = nn.Embedding(config.vocab_size, D)
        self.positions = nn.Parameter(torch.zeros(config.max_positions, D))
        self.blocks = [f"blocks_{i}" for i in range(config.layers)]
        for name in self.blocks:
            self.add_module(name, TextLayer(D, config.heads))
        self.norm = nn.LayerNorm(D)
        self.projection = nn.Parameter(torch.zeros(D, config.embed_dim))

    def forward(self, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.word(tokens) + self.positions[: tokens.shape[1]]
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        words = self.norm(x)
        end = words[torch.arange(len(words), device=words.device), token_mask.sum(-1) - 1]
        return words, end @ self.projection
