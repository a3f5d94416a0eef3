"""The convolutional mask decoder of LAVT and CrossVLT."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.models.layers.norms import EPSILON, BatchNorm
from refseg_jax.models.layers.resize import resize_bilinear


class ConvBlock(nn.Module):
    """Twice 3x3 convolution, batch norm, ReLU: [B,h,w,C] -> [B,h,w,dim]."""

    dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in (1, 2):
            x = nn.Conv(self.dim, (3, 3), use_bias=False, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f"norm{i}")(x, train))
        return x


class MaskDecoder(nn.Module):
    """Joins the stages' maps from coarse to fine by concatenation, and classifies the pixels.

    Half as wide as the coarsest map. Parameters: `stage_norm{i}` (LayerNorm of stage i's map,
    counted from 1), `from{i}` (the block that takes stage i's resolution to the next finer one's),
    `classifier`.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: list[jax.Array], size: tuple[int, int], train: bool) -> jax.Array:
        """Maps [B,h_i,w_i,C_i], fine to coarse -> logits f32 [B,*size,2]: background, foreground.

        All resizing is bilinear and keeps the corners' centres in place.
        """
        norm = functools.partial(nn.LayerNorm, EPSILON, dtype=self.dtype, use_fast_variance=False)
        maps = [norm(name=f"stage_norm{i}")(x) for i, x in enumerate(features, 1)]
        x = maps.pop()
        dim = x.shape[-1] // 2
        while maps:
            finer = maps.pop()
            x = resize_bilinear(x, finer.shape[1:3], align_corners=True)
            block = ConvBlock(dim, self.dtype, name=f"from{len(maps) + 2}")
            x = block(jnp.concatenate([x, finer], -1), train)
        logits = nn.Conv(2, (1, 1), dtype=self.dtype, name="classifier")(x)
        return resize_bilinear(logits.astype(jnp.float32), size, align_corners=True)
