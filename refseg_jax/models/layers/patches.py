"""Embedding of an image's patches: as each platform does it best."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from refseg_jax.models.layers.dense import add_bias


class PatchEmbedding(nn.Module):
    """Image [B,H,W,c] -> [B,H/size,W/size,features], a vector for every whole patch of `size` px.

    Parameters `kernel` [size,size,c,features], `bias` [features], as those of `nn.Conv`.
    """

    features: int
    size: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        shape = (self.size, self.size, image.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        return add_bias(embed_patches(image.astype(self.dtype), kernel), bias)


def embed_patches(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """`PatchEmbedding` without the bias: by kernel [size,size,c,features], of the image's dtype."""
    by_groups = _group(image.shape[2] // kernel.shape[0]) >= FEWEST
    return jax.lax.platform_dependent(
        image, kernel, tpu=embed_by_groups if by_groups else embed, default=embed
    )


def embed(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """`embed_patches` as the convolution that it is."""
    return jax.lax.conv_general_dilated(
        image, kernel, kernel.shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# A TPU has the columns of an image in the lanes of its registers; to move the three channels there,
# as a convolution wants them, takes longer than the convolution (docs/scale.md). So a group of
# patches side by side is one row of a product, with a matrix that has zeros in all columns but
# those of a patch: many times the work, which takes the matrix units less time than the moves.
MOST, FEWEST = 24, 8


def _group(patches: int) -> int:
    """How many of the patches in a row make a group."""
    return max(n for n in range(1, MOST + 1) if patches % n == 0)


def embed_by_groups(image: jax.Array, kernel: jax.Array) -> jax.Array:
    """`embed_patches` as a product for TPUs."""
    (B, H, W, channels), (size, _, _, features) = image.shape, kernel.shape
    h, w = H // size, W // size
    group = _group(w)
    column = np.arange(group * size).reshape(group, size)
    pick = jnp.asarray(np.eye(group * size)[column], kernel.dtype)  # [j,q,w]
    matrix = jnp.einsum("jqw,pqco->cpwjo", pick, kernel)
    rows = image[:, : h * size, : w * size].transpose(0, 3, 1, 2)
    rows = rows.reshape(B, channels, h, size, w // group, group * size)
    return jnp.einsum("bcipgw,cpwjo->bigjo", rows, matrix).reshape(B, h, w, features)
