"""Swin Transformer (Liu et al., 2021), usable stage by stage.

The layout is the one of the dense-prediction codes (LAVT, CrossVLT, `SwinBackbone` of
`transformers`): any input size, stage outputs taken before patch merging and not normalised.
Arrays are channels-last, [B, h, w, C]. Parameters are float32; matrix products run in `dtype`;
norms, attention logits and softmax are computed in float32, and the logits kept in `dtype`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refseg_jax.models.layers.activations import gelu
from refseg_jax.models.layers.dense import Dense, SplitDense
from refseg_jax.models.layers.layer_norm import LayerNorm
from refseg_jax.models.layers.positions import sine_positions
from refseg_jax.models.layers.window_attention import window_attention

_INIT = nn.initializers.truncated_normal(stddev=0.02)


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Hyperparameters; the defaults are Swin-B with window 12.

    Attributes:
        patch_size: side of a patch in pixels.
        embed_dim: channels of the first stage; each later stage has twice as many.
        depths: blocks per stage. Their number is the number of stages.
        num_heads: attention heads per stage.
        window: side of an attention window, in cells of the feature map.
        mlp_ratio: hidden width of a block's feed-forward, in multiples of its channels.
        drop_path: stochastic depth of the last block; it grows linearly from 0 at the first.
        shift_small_maps: whether blocks shift their windows also where the map's smaller side
            fits into one window. True is what the dense-prediction codes do; False is what image
            classifiers (Microsoft's, `SwinModel`) are trained with. The map is padded to the
            window either way.
        positions: add sine positions to the patches. Published weights have none; a small encoder
            from scratch does not learn places from its padding alone.
        remat: recompute each block in the backward pass instead of storing its activations.
    """

    patch_size: int = 4
    embed_dim: int = 128
    depths: tuple[int, ...] = (2, 2, 18, 2)
    num_heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 12
    mlp_ratio: float = 4
    drop_path: float = 0.3
    shift_small_maps: bool = True
    positions: bool = False
    remat: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage's output."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))


def _whole_windows(size: tuple[int, int], window: int) -> tuple[int, int]:
    """`size` (h, w), padded to multiples of `window`."""
    h, w = size
    return h + -h % window, w + -w % window


def _shift_regions(size: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """Which cells were neighbours before the cyclic shift: equal numbers, int32 [windows, window²].

    After the shift the last window of an axis holds cells from both ends of the map: the axis has
    three regions, cut at `window` and at `shift` cells before its end.
    """

    def axis(n: int) -> np.ndarray:
        cell = np.arange(n, dtype=np.int32)
        return (cell >= n - window) + np.int32(cell >= n - shift)

    h, w = _whole_windows(size, window)
    return _by_windows((3 * axis(h)[:, None] + axis(w))[None, ..., None], window)[..., 0]


def _by_windows(x: jax.Array | np.ndarray, window: int) -> jax.Array | np.ndarray:
    """[B, h, w, C] of whole windows -> [B · windows, window², C]."""
    B, h, w, C = x.shape
    x = x.reshape(B, h // window, window, w // window, window, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window * window, C)


def _from_windows(x: jax.Array, size: tuple[int, int], window: int) -> jax.Array:
    """The inverse of `_by_windows`; `size` is (h, w)."""
    h, w = size
    x = x.reshape(-1, h // window, w // window, window, window, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, h, w, x.shape[-1])


def gather_windows(x: jax.Array, size: tuple[int, int], window: int, shift: int) -> jax.Array:
    """Cells in windows that lie `shift` cells further down and right, cyclically.

    [B, h·w, C], row by row, `size` (h, w) -> [B · windows, window², C]. Zeros pad the map to whole
    windows before it is shifted.
    """

    def by_moves(x):
        (h, w), (H, W) = size, _whole_windows(size, window)
        x = x.reshape(-1, h, w, x.shape[-1])
        x = jnp.pad(x, ((0, 0), (0, H - h), (0, W - w), (0, 0)))
        return _by_windows(jnp.roll(x, (-shift, -shift), (1, 2)), window)

    def by_products(x):
        strip = _strip(size, window)
        if strip != size:
            missing = -size[0] % window * size[1]
            x = jnp.roll(jnp.pad(x, ((0, 0), (0, missing), (0, 0))), -shift * size[1], 1)
        pick = _picks(strip, window, (shift if strip == size else 0, shift), x.dtype)
        x = x.reshape(-1, math.prod(strip), x.shape[-1])
        x = jnp.einsum("mn,bnc->bmc", pick, x, precision=jax.lax.Precision.HIGHEST)
        return x.reshape(-1, window * window, x.shape[-1])

    return jax.lax.platform_dependent(x, tpu=by_products, default=by_moves)


def scatter_windows(x: jax.Array, size: tuple[int, int], window: int, shift: int) -> jax.Array:
    """The inverse of `gather_windows`, without the padding."""

    def by_moves(x):
        x = _from_windows(x, _whole_windows(size, window), window)
        x = jnp.roll(x, (shift, shift), (1, 2))[:, : size[0], : size[1]]
        return x.reshape(-1, math.prod(size), x.shape[-1])

    def by_products(x):
        strip = _strip(size, window)
        pick = _picks(strip, window, (shift if strip == size else 0, shift), x.dtype)
        x = x.reshape(-1, len(pick), x.shape[-1])
        x = jnp.einsum("mn,bmc->bnc", pick, x, precision=jax.lax.Precision.HIGHEST)
        if strip != size:
            x = x.reshape(-1, _whole_windows(size, window)[0] * size[1], x.shape[-1])
            x = jnp.roll(x, shift * size[1], 1)[:, : math.prod(size)]
        return x

    return jax.lax.platform_dependent(x, tpu=by_products, default=by_moves)


# A TPU moves cells about in tiles of 8 or 16 rows, which windows do not fit. A product with ones
# and zeros takes less time: over the whole of a small map, else over a row of windows.
_WHOLE_MAP = 1024


def _strip(size: tuple[int, int], window: int) -> tuple[int, int]:
    """(h, w) of what one such product rearranges."""
    return size if math.prod(size) <= _WHOLE_MAP else (window, size[1])


def _picks(
    size: tuple[int, int], window: int, shift: tuple[int, int], dtype: jnp.dtype
) -> jax.Array:
    """[cells in whole windows, h·w] of ones and zeros: which cell comes to lie where."""
    (h, w), (H, W) = size, _whole_windows(size, window)
    cell = np.pad(
        np.arange(h * w, dtype=np.int32).reshape(h, w), ((0, H - h), (0, W - w)), constant_values=-1
    )
    cell = np.roll(cell, (-shift[0], -shift[1]), (0, 1))
    cell = jnp.asarray(_by_windows(cell[None, ..., None], window).ravel())
    return (cell[:, None] == jnp.arange(h * w, dtype=jnp.int32)).astype(dtype)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside non-overlapping windows, with relative position bias.

    `__call__(x [B, h·w, C], size (h, w), shift) -> [B, h·w, C]`, for any h and w: zeros pad the map
    to whole windows. These lie `shift` cells further down and right, cyclically, and only cells
    that are neighbours on the map attend to each other.
    """

    heads: int
    window: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int], shift: int = 0) -> jax.Array:
        C = x.shape[-1]
        # Windows first, while an array's last axis still holds all channels: accelerators move that
        # well, and heads of 32 channels badly.
        x = gather_windows(x, size, self.window, shift)
        q, k, v = SplitDense(3, C, self.dtype, _INIT, name="qkv")(x)
        q *= (C // self.heads) ** -0.5
        regions = _shift_regions(size, self.window, shift) if shift else None
        y = window_attention(q, k, v, self._position_bias(), regions)
        y = Dense(C, dtype=self.dtype, kernel_init=_INIT, name="proj")(y)
        return scatter_windows(y, size, self.window, shift)

    def _position_bias(self) -> jax.Array:
        """Bias of query cell (i, j) on key cell (p, q), float32 [heads, window², window²].

        The table is indexed by (i - p, j - q). Products with one-hot constants, one per axis,
        pick the same numbers as a gather would, and their gradient is not a scatter.
        """
        win, span = self.window, 2 * self.window - 1
        table = self.param("bias_table", _INIT, (span * span, self.heads))
        cell = np.arange(win)
        pick = np.eye(span, dtype=np.float32)[cell[:, None] - cell + win - 1]
        bias = jnp.einsum(
            "ipr,jqs,rsn->nijpq",
            pick,
            pick,
            table.reshape(span, span, self.heads),
            precision=jax.lax.Precision.HIGHEST,
        )
        return bias.reshape(self.heads, win * win, win * win)


class SwinBlock(nn.Module):
    """Pre-norm window attention and feed-forward, each with a residual and stochastic depth.

    `__call__(x [B, h·w, C], size (h, w), shift, train) -> [B, h·w, C]`; `shift` is that of
    `WindowAttention`. Stochastic depth drops whole samples, with the random stream "dropout".
    """

    heads: int
    window: int
    mlp_ratio: float
    drop_path: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int], shift: int, train: bool) -> jax.Array:
        C = x.shape[-1]
        drop_path = nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)

        y = LayerNorm(dtype=self.dtype, name="norm1")(x)
        y = WindowAttention(self.heads, self.window, self.dtype, name="attention")(y, size, shift)
        x = x + drop_path(y)

        y = LayerNorm(dtype=self.dtype, name="norm2")(x)
        y = Dense(int(C * self.mlp_ratio), dtype=self.dtype, kernel_init=_INIT, name="fc1")(y)
        y = Dense(C, dtype=self.dtype, kernel_init=_INIT, name="fc2")(gelu(y))
        return x + drop_path(y)


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels: [B, h, w, C] -> [B, ceil(h/2), ceil(w/2), 2C]."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        B, h, w, C = x.shape
        # Published weights order the four neighbours column by column.
        x = x.reshape(B, h // 2, 2, w // 2, 2, C).transpose(0, 1, 3, 4, 2, 5)
        x = LayerNorm(dtype=self.dtype, name="norm")(x.reshape(B, h // 2, w // 2, 4 * C))
        reduction = Dense(
            2 * C, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name="reduction"
        )
        return reduction(x)


class Swin(nn.Module):
    """The encoder, whole or stage by stage from inside another module.

    Parameters: `patch`, `patch_norm`, `blocks_{stage}_{block}`, `merges_{stage}`. The random
    stream "dropout" is needed when `train` and `config.drop_path > 0`.
    """

    config: SwinConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        block = nn.remat(SwinBlock, static_argnums=(2, 3, 4)) if c.remat else SwinBlock
        rates = iter(np.linspace(0, c.drop_path, sum(c.depths)).tolist())
        patch = (c.patch_size, c.patch_size)
        self.patch = nn.Conv(
            c.embed_dim, patch, patch, padding="VALID", dtype=self.dtype, kernel_init=_INIT
        )
        self.patch_norm = LayerNorm(dtype=self.dtype)
        self.blocks = [
            [block(heads, c.window, c.mlp_ratio, next(rates), self.dtype) for _ in range(depth)]
            for depth, heads in zip(c.depths, c.num_heads, strict=True)
        ]
        self.merges = [PatchMerging(self.dtype) for _ in c.depths[1:]]

    def embed(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Image [B, H, W, 3] -> normalised patches [B, ceil(H/patch), ceil(W/patch), embed_dim].

        The image is padded with zeros on the right and at the bottom to whole patches. `train`
        plays no part, here and in `merge`: it does in the encoders with batch norms.
        """
        p = self.config.patch_size
        _, H, W, _ = image.shape
        x = self.patch(jnp.pad(image, ((0, 0), (0, -H % p), (0, -W % p), (0, 0))))
        x = self.patch_norm(x)
        if self.config.positions:
            x += jnp.asarray(sine_positions(*x.shape[1:]), x.dtype).reshape(x.shape[1:])
        return x

    def stage(self, i: int, x: jax.Array, train: bool = False) -> jax.Array:
        """The blocks of stage `i`, counted from 0; shape [B, h, w, widths[i]] is kept."""
        c = self.config
        B, *size, C = x.shape
        shifts = c.shift_small_maps or min(size) > c.window
        x = x.reshape(B, -1, C)
        for j, block in enumerate(self.blocks[i]):
            x = block(x, tuple(size), c.window // 2 if shifts and j % 2 else 0, train)
        return x.reshape(B, *size, C)

    def merge(self, i: int, x: jax.Array, train: bool = False) -> jax.Array:
        """Patch merging after stage `i`; the last stage has none."""
        return self.merges[i](x)

    def __call__(self, image: jax.Array, train: bool = False) -> list[jax.Array]:
        """Image [B, H, W, 3] -> each stage's output before merging, strides patch_size · 2^i."""
        x = self.embed(image)
        features = []
        for i in range(len(self.config.depths)):
            x = self.stage(i, self.merge(i - 1, x) if i else x, train)
            features.append(x)
        return features
