"""What the early-fusion models share: pixels that attend to words, and gates."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.models.layers.dense import Dense, Weights
from refseg_jax.models.layers.draws import Draws
from refseg_jax.models.layers.norms import instance_norm, instance_statistics


def pixels_in_one_axis(x: jax.Array) -> jax.Array:
    """[B,...,C] -> [B,pixels,C], as Swin's blocks have them.

    What works on pixels by themselves should work on these: a TPU's tiles of 8 or 16 pixels fit few
    maps' rows, and between one form and the other its compiler moves everything. So should what
    several layers use: their gradients are added up in the form it has.
    """
    return x.reshape(x.shape[0], -1, x.shape[-1])


class PixelWordAttention(nn.Module):
    """Multi-head attention in which pixels ask words, with instance norms on the pixels' side.

    Pixels are many and words are few: what can be done with the words is done with them. The first
    norm, of the queries, is applied to keys, the layer behind to values, and pixels are never split
    into heads: the heads' words lie side by side.

    Attributes:
        dim: joint width of queries, keys and values.
        heads: attention heads.
        scale: of the dot products; None for 1 / sqrt(dim / heads).
        draws: how its layers start.
    """

    dim: int
    heads: int = 1
    scale: float | None = None
    dtype: jnp.dtype = jnp.float32
    draws: Draws = Draws()

    @nn.compact
    def __call__(self, vision: jax.Array, language: jax.Array, token_mask: jax.Array) -> jax.Array:
        """What each pixel gathers from the words.

        Args:
            vision: [B,S,C], pixels in one axis.
            language: [B,T,D].
            token_mask: bool [B,T], True = real token. A sample without any attends to all.

        Returns:
            [B,S,C].
        """

        def dense(name: str, init: nn.initializers.Initializer) -> Dense:
            return Dense(self.dim, dtype=self.dtype, kernel_init=init, name=name)

        B, _, C = vision.shape
        width = self.dim // self.heads
        query = dense("query", self.draws.pixels)(vision)
        mean, factor = instance_statistics(query)
        scale = width**-0.5 if self.scale is None else self.scale
        keys = dense("key", self.draws.words)(language).astype(jnp.float32) * factor * scale
        # [B,heads,T,dim], with zeros in the place of the other heads' channels.
        own = jnp.asarray(np.kron(np.eye(self.heads), np.ones(width))[:, None], self.dtype)
        keys = keys.astype(self.dtype)[:, None] * own
        logits = jnp.einsum("bnc,bhtc->bhtn", query, keys, preferred_element_type=jnp.float32)
        logits -= jnp.einsum(
            "bnc,bhtc->bhtn", mean, keys.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        # A finite minimum leaves a sample without any token uniform instead of NaN.
        logits = jnp.where(token_mask[:, None, :, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, 2).astype(self.dtype)
        # A bias is the same in all pixels, and the norm takes it away.
        out = Weights(C, dtype=self.dtype, kernel_init=self.draws.pixels, name="out")
        out, _ = out(self.dim)
        values = dense("value", self.draws.words)(language).reshape(B, -1, self.heads, width)
        values = jnp.einsum("bthd,hdc->bhtc", values, out.reshape(self.heads, width, C))
        return instance_norm(jnp.einsum("bhtn,bhtc->bnc", weights, values))


class GatedResidual(nn.Module):
    """x + gate(r) r with gate = linear, ReLU, linear, tanh, without biases: [B,n,C] -> same.

    `shut`: the gate is narrow at first, so that a pretrained encoder is disturbed little.
    """

    dtype: jnp.dtype = jnp.float32
    shut: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, update: jax.Array) -> jax.Array:
        # Not zero: two layers of zeros would never receive a gradient.
        small = nn.initializers.normal(0.02)
        init = small if self.shut else nn.initializers.lecun_normal()

        def dense(name: str) -> Dense:
            return Dense(x.shape[-1], use_bias=False, dtype=self.dtype, kernel_init=init, name=name)

        gate = jnp.tanh(dense("fc2")(nn.relu(dense("fc1")(update))))
        return x + gate * update
