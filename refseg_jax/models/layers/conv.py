"""Convolutions: followed by a batch norm, and channel by channel."""

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


class DepthwiseConv(nn.Module):
    """Convolution of each channel by itself: [B,h,w,C] -> same, with zeros around the map.

    Parameters `kernel` [size,size,1,C], `bias` [C], as those of `nn.Conv` with C groups. `size`,
    the side of the window, is odd.
    """

    size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:]).astype(self.dtype)
        # On the CPU XLA runs grouped convolutions many times slower than what they come to.
        y = jax.lax.platform_dependent(
            x.astype(self.dtype), kernel[:, :, 0], cpu=_sum_of_shifted, default=_grouped
        )
        return y + bias


def _grouped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[B,h,w,C] by kernel [k,k,C] as the primitive that accelerators have."""
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _around(x: jax.Array, size: int) -> jax.Array:
    """The map with the zeros that a window of `size` sees around it."""
    edge = (size // 2, size // 2)
    return jnp.pad(x, ((0, 0), edge, edge, (0, 0)))


@jax.custom_vjp
def _sum_of_shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same as the sum over the window's cells of the map, shifted and scaled."""
    (_, h, w, _), size = x.shape, len(kernel)
    x = _around(x, size)
    cells = [(i, j) for i in range(size) for j in range(size)]
    return sum(x[:, i : i + h, j : j + w] * kernel[i, j] for i, j in cells)


def _shifted_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return _sum_of_shifted(x, kernel), (x, kernel)


def _shifted_backward(saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    size, around = len(kernel), _around(x, len(kernel))

    def of_cell(cell: jax.Array) -> jax.Array:
        corner = (0, cell // size, cell % size, 0)
        return (jax.lax.dynamic_slice(around, corner, x.shape) * cotangent).sum((0, 1, 2))

    # In a loop, as XLA makes one slow fusion of all cells otherwise.
    of_kernel = jax.lax.map(of_cell, jnp.arange(size * size)).reshape(kernel.shape)
    return _sum_of_shifted(cotangent, kernel[::-1, ::-1]), of_kernel


_sum_of_shifted.defvjp(_shifted_forward, _shifted_backward)
