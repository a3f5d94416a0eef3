"""Convolutions followed by a batch norm."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.models.layers.norms import BatchNorm
from refseg_jax.models.layers.pointwise import norm_by_inputs, normed_pointwise
from refseg_jax.models.layers.squares import kernel_of_squares


class ConvNorm(nn.Module):
    """Convolution without a bias, batch norm, activation; parameters `conv`, `norm`.

    `__call__(x [B,h,w,C], train) -> [B, ceil(h/stride), ceil(w/stride), dim]`. The zeros around
    the map are as many on all four sides, as in PyTorch: with a stride, Flax's "SAME" has more of
    them on the right and at the bottom.

    With `squares` x has squares of pixels of that side, a multiple of the stride, in its channels,
    and so has the result (see squares.py): [B,h,w,squares²·C] -> [B,h,w,(squares/stride)²·dim]. Or
    so many rows and columns of pixels, [B,h,w,rows·columns·C]. Not with a dilation.

    Several maps, as a tuple, are taken as one that has their channels side by side: it is the sum
    of what they make, so that none of them is copied. Not with `squares`.

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
    def __call__(self, x: Any, train: bool, squares: int | tuple[int, int] = 1) -> jax.Array:
        maps = [a.astype(self.dtype) for a in (x if isinstance(x, tuple) else (x,))]
        ends = np.cumsum([a.shape[-1] for a in maps])
        x = maps[0]
        sides = (squares, squares) if isinstance(squares, int) else squares
        pixels = math.prod(sides)
        shape = (self.size, self.size, ends[-1] // pixels, self.dim)
        weights = _Kernel(shape, name="conv")()
        norm = BatchNorm(dtype=self.dtype, name="norm")
        kernel = weights.astype(self.dtype)
        one = len(maps) == self.size == self.stride == 1
        if train and one and norm_by_inputs(x, self.dim, pixels):
            scale, bias, running = norm.weights(self.dim)
            count = x[..., 0].size * pixels
            x, mean, var = normed_pointwise(x, weights[0, 0], scale, bias, pixels)
            norm.record(running, mean, var, count)
        else:
            if pixels > 1:
                assert self.dilation == 1 and not any(side % self.stride for side in sides)
                assert len(maps) == 1
                kernel, around = kernel_of_squares(kernel, sides, self.stride)
                x = convolve(x, kernel, 1, around)
            else:
                around = (self.size // 2 * self.dilation,) * 2
                x = sum(
                    convolve(a, part, self.stride, around, self.dilation)
                    for a, part in zip(maps, jnp.split(kernel, ends[:-1], 2), strict=True)
                )
            x = norm(x, train, x.shape[-1] // self.dim)
        return x if self.activation is None else self.activation(x)


class _Kernel(nn.Module):
    """Of a convolution, under the name that it has in `nn.Conv`."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        return self.param("kernel", init, self.shape)


def convolve(
    x: jax.Array, kernel: jax.Array, stride: int, around: tuple[int, int], dilation: int = 1
) -> jax.Array:
    """[B,h,w,C] by kernel [n,n,C,D]; on both axes `around` zeros stand (before, after) the map.

    A CPU multiplies with a 1x1 kernel, in half the time.
    """
    convolution = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=(around, around),
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    if kernel.shape[:2] != (1, 1):
        return convolution(x, kernel)
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=lambda x, kernel: x[:, ::stride, ::stride] @ kernel[0, 0],
        default=convolution,
    )
