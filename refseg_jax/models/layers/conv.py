"""Convolutions that are followed by a batch norm."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.models.layers.norms import BatchNorm


class ConvNorm(nn.Module):
    """Convolution without a bias, batch norm, activation; parameters `conv`, `norm`.

    `__call__(x [B,h,w,C], train) -> [B, ceil(h/stride), ceil(w/stride), dim]`. The zeros around
    the map are as many on all four sides, as in PyTorch: with a stride, Flax's "SAME" has more of
    them on the right and at the bottom.

    Attributes:
        dim: channels that come out.
        size: side of the window, an odd number.
        stride: of the window.
        activation: follows the norm; None for nothing.
    """

    dim: int
    size: int
    stride: int = 1
    activation: Callable[[jax.Array], jax.Array] | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(
            self.dim,
            (self.size, self.size),
            self.stride,
            padding=self.size // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            name="conv",
        )(x)
        x = BatchNorm(dtype=self.dtype, name="norm")(x, train)
        return x if self.activation is None else self.activation(x)
