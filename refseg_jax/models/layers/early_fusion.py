"""What the early-fusion models share: pixels that attend to words, and gates."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.models.layers.dense import Dense
from refseg_jax.models.layers.norms import instance_norm


class PixelWordAttention(nn.Module):
    """Multi-head attention in which pixels ask words, with instance norms on the pixels' side.

    Attributes:
        dim: joint width of queries, keys and values.
        heads: attention heads.
        scale: of the dot products; None for 1 / sqrt(dim / heads).
    """

    dim: int
    heads: int = 1
    scale: float | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, vision: jax.Array, language: jax.Array, token_mask: jax.Array) -> jax.Array:
        """What each pixel gathers from the words.

        Args:
            vision: [B,h,w,C].
            language: [B,T,D].
            token_mask: bool [B,T], True = real token. A sample without any attends to all.

        Returns:
            [B,h,w,C].
        """

        def dense(width: int, name: str) -> Dense:
            return Dense(width, dtype=self.dtype, name=name)

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], self.heads, self.dim // self.heads)

        B, h, w, C = vision.shape
        query = dense(self.dim, "query")(vision.reshape(B, h * w, C))
        gathered = jax.nn.dot_product_attention(
            split(instance_norm(query)),
            split(dense(self.dim, "key")(language)),
            split(dense(self.dim, "value")(language)),
            mask=token_mask[:, None, None, :],
            scale=self.scale,
        )
        gathered = dense(C, "out")(gathered.reshape(B, h * w, self.dim))
        return instance_norm(gathered).reshape(vision.shape)


class GatedResidual(nn.Module):
    """x + gate(r) r with gate = linear, ReLU, linear, tanh, without biases: [..., C] -> same.

    `shut`: the gate is almost shut at first, so that a pretrained encoder starts undisturbed.
    """

    dtype: jnp.dtype = jnp.float32
    shut: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, update: jax.Array) -> jax.Array:
        # Not zero: two layers of zeros would never receive a gradient.
        small = nn.initializers.truncated_normal(0.02)
        init = small if self.shut else nn.initializers.lecun_normal()

        def dense(name: str) -> Dense:
            return Dense(x.shape[-1], use_bias=False, dtype=self.dtype, kernel_init=init, name=name)

        gate = jnp.tanh(dense("fc2")(nn.relu(dense("fc1")(update))))
        return x + gate * update
