"""Convolutions followed by a batch norm."""

import functools
from collections.abc import Callable
from typing import Any

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
        dilation: distance of the window's cells.
    """

    dim: int
    size: int
    stride: int = 1
    activation: Callable[[jax.Array], jax.Array] | None = None
    dilation: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(
            self.dim,
            (self.size, self.size),
            self.stride,
            padding=self.size // 2 * self.dilation,
            kernel_dilation=self.dilation,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            conv_general_dilated=_convolve,
            name="conv",
        )(x)
        x = BatchNorm(dtype=self.dtype, name="norm")(x, train)
        return x if self.activation is None else self.activation(x)


def _convolve(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Any, **how: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`; a CPU multiplies with a 1x1 kernel, in half the time."""
    convolution = functools.partial(
        jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **how
    )
    if kernel.shape[:2] != (1, 1):
        return convolution(x, kernel)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: x[:, :: strides[0], :: strides[1]] @ kernel[0, 0],
        default=convolution,
    )
