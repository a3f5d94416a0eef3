"""What the early-fusion models share: pixels that attend to words, and gates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.models.layers.dense import Dense
from refseg_jax.models.layers.norms import instance_norm, instance_statistics


class PixelWordAttention(nn.Module):
    """Multi-head attention in which pixels ask words, with instance norms on the pixels' side.

    Pixels are many and words are few: what can be done with the words is done with them. The first
    norm, of the queries, is applied to keys, the layer behind to values, and pixels are never split
    into heads: the heads' words lie side by side, with zeros for the others' channels.

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

        def of_heads(words: jax.Array) -> jax.Array:
            """[B,T,dim] -> [B,heads,T,dim] with each head's own channels, and zeros."""
            own = np.kron(np.eye(self.heads), np.ones(self.dim // self.heads))
            return words[:, None] * jnp.asarray(own[:, None], words.dtype)

        B, h, w, C = vision.shape
        query = dense(self.dim, "query")(vision.reshape(B, h * w, C))
        mean, factor = instance_statistics(query)
        scale = self.scale or (self.dim / self.heads) ** -0.5
        keys = dense(self.dim, "key")(language).astype(jnp.float32) * factor * scale
        keys = of_heads(keys.astype(self.dtype))
        logits = jnp.einsum("bnc,bhtc->bhtn", query, keys, preferred_element_type=jnp.float32)
        logits -= jnp.einsum(
            "bnc,bhtc->bhtn", mean, keys.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        # A finite minimum leaves a sample without any token uniform instead of NaN.
        logits = jnp.where(token_mask[:, None, :, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, 2).astype(self.dtype)
        # The bias comes once for each head. It is the same in all pixels: the norm takes it away.
        values = dense(C, "out")(of_heads(dense(self.dim, "value")(language)))
        return instance_norm(jnp.einsum("bhtn,bhtc->bnc", weights, values)).reshape(vision.shape)


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
