"""A stack of linear layers: feed-forward blocks, fusion and gate networks, embedding heads."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.models.layers.dense import Dense
from refseg_jax.models.layers.dropout import Dropout


class MLP(nn.Module):
    """Linear layers of the given output `widths`, with `activation` (and dropout) between them.

    `[..., D] -> [..., widths[-1]]`; nothing follows the last layer.
    """

    widths: Sequence[int]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    use_bias: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, width in enumerate(self.widths):
            if i:
                x = Dropout(self.dropout)(self.activation(x), train)
            x = Dense(width, use_bias=self.use_bias, dtype=self.dtype)(x)
        return x
