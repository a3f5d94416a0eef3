"""Swin Transformer (Liu et al., 2021), usable stage by stage.

The layout is the one of the dense-prediction codes (LAVT, CrossVLT, `SwinBackbone` of
`transformers`): any input size, stage outputs taken before patch merging and not normalised.
Arrays are channels-last, [B, h, w, C]. Parameters are float32; matrix products run in `dtype`;
norms and softmax are computed in float32, and attention logits or weights kept in `dtype`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refseg_jax.errors import UserError
from refseg_jax.models.layers.dense import Dense, SplitDense, Weights
from refseg_jax.models.layers.feed_forward import feed_forward
from refseg_jax.models.layers.layer_norm import LayerNorm, NormWeights
from refseg_jax.models.layers.merge_norm import MergeNorm
from refseg_jax.models.layers.normed_dense import normed_dense
from refseg_jax.models.layers.patches import PatchEmbedding
from refseg_jax.models.layers.positions import sine_positions
from refseg_jax.models.layers.window_attention import window_attention
from refseg_jax.models.layers.windows import Windows

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
        cudnn: whether windows go through cuDNN's fused attention where that takes them (see
            `fits_cudnn`), on NVIDIA's GPUs; `predict` does without. Nobody has run it on one yet.
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
    cudnn: bool = False

    def __post_init__(self):
        heads, widths = self.num_heads, self.widths
        if len(heads) != len(widths) or any(
            h < 1 or width % h for h, width in zip(heads, widths, strict=True)
        ):
            raise UserError(
                f"config.model.swin.num_heads={heads} do not divide the stages' widths {widths}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage's output."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside non-overlapping windows, with relative position bias.

    `__call__(x [B, h·w, C], size (h, w), shift) -> [B, h·w, C]`, for any h and w: zeros pad the map
    to whole windows. These lie `shift` cells further down and right, cyclically, and only cells
    that are neighbours on the map attend to each other. With `norm`, the scale and bias [C] of a
    layer norm before it, it returns (x, attention to the normalised x).
    """

    heads: int
    window: int
    dtype: jnp.dtype = jnp.float32
    cudnn: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        size: tuple[int, int],
        shift: int = 0,
        norm: tuple[jax.Array, jax.Array] | None = None,
    ) -> Any:
        C = x.shape[-1]
        factor = (C // self.heads) ** -0.5
        if norm is None:
            qkv = SplitDense(3, C, self.dtype, _INIT, name="qkv")
            (q, k, v), (_, *around) = qkv(x, of_zeros=True)
            q *= factor
        else:
            kernel, bias = Weights(3 * C, dtype=jnp.float32, kernel_init=_INIT, name="qkv")(C)
            x, (q, k, v) = normed_dense(x, *norm, kernel, bias, (factor, 1.0, 1.0))
            _, *around = jnp.split(bias.astype(self.dtype), 3)
        windows = Windows(size, self.window, shift)
        around, bias = jnp.stack(around), self._position_bias()
        y = window_attention(q, k, v, around, bias, windows, self.cudnn)
        y = Dense(C, dtype=self.dtype, kernel_init=_INIT, name="proj")(y)
        return y if norm is None else (x, y)

    def _position_bias(self) -> jax.Array:
        """Bias of query cell (i, j) on key cell (p, q), float32 [heads, window², window²].

        The table is indexed by (i - p, j - q). For one key and all queries it is a part of a longer
        row, in which j changes fastest: keys of the next p begin one row of a window before. A
        product with a one-hot constant picks j - q: its gradient is not a scatter.
        """
        win, span = self.window, 2 * self.window - 1
        table = self.param("bias_table", _INIT, (span * span, self.heads))
        cell = np.arange(win)
        pick = np.eye(span, dtype=np.float32)[cell[:, None] - cell + win - 1]
        rows = jnp.einsum(
            "jqs,rsn->nqrj",
            pick,
            table.reshape(span, span, self.heads),
            precision=jax.lax.Precision.HIGHEST,
        ).reshape(self.heads, win, span * win)
        starts = [(win - 1 - p) * win for p in range(win)]
        bias = jnp.stack([rows[:, :, start : start + win * win] for start in starts], 1)
        return bias.reshape(self.heads, win * win, win * win).mT


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
    cudnn: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int], shift: int, train: bool) -> jax.Array:
        B, _, C = x.shape
        hidden = int(C * self.mlp_ratio)
        drop_path = nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)

        norm = NormWeights(name="norm1")(C)
        attend = WindowAttention(self.heads, self.window, self.dtype, self.cudnn, name="attention")
        x, y = attend(x.astype(self.dtype), size, shift, norm)
        x = x + drop_path(y)

        kept = drop_path(jnp.ones((B, 1, 1)))
        scale, bias = NormWeights(name="norm2")(C)
        fc1 = Weights(hidden, dtype=jnp.float32, kernel_init=_INIT, name="fc1")(C)
        fc2 = Weights(C, dtype=jnp.float32, kernel_init=_INIT, name="fc2")(hidden)
        return feed_forward(x, kept, scale, bias, fc1, fc2)


class PatchMerging(nn.Module):
    """Halves the map and doubles the channels: [B, h, w, C] -> [B, ceil(h/2), ceil(w/2), 2C]."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        C = x.shape[-1]
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        x = MergeNorm(dtype=self.dtype, name="norm")(x)
        reduction = Dense(
            2 * C, use_bias=False, dtype=self.dtype, kernel_init=_INIT, name="reduction"
        )
        B, h, w, _ = x.shape
        # Pixels in one axis, as the blocks have them: else a TPU's compiler moves them about.
        return reduction(x.reshape(B, h * w, 4 * C)).reshape(B, h, w, 2 * C)


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
        self.patch = PatchEmbedding(c.embed_dim, c.patch_size, self.dtype, _INIT)
        self.patch_norm = LayerNorm(dtype=self.dtype)
        self.blocks = [
            [
                block(heads, c.window, c.mlp_ratio, next(rates), self.dtype, c.cudnn)
                for _ in range(depth)
            ]
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
