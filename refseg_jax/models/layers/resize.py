"""Resizing as two small matrix products, which every accelerator does well."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.models.layers.conv import convolve
from refseg_jax.models.layers.doubling import double_in_kernel, fits_kernel
from refseg_jax.models.layers.norms import Vectors, normalize_by


def resize_bilinear(x: jax.Array, size: tuple[int, int], align_corners: bool = False) -> jax.Array:
    """Resizes `x` [B,h,w,C] or [B,h,w] to [B,*size,C] or [B,*size], in the dtype of `x`.

    Equals PyTorch's bilinear `interpolate` without antialiasing: pixel centres lie at i + 0.5, or,
    with `align_corners`, the centres of the corner pixels stay where they are.
    """
    return _resize(x, size, functools.partial(_linear, align_corners=align_corners))


def resize_bicubic(x: jax.Array, size: tuple[int, int], align_corners: bool = False) -> jax.Array:
    """As `resize_bilinear`, but equals PyTorch's bicubic `interpolate`; results may overshoot."""
    return _resize(x, size, functools.partial(_cubic, align_corners=align_corners))


def resized_conv(
    x: jax.Array, kernel: jax.Array, size: tuple[int, int], align_corners: bool = False
) -> jax.Array:
    """3x3 convolution, zeros around the map, of `resize_bilinear(x, size, align_corners)`.

    Args:
        x: [B,h,w,C].
        kernel: [3,3,C,D], of the dtype of `x`.
        size: (H, W).

    Returns:
        [B,H,W,D] in the dtype of `x`.
    """

    def convolve_resized(x, kernel):
        x = resize_bilinear(x, size, align_corners)
        return convolve(x, kernel, 1, (1, 1))

    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_resize_products, size=size, align_corners=align_corners),
        default=convolve_resized,
    )


def upsample(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """`resize_bilinear(x, size)` of x [B,h,w,C].

    On a TPU a kernel doubles where `doubling.fits_kernel`: XLA's products with the pixels' weights
    take three times as long as to read and write the maps (docs/scale.md).
    """
    resize = functools.partial(resize_bilinear, size=size)
    return _doubled_in_kernel(x, size, double_in_kernel, resize)


def upsampled_conv(
    x: jax.Array, kernel: jax.Array, size: tuple[int, int], vectors: Vectors | None = None
) -> jax.Array:
    """`resized_conv(x, kernel, size)`; as `upsample` on a TPU.

    With `vectors`, x goes through that batch norm and a ReLU first, in the dtype of `x`.
    """
    if vectors is not None and not fits_kernel(x, normed=True):
        x, vectors = _rectified(x, vectors), None

    def doubled(x, vectors):
        return convolve(double_in_kernel(x, vectors), kernel, 1, (1, 1))

    def resized(x, vectors):
        x = x if vectors is None else _rectified(x, vectors)
        return resized_conv(x, kernel, size)

    return _doubled_in_kernel(x, size, doubled, resized, vectors)


def _rectified(x: jax.Array, vectors: Vectors) -> jax.Array:
    return jax.nn.relu(normalize_by(x, vectors).astype(x.dtype))


def _doubled_in_kernel(
    x: jax.Array,
    size: tuple[int, int],
    in_kernel: Callable[..., jax.Array],
    otherwise: Callable[..., jax.Array],
    *vectors: Vectors | None,
) -> jax.Array:
    doubles = tuple(size) == (2 * x.shape[1], 2 * x.shape[2])
    if not doubles or not fits_kernel(x):
        return otherwise(x, *vectors)
    return jax.lax.platform_dependent(x, *vectors, tpu=in_kernel, default=otherwise)


def doubled_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`resized_conv` to twice the size, `align_corners` False, with squares of pixels as result.

    Args:
        x: [B,h,w,C].
        kernel: float32 [3,3,C,D].

    Returns:
        [B,h,w,4·D] in the dtype of `x`: 2x2 pixels side by side, see squares.py.

    The window of a pixel of the doubled map holds mixtures of 3x3 cells of `x`, the same ones for
    every pixel at that place of its square. So it is one 3x3 convolution of `x`, whose kernel is
    mixed instead of the map: as much work, and no larger map. With zeros around `x` the doubled
    map lacks a quarter of the last cell at its border, and goes on for a pixel with another: both
    are put right along its four sides. The kernel's gradient is that of the mixed ones, seven times
    as large, until devices have added it up.
    """
    (B, h, w, _), (C, D) = x.shape, kernel.shape[2:]
    # [2,3,3]: of a line's pixel in its square and a cell of its window, the weights of three of x.
    matrix = _linear(5, 10, False)
    mixture = np.stack([matrix[3 + pixel : 6 + pixel, 1:4] for pixel in (0, 1)])
    mixture = np.einsum("ptu,qsv->uvpqts", mixture, mixture).reshape(36, 9)
    highest = jax.lax.Precision.HIGHEST
    mixed = jnp.einsum("mk,kcd->mcd", mixture, kernel.reshape(9, C, D), precision=highest)
    mixed = mixed.reshape(3, 3, 4, C, D).transpose(0, 1, 3, 2, 4).reshape(3, 3, C, 4 * D)
    y = convolve(x, mixed.astype(x.dtype), 1, (1, 1))

    def missing(kernel: jax.Array, last: bool) -> jax.Array:
        """[3,3,C,D] -> [3,C,2·D]: of a side's two pixels across it, by cells along it."""
        outer = kernel[-1 if last else 0]
        pixels = kernel[1] - outer, outer
        both = jnp.stack(pixels[::-1] if last else pixels, 2) / 4
        return both.reshape(3, C, 2 * D).astype(x.dtype)

    # Rows from corner to corner, with all that the corners need; columns are without it, and have
    # zeros beyond their ends, as `mixed` has.
    none = 0, 0
    for last in (False, True):
        row, column = (x[:, -1:], x[:, :, -1:]) if last else (x[:, :1], x[:, :, :1])
        row = jnp.pad(resize_bilinear(row, (1, 2 * w)), (none, none, (1, 1), none))
        row = convolve(row, missing(kernel, last)[None], 1, (0, 0))
        row = row.reshape(B, 1, w, 2, 2, D).swapaxes(3, 4).reshape(B, 1, w, 4 * D)
        y += jnp.pad(row, (none, (h - 1, 0) if last else (0, h - 1), none, none))

        column = resize_bilinear(jnp.pad(column, (none, (1, 1), none, none)), (2 * h + 4, 1))
        kernel_of_columns = missing(kernel.swapaxes(0, 1), last)[:, None]
        column = convolve(column[:, 1:-1], kernel_of_columns, 1, (0, 0)).reshape(B, h, 1, 4 * D)
        y += jnp.pad(column, (none, none, (w - 1, 0) if last else (0, w - 1), none))
    return y


def _resize_products(
    x: jax.Array, kernel: jax.Array, size: tuple[int, int], align_corners: bool
) -> jax.Array:
    """`resized_conv` in a quarter of the operations, or fewer, but more moves of memory.

    Resizing is linear over pixels and the product with one cell of the kernel linear over
    channels, so either may come first. Here the products do, over x's fewer pixels; resizing them
    and shifting each to its place is then one matrix product per axis.
    """
    B, h, w, C = x.shape
    D = kernel.shape[-1]

    def shifted(source: int, target: int) -> np.ndarray:
        """[target, source, 3]: row t of [:, :, i] is the interpolation of cell t + i - 1."""
        matrix = np.pad(_linear(source, target, align_corners), ((1, 1), (0, 0)))
        return np.stack([matrix[i : i + target] for i in range(3)], -1).astype(x.dtype)

    products = x @ kernel.transpose(2, 1, 0, 3).reshape(C, 9 * D)
    # As a batch of products no operand needs transposing, and the matrix is small.
    columns = jnp.broadcast_to(shifted(w, size[1]).reshape(size[1], 3 * w), (B, h, size[1], 3 * w))
    highest = jax.lax.Precision.HIGHEST
    y = jnp.matmul(columns, products.reshape(B, h, 3 * w, 3 * D), precision=highest)
    y = y.reshape(B, h, size[1], 3, D)
    return jnp.einsum("Hhi,bhWid->bHWd", shifted(h, size[0]), y, precision=highest)


@jax.named_scope("resize")
def _resize(
    x: jax.Array, size: tuple[int, int], interpolation: Callable[[int, int], np.ndarray]
) -> jax.Array:
    def mix(spec: str, source: int, target: int, x: jax.Array) -> jax.Array:
        if source == target:
            return x
        # Interpolated values are part of the answer, so no reduced-precision passes.
        matrix = interpolation(source, target).astype(x.dtype)
        return jnp.einsum(spec, matrix, x, precision=jax.lax.Precision.HIGHEST)

    x = mix("Hh,bhw...->bHw...", x.shape[1], size[0], x)
    return mix("Ww,bHw...->bHW...", x.shape[2], size[1], x)


def _positions(source: int, target: int, align_corners: bool) -> np.ndarray:
    """Where the centres of `target` cells lie on an axis of `source` cells, 0 at its first."""
    if align_corners:
        return np.linspace(0, source - 1, target)
    return (np.arange(target) + 0.5) * source / target - 0.5


@functools.cache
def _linear(source: int, target: int, align_corners: bool) -> np.ndarray:
    """The matrix [target, source] that interpolates one axis linearly; rows sum to 1."""
    position = np.clip(_positions(source, target, align_corners), 0, source - 1)
    distance = np.abs(position[:, None] - np.arange(source))
    return np.maximum(0, 1 - distance).astype(np.float32)


@functools.cache
def _cubic(source: int, target: int, align_corners: bool) -> np.ndarray:
    """The same with Keys' cubic kernel, a = -0.75; beyond the ends the outermost cells repeat."""
    position = _positions(source, target, align_corners)[:, None]
    cell = np.floor(position).astype(int) + np.arange(-1, 3)
    distance = np.abs(position - cell)
    weight = np.where(
        distance <= 1,
        (1.25 * distance - 2.25) * distance**2 + 1,
        ((-0.75 * distance + 3.75) * distance - 6) * distance + 3,
    )
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target)[:, None], np.clip(cell, 0, source - 1)), weight)
    return matrix.astype(np.float32)
