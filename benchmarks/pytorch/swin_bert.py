"""Swin and BERT in PyTorch, stage by stage, in training too.

Windows are cut and rolled as in Microsoft's Swin; all attention is the fused operation, the
position bias and the mask of rolled windows added to its logits.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pytorch.layers import attend, constant, from_windows, to_windows
from refseg_jax.models.encoders.bert import BertConfig
from refseg_jax.models.encoders.swin import SwinConfig


def relative_index(window: int) -> np.ndarray:
    """Row of the position table for each pair of cells: int64 [window^2 * window^2]."""
    cells = np.stack(np.divmod(np.arange(window**2), window), -1)
    offset = cells[:, None] - cells + window - 1
    return (offset[..., 0] * (2 * window - 1) + offset[..., 1]).ravel()


def shift_mask(h: int, w: int, window: int) -> np.ndarray:
    """-100 between cells of a rolled map from its different sides: float32 [windows,1,n,n]."""

    def regions(size: int) -> np.ndarray:
        cell = np.arange(size)
        return (cell >= size - window).astype(int) + (cell >= size - window // 2)

    region = 3 * regions(h)[:, None] + regions(w)
    region = region.reshape(h // window, window, w // window, window).swapaxes(1, 2)
    region = region.reshape(-1, 1, window**2)
    return np.where(region[..., None] == region[:, :, None], 0, -100).astype(np.float32)


class WindowAttention(nn.Module):
    """Attention within each window [B*windows,cells,C], and mask [windows,1,cells,cells]."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias_table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        index = torch.from_numpy(relative_index(window))
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        rows, cells, C = x.shape
        bias = self.bias_table[self.index].view(cells, cells, -1).permute(2, 0, 1)
        windows = 1
        if mask is not None:
            bias = (bias + mask).flatten(0, 1)
            windows = len(mask)
        # Windows with a mask of their own stand beside the heads: it is shared by the images.
        qkv = self.qkv(x).view(-1, windows, cells, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        y = F.scaled_dot_product_attention(q, k, v, bias[None])
        y = y.unflatten(1, (windows, self.heads)).transpose(2, 3)
        return self.proj(y.reshape(rows, cells, C))


class DropPath(nn.Module):
    """Stochastic depth: whole samples of [B,...] become zero."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        keep = x.new_empty(len(x), *(1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep.div_(1 - self.rate)


class SwinBlock(nn.Module):
    """Window attention and feed-forward: [B,h,w,C] -> same."""

    def __init__(self, config: SwinConfig, stage: int, shifted: bool, rate: float):
        super().__init__()
        width, self.window = config.widths[stage], config.window
        self.shift = config.window // 2 if shifted else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, config.num_heads[stage], config.window)
        hidden = int(width * config.mlp_ratio)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        win, shift = self.window, self.shift
        y = F.pad(self.norm1(x), (0, 0, 0, -w % win, 0, -h % win))
        H, W = y.shape[1:3]
        mask = None
        if shift:
            mask = constant(shift_mask, H, W, win, device=x.device)
            y = y.roll((-shift, -shift), (1, 2))
        y = from_windows(self.attention(to_windows(y, win), mask), win, H, W)
        if shift:
            y = y.roll((shift, shift), (1, 2))
        x = x + self.drop_path(y[:, :h, :w])
        return x + self.drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class PatchMerging(nn.Module):
    """[B,h,w,C] -> [B,ceil(h/2),ceil(w/2),2C]."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        neighbours = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, -1)))


class Swin(nn.Module):
    """The encoder; the models add what they do between its stages."""

    def __init__(self, config: SwinConfig):
        super().__init__()
        assert config.shift_small_maps and not config.positions and not config.remat
        self.config = config
        size = config.patch_size
        self.patch = nn.Conv2d(3, config.embed_dim, size, size)
        self.patch_norm = nn.LayerNorm(config.embed_dim)
        rates = iter(np.linspace(0, config.drop_path, sum(config.depths)).tolist())
        for i, depth in enumerate(config.depths):
            for j in range(depth):
                self.add_module(f"blocks_{i}_{j}", SwinBlock(config, i, j % 2 == 1, next(rates)))
        for i, width in enumerate(config.widths[:-1]):
            self.add_module(f"merges_{i}", PatchMerging(width))

    def embed(self, image: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,h,w,C]."""
        (H, W), size = image.shape[2:], self.config.patch_size
        x = self.patch(F.pad(image, (0, -W % size, 0, -H % size)))
        return self.patch_norm(x.permute(0, 2, 3, 1))

    def stage(self, i: int, x: Tensor) -> Tensor:
        """The blocks of stage `i`: [B,h,w,C] -> same."""
        for j in range(self.config.depths[i]):
            x = getattr(self, f"blocks_{i}_{j}")(x)
        return x

    def merge(self, i: int, x: Tensor) -> Tensor:
        """Patch merging after stage `i`."""
        return getattr(self, f"merges_{i}")(x)


class BertLayer(nn.Module):
    """x [B,T,D] over itself under `mask` bool [B,T], or over `memory` [B,S,C] of a width given."""

    def __init__(self, config: BertConfig, memory: int = 0):
        super().__init__()
        D = config.hidden
        self.heads, self.rate = config.heads, config.dropout
        if memory:
            self.query, self.key_value = nn.Linear(D, D), nn.Linear(memory, 2 * D)
        else:
            self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.fc1, self.fc2 = nn.Linear(D, config.intermediate), nn.Linear(config.intermediate, D)
        self.norm1, self.norm2 = (nn.LayerNorm(D, config.eps) for _ in range(2))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        if memory is None:
            qkv = self.qkv(x).chunk(3, -1)
        else:
            qkv, mask = (self.query(x), *self.key_value(memory).chunk(2, -1)), None
        y = attend(*qkv, self.heads, mask, self.rate if self.training else 0.0)
        x = self.norm1(x + self.dropout(self.proj(y)))
        return self.norm2(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class BertEmbeddings(nn.Module):
    """tokens int64 [B,T] -> [B,T,D]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden)
        self.position = nn.Embedding(config.max_positions, config.hidden)
        self.type = nn.Embedding(config.type_vocab, config.hidden)
        self.norm = nn.LayerNorm(config.hidden, config.eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        # `self.type` is a method of every module.
        first = self.position.weight[: tokens.shape[1]] + self._modules["type"].weight[0]
        return self.dropout(self.norm(self.word(tokens) + first))


class Bert(nn.Module):
    """The encoder, by ranges of layers or whole."""

    def __init__(self, config: BertConfig):
        super().__init__()
        assert not config.remat
        self.depth = config.layers
        self.embeddings = BertEmbeddings(config)
        for i in range(config.layers):
            self.add_module(f"blocks_{i}", BertLayer(config))

    def layers(self, x: Tensor, mask: Tensor, start: int, stop: int) -> Tensor:
        """Layers `start` to `stop` (exclusive): x [B,T,D], mask bool [B,T] -> like x."""
        for i in range(start, stop):
            x = getattr(self, f"blocks_{i}")(x, mask)
        return x

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens int64 [B,T], mask bool [B,T] -> [B,T,D]."""
        return self.layers(self.embeddings(tokens), mask, 0, self.depth)
