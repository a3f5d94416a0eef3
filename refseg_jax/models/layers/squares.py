"""Space to depth: maps that have whole squares of pixels in their channels.

A TPU has a map's channels in the lanes of its registers, 128 of them. The first maps of an encoder
have 3 to 64 channels and most of its pixels, so that moving and multiplying empty lanes takes most
of the time there. With 2 x 2 or 4 x 4 pixels side by side the lanes are full, and a convolution is
one of squares, with a kernel that is zero where a square's pixels are out of the window's reach:
up to sixteen times the work, in about a third of the time (docs/scale.md). A decoder's last map can
be one of squares, too, if it is a convolution of a map half its size: see `doubled_conv`. Other
devices work on pixels.

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
    pixels = side * side
    pool = np.tile(np.eye(x.shape[-1] // pixels) / pixels, (pixels, 1))
    return jnp.matmul(x, jnp.asarray(pool, x.dtype), precision=jax.lax.Precision.HIGHEST)


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
    kernel: jax.Array, side: int, stride: int
) -> tuple[jax.Array, tuple[int, int]]:
    """A convolution of pixels, with zeros around the map, as one of whole squares.

    Args:
        kernel: [n,n,C,D], n odd.
        side: of the squares that go in.
        stride: of the window, a divisor of `side`.

    Returns:
        The kernel [N,N,side²·C,(side/stride)²·D], whose stride is 1, and how many squares of zeros
        it needs on either axis (before, after) the map.
    """
    n, _, C, D = kernel.shape
    after = side // stride
    reach = -(-(n // 2) // side)
    # For a pixel of a square and a cell of its window: the square and the pixel in it.
    pick = np.zeros((after, n, 2 * reach + 1, side))
    for pixel in range(after):
        for cell in range(n):
            square, other = divmod(stride * pixel + cell - n // 2, side)
            pick[pixel, cell, reach + square, other] = 1
    used = pick.any((0, 1, 3))
    pick = jnp.asarray(pick[:, :, used], kernel.dtype)
    # Each number is picked, or 0.
    between = jnp.einsum(
        "atAp,buBq,tucd->ABpqcabd", pick, pick, kernel, precision=jax.lax.Precision.HIGHEST
    )
    N = used.sum()
    between = between.reshape(N, N, side * side * C, after * after * D)
    return between, (int(used[:reach].sum()), int(used[reach + 1 :].sum()))
