"""Windows of a map: where its cells lie in them, and how to bring them there and back."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of `side` x `side` cells over a map of `size` (h, w).

    The map is padded to whole windows, at the bottom and on the right. They lie `shift` cells
    further down and right, cyclically.
    """

    size: tuple[int, int]
    side: int
    shift: int = 0

    @property
    def rows(self) -> int:
        """Of windows."""
        return -(-self.size[0] // self.side)

    @property
    def columns(self) -> int:
        """Of windows."""
        return -(-self.size[1] // self.side)

    @property
    def padded(self) -> bool:
        """Whether there are cells around the map."""
        return self.size != (self.rows * self.side, self.columns * self.side)

    def cells(self) -> np.ndarray:
        """Which of the map's h·w cells lies where, or -1: int32 [windows, side²]."""
        (h, w), H, W = self.size, self.rows * self.side, self.columns * self.side
        cell = np.arange(h * w, dtype=np.int32).reshape(h, w)
        cell = np.pad(cell, ((0, H - h), (0, W - w)), constant_values=-1)
        cell = np.roll(cell, (-self.shift, -self.shift), (0, 1))
        return by_windows(cell[None, ..., None], self.side)[..., 0]

    def regions(self) -> np.ndarray | None:
        """Which cells were neighbours before the shift: equal numbers, int32 [windows, side²].

        After it the last window of an axis holds cells from both ends of the map: the axis has
        three regions, cut at `side` and at `shift` cells before its end. None without a shift.
        """
        if not self.shift:
            return None

        def axis(n: int) -> np.ndarray:
            cell = np.arange(n, dtype=np.int32)
            return (cell >= n - self.side) + np.int32(cell >= n - self.shift)

        H, W = self.rows * self.side, self.columns * self.side
        return by_windows((3 * axis(H)[:, None] + axis(W))[None, ..., None], self.side)[..., 0]


def by_windows(x: jax.Array | np.ndarray, side: int) -> jax.Array | np.ndarray:
    """[B, h, w, C] of whole windows -> [B · windows, side², C]."""
    B, h, w, C = x.shape
    x = x.reshape(B, h // side, side, w // side, side, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, side * side, C)


def gather_windows(x: jax.Array, windows: Windows) -> jax.Array:
    """Cells [B, h·w, C], row by row, in windows [B · windows, side², C]; zeros pad the map."""
    (h, w), side, shift = windows.size, windows.side, windows.shift
    H, W = windows.rows * side, windows.columns * side

    def by_moves(x):
        x = x.reshape(-1, h, w, x.shape[-1])
        x = jnp.pad(x, ((0, 0), (0, H - h), (0, W - w), (0, 0)))
        return by_windows(jnp.roll(x, (-shift, -shift), (1, 2)), side)

    def by_products(x):
        pick, whole = _picks(windows, x.dtype)
        if not whole:
            x = jnp.roll(jnp.pad(x, ((0, 0), (0, (H - h) * w), (0, 0))), -shift * w, 1)
        x = x.reshape(-1, pick.shape[1], x.shape[-1])
        x = jnp.einsum("mn,bnc->bmc", pick, x, precision=jax.lax.Precision.HIGHEST)
        return x.reshape(-1, side * side, x.shape[-1])

    return jax.lax.platform_dependent(x, tpu=by_products, default=by_moves)


def scatter_windows(x: jax.Array, windows: Windows) -> jax.Array:
    """The inverse of `gather_windows`, without the padding."""
    (h, w), side, shift = windows.size, windows.side, windows.shift
    H, W = windows.rows * side, windows.columns * side

    def by_moves(x):
        x = x.reshape(-1, windows.rows, windows.columns, side, side, x.shape[-1])
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, H, W, x.shape[-1])
        x = jnp.roll(x, (shift, shift), (1, 2))[:, :h, :w]
        return x.reshape(-1, h * w, x.shape[-1])

    def by_products(x):
        pick, whole = _picks(windows, x.dtype)
        x = x.reshape(-1, len(pick), x.shape[-1])
        x = jnp.einsum("mn,bmc->bnc", pick, x, precision=jax.lax.Precision.HIGHEST)
        if not whole:
            x = jnp.roll(x.reshape(-1, H * w, x.shape[-1]), shift * w, 1)[:, : h * w]
        return x

    return jax.lax.platform_dependent(x, tpu=by_products, default=by_moves)


# A TPU moves cells about in tiles of 8 or 16 rows, which windows do not fit. A product with ones
# and zeros takes less time: over the whole of a small map, else over a row of windows.
_WHOLE_MAP = 1024


def _picks(windows: Windows, dtype: jnp.dtype) -> tuple[jax.Array, bool]:
    """[cells in windows, cells] of ones and zeros: which cell comes to lie where. And whether it is
    of a whole map, and not of a row of windows that is shifted to the right only."""
    w, side, shift = windows.size[1], windows.side, windows.shift
    whole = math.prod(windows.size) <= _WHOLE_MAP
    if whole:
        cell, size = windows.cells(), windows.size
    else:
        size = side, w
        cell = np.pad(
            np.arange(side * w, dtype=np.int32).reshape(size),
            ((0, 0), (0, -w % side)),
            constant_values=-1,
        )
        cell = by_windows(np.roll(cell, -shift, 1)[None, ..., None], side)
    return (jnp.asarray(cell.ravel())[:, None] == jnp.arange(math.prod(size))).astype(dtype), whole
