"""Space to depth: maps that have whole squares of pixels in their channels.

A TPU has a map's channels in the lanes of its registers, 128 of them. The first maps of an encoder
have 3 to 64 channels and most of its pixels, so that moving and multiplying empty lanes takes most
of the time there. With 2 x 2 or 4 x 4 pixels side by side the lanes are full, and a convolution is
one of squares, with a kernel that is zero where a square's pixels are out of the window's reach:
up to sixteen times the work, in about a third of the time (docs/scale.md). A decoder's last map can
be one of squares, too, if it is a convolution of a map half its size: see `doubled_conv`. In a
ResNet's first stage pairs of pixels fill the lanes. Other devices work on pixels.

A map of `side` squares is [B,h,w,side²·C]: pixels row by row, each with its C channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.models.layers.patches import embed_patches
from refseg_jax.registers import LANES


def image_to_squares(image: jax.Array, side: int) -> jax.Array:
    """Space to depth of an image with few channels: [B,side·h,side·w,C] -> [B,h,w,side²·C]."""
    pixels = side * side * image.shape[-1]
    # As patches are embedded: each number is picked, into whole registers.
    pick = np.eye(pixels, pixels + -pixels % LANES).reshape(side, side, image.shape[-1], -1)
    return embed_patches(image, jnp.asarray(pick, image.dtype))[..., :pixels]


def mean_of_squares(x: jax.Array, side: int) -> jax.Array:
    """Average pool of whole squares: [B,h,w,side²·C] -> [B,h,w,C]."""
    (B, h, w, _), pixels = x.shape, side * side
    C = x.shape[-1] // pixels
    pool = np.tile(np.eye(C) / pixels, (pixels, 1))
    pairs = 2 if fits_pairs(w, C) else 1
    # Of two squares at a time, so that the pixels of a pair are side by side as they come.
    kernel = np.eye(pairs).reshape(pairs, 1, pairs, 1) * pool[None, :, None]
    y = jax.lax.conv_general_dilated(
        x,
        jnp.asarray(kernel.reshape(1, pairs, pixels * C, pairs * C), x.dtype),
        (1, pairs),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
    return y.reshape(B, h, w, C)


def fits_pairs(w: int, C: int) -> bool:
    """Whether two pixels of C channels fit the lanes, and rows of `w` have whole pairs."""
    return w % 2 == 0 and 2 * C <= LANES


def pixels_of_squares(x: jax.Array, side: int) -> jax.Array:
    """Depth to space of one channel: [B,side²,h,w] -> [B,side·h,side·w]."""
    B, _, h, w = x.shape

    def places(cells: int) -> np.ndarray:
        """[pixels, side, cells], 1 where a pixel of a line is."""
        return np.eye(side * cells).reshape(-1, cells, side).swapaxes(1, 2)

    # Products, as a TPU would move each pixel else, in the gradient at least.
    pick = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    columns = pick("Wqw,bpqhw->bphW", places(w).astype(x.dtype), x.reshape(B, side, side, h, w))
    return pick("Hph,bphW->bHW", places(h).astype(x.dtype), columns)


def kernel_of_squares(
    kernel: jax.Array, side: int | tuple[int, int], stride: int
) -> tuple[jax.Array, tuple[int, int]]:
    """A convolution of pixels, with zeros around the map, as one of whole squares.

    Args:
        kernel: [n,n,C,D], n odd.
        side: of the squares that go in, or their rows and columns, which must reach as far.
        stride: of the window, a divisor of `side`.

    Returns:
        The kernel [N,N,side²·C,(side/stride)²·D], whose stride is 1, and how many squares of zeros
        it needs on either axis (before, after) the map.
    """
    n, _, C, D = kernel.shape
    sides = (side, side) if isinstance(side, int) else side
    axes = {side: _picks(n, side, stride) for side in sides}
    (around,) = {around for _, around in axes.values()}
    picks = {side: jnp.asarray(pick, kernel.dtype) for side, (pick, _) in axes.items()}
    rows, columns = (picks[side] for side in sides)
    # Each number is picked, or 0.
    between = jnp.einsum(
        "atAp,buBq,tucd->ABpqcabd", rows, columns, kernel, precision=jax.lax.Precision.HIGHEST
    )
    a, _, A, p, b, B, q = *rows.shape, *columns.shape[:1], *columns.shape[2:]
    return between.reshape(A, B, p * q * C, a * b * D), around


def _picks(n: int, side: int, stride: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Along an axis, for a pixel of a square and a cell of its window: the square and its pixel.

    ([side/stride,n,N,side], 0 or 1; how many of the N squares are before and after that square).
    """
    after = side // stride
    reach = -(-(n // 2) // side)
    pick = np.zeros((after, n, 2 * reach + 1, side))
    for pixel in range(after):
        for cell in range(n):
            square, other = divmod(stride * pixel + cell - n // 2, side)
            pick[pixel, cell, reach + square, other] = 1
    used = pick.any((0, 1, 3))
    return pick[:, :, used], (int(used[:reach].sum()), int(used[reach + 1 :].sum()))
