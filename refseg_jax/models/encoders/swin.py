"""Swin Transformer (Liu et al., 2021), usable stage by stage.

The layout is the one of the dense-prediction codes (LAVT, CrossVLT, `SwinBackbone` of
`transformers`): any input size, stage outputs taken before patch merging and not normalised.
Arrays are channels-last, [B, h, w, C]. Parameters are float32; matrix products run in `dtype`;
norms, attention logits and softmax are computed in float32, and the logits kept in `dtype`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refseg_jax.models.layers.activations import gelu
from refseg_jax.models.layers.positions import sine_positions

_INIT = nn.initializers.truncated_normal(stddev=0.02)
# Flax's own variance, E[x²] - E[x]², cancels on the large activations of the late stages.
_norm = functools.partial(nn.LayerNorm, 1e-5, use_fast_variance=False)


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


def _shift_regions(h: int, w: int, window: int, shift: int) -> np.ndarray:
    """Which cells were neighbours before the cyclic shift: equal numbers, int32 [windows, window²].

    After the shift the last window of an axis holds cells from both ends of the map: the axis has
    three regions, cut at `window` and at `shift` cells before its end.
    """

    def axis(n: int) -> np.ndarray:
        cell = np.arange(n, dtype=np.int32)
        return (cell >= n - window) + np.int32(cell >= n - shift)

    regions = 3 * axis(h)[:, None] + axis(w)
    regions = regions.reshape(h // window, window, w // window, window)
    return regions.transpose(0, 2, 1, 3).reshape(-1, window * window)


@jax.custom_vjp
def window_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, regions: np.ndarray | None
) -> jax.Array:
    """softmax(q k^T + bias) v in every window, where cells of one region see each other.

    q (scaled), k, v [W, heads, n, d], bias float32 [heads, n, n], regions int [windows of one
    sample, n] or None -> [W, heads, n, d] in their dtype. Sums are float32, as is the softmax; the
    logits are kept in the dtype of `q`, as their traffic is most of what the attention costs. For
    the same reason the backward pass is our own: it reads the logits, and neither they nor the
    weights are read just to be summed up.
    """
    return _attend(q, k, v, bias, regions)[0]


def _attend(q, k, v, bias, regions):
    logits = jnp.matmul(q, k.mT, preferred_element_type=jnp.float32)
    if regions is None:
        logits += bias
    else:
        regions = jnp.asarray(regions)
        same = regions[:, None, :, None] == regions[:, None, None, :]
        by_sample = logits.reshape(-1, len(regions), *logits.shape[1:])
        logits = (by_sample + bias + jnp.where(same, 0.0, -100.0)).reshape(logits.shape)
    logits = logits.astype(q.dtype)
    largest = logits.max(-1, keepdims=True).astype(jnp.float32)
    weights = jnp.exp(logits.astype(jnp.float32) - largest).astype(v.dtype)
    # The product with ones is the softmax's denominator.
    ones = jnp.ones_like(v[..., :1])
    y = jnp.matmul(weights, jnp.concatenate([v, ones], -1), preferred_element_type=jnp.float32)
    y, total = y[..., :-1], y[..., -1:]
    y = (y / total).astype(v.dtype)
    return y, (q, k, v, logits, largest + jnp.log(total), y)


def _attend_backward(saved, cotangent):
    q, k, v, logits, log_total, y = saved
    weights = jnp.exp(logits.astype(jnp.float32) - log_total)
    of_weights = jnp.matmul(cotangent, v.mT, preferred_element_type=jnp.float32)
    # sum_j weights_ij of_weights_ij, from the outputs.
    mean = (cotangent.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)
    of_logits = weights * (of_weights - mean)
    of_bias = of_logits.sum(0)
    of_logits = of_logits.astype(q.dtype)
    of_v = jnp.matmul(weights.astype(v.dtype).mT, cotangent)
    return jnp.matmul(of_logits, k), jnp.matmul(of_logits.mT, q), of_v, of_bias, None


window_attention.defvjp(_attend, _attend_backward)


class WindowAttention(nn.Module):
    """Multi-head self-attention inside non-overlapping windows, with relative position bias.

    `__call__(x [B, h, w, C], regions int [windows, window²] or None) -> [B, h, w, C]`; h and w are
    multiples of `window`. Cells of different regions do not attend to each other.
    """

    heads: int
    window: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, regions: np.ndarray | None) -> jax.Array:
        B, h, w, C = x.shape
        heads, win = self.heads, self.window
        rows, cols, cells = h // win, w // win, win * win

        # Windows first, while an array's last axis still holds all channels: accelerators move that
        # well, and heads of 32 channels badly.
        x = x.reshape(B, rows, win, cols, win, C).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(B * rows * cols, cells, C)
        qkv = nn.Dense(3 * C, dtype=self.dtype, kernel_init=_INIT, name="qkv")(x)
        q, k, v = (
            part.reshape(-1, cells, heads, C // heads).swapaxes(1, 2)
            for part in jnp.split(qkv, 3, -1)
        )
        q *= (C // heads) ** -0.5
        y = window_attention(q, k, v, self._position_bias(), regions)
        y = y.swapaxes(1, 2).reshape(x.shape)
        y = nn.Dense(C, dtype=self.dtype, kernel_init=_INIT, name="proj")(y)
        y = y.reshape(B, rows, cols, win, win, C).transpose(0, 1, 3, 2, 4, 5)
        return y.reshape(B, h, w, C)

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

    `__call__(x [B, h, w, C], shift, train) -> [B, h, w, C]`, for any h and w; the windows lie
    `shift` cells further down and right. Stochastic depth drops whole samples, with the random
    stream "dropout".
    """

    heads: int
    window: int
    mlp_ratio: float
    drop_path: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, shift: int, train: bool) -> jax.Array:
        _, h, w, C = x.shape
        drop_path = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train)

        y = _norm(dtype=self.dtype, name="norm1")(x)
        y = jnp.pad(y, ((0, 0), (0, -h % self.window), (0, -w % self.window), (0, 0)))
        regions = _shift_regions(*y.shape[1:3], self.window, shift) if shift else None
        y = jnp.roll(y, (-shift, -shift), (1, 2))
        y = WindowAttention(self.heads, self.window, self.dtype, name="attention")(y, regions)
        y = jnp.roll(y, (shift, shift), (1, 2))
        x = x + drop_path(y[:, :h, :w])

        y = _norm(dtype=self.dtype, name="norm2")(x)
        y = nn.Dense(int(C * self.mlp_ratio), dtype=self.dtype, kernel_init=_INIT, name="fc1")(y)
        y = nn.Dense(C, dtype=self.dtype, kernel_init=_INIT, name="fc2")(gelu(y))
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
        x = _norm(dtype=self.dtype, name="norm")(x.reshape(B, h // 2, w // 2, 4 * C))
        reduction = nn.Dense(
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
        block = nn.remat(SwinBlock, static_argnums=(2, 3)) if c.remat else SwinBlock
        rates = iter(np.linspace(0, c.drop_path, sum(c.depths)).tolist())
        patch = (c.patch_size, c.patch_size)
        self.patch = nn.Conv(
            c.embed_dim, patch, patch, padding="VALID", dtype=self.dtype, kernel_init=_INIT
        )
        self.patch_norm = _norm(dtype=self.dtype)
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
        shifts = c.shift_small_maps or min(x.shape[1:3]) > c.window
        for j, block in enumerate(self.blocks[i]):
            x = block(x, c.window // 2 if shifts and j % 2 else 0, train)
        return x

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
