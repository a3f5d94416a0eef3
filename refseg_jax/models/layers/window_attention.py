"""Attention inside windows of a map: as XLA compiles it well, and as a kernel for TPUs."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.sharding import kernel_places

# What is added to the logits of cells that are no neighbours on the map.
APART = -100.0


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
        return -(-self.size[0] // self.side)

    @property
    def columns(self) -> int:
        return -(-self.size[1] // self.side)

    @property
    def padded(self) -> bool:
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


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
    bias: jax.Array,
    windows: Windows,
) -> jax.Array:
    """softmax(q k^T + bias) v of each head in each window, where neighbours see each other.

    Logits and softmax are computed in float32. On a TPU, bfloat16 arrays that fill its registers go
    through a kernel, in which a window's logits never leave the chip; in all else they are kept in
    the dtype of `q`. See `fits_kernel`.

    Args:
        q: [B,h·w,C], scaled; a map row by row, the channels of one head after those of another.
        k: as `q`.
        v: as `q`.
        padding: [2,C]: k and v of the cells that pad the map to whole windows.
        bias: float32 [heads,side²,side²].
        windows: those of the map.

    Returns:
        [B,h·w,C] in the dtype of `q`.
    """
    padding = padding.astype(q.dtype)
    if fits_kernel(q, len(bias), windows):
        return jax.lax.platform_dependent(
            *(q, k, v, padding, bias),
            tpu=functools.partial(attend_in_kernel, windows=windows),
            default=functools.partial(attend_in_windows, windows=windows),
        )
    return attend_in_windows(q, k, v, padding, bias, windows)


def attend_in_windows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
    bias: jax.Array,
    windows: Windows,
) -> jax.Array:
    """`window_attention` in XLA's operations."""
    q, k, v = (gather_windows(x, windows) for x in (q, k, v))
    if windows.padded:
        outside = jnp.asarray(windows.cells() < 0)[:, :, None]
        k, v = (
            jnp.where(outside, p, x.reshape(-1, *outside.shape[:2], x.shape[-1])).reshape(x.shape)
            for p, x in zip(padding, (k, v), strict=True)
        )
    return scatter_windows(attend(q, k, v, bias, windows.regions()), windows)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, regions: np.ndarray | None
) -> jax.Array:
    """Attention inside windows [W,n,C] of cells; those of one region see each other.

    `bias` is float32 [heads,n,n], `regions` int [windows of one sample, n], or None for one region.
    """

    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], len(bias), -1).swapaxes(1, 2)

    y = _attend(by_head(q), by_head(k), by_head(v), bias, regions)
    return y.swapaxes(1, 2).reshape(q.shape)


@jax.custom_vjp
def _attend(q, k, v, bias, regions):
    """The same of [W,heads,n,d].

    The traffic of the logits is most of what the attention costs. So they are kept in the dtype of
    `q`, and the backward pass is our own: it reads the logits, and neither they nor the weights
    are read just to be summed up.
    """
    return _attend_forward(q, k, v, bias, regions)[0]


def _attend_forward(q, k, v, bias, regions):
    logits = jnp.matmul(q, k.mT, preferred_element_type=jnp.float32)
    if regions is None:
        logits += bias
    else:
        regions = jnp.asarray(regions)
        same = regions[:, None, :, None] == regions[:, None, None, :]
        by_sample = logits.reshape(-1, len(regions), *logits.shape[1:])
        logits = (by_sample + bias + jnp.where(same, 0.0, APART)).reshape(logits.shape)
    logits = logits.astype(q.dtype)
    largest = logits.max(-1, keepdims=True).astype(jnp.float32)
    weights = jnp.exp(logits.astype(jnp.float32) - largest).astype(v.dtype)
    # The product with ones is the softmax's denominator.
    ones = jnp.ones_like(v[..., :1])
    y = jnp.matmul(weights, jnp.concatenate([v, ones], -1), preferred_element_type=jnp.float32)
    y, total = y[..., :-1], y[..., -1:]
    y = (y / total).astype(v.dtype)
    return y, (q, k, v, logits, largest + jnp.log(total), y)


def _attend_backward(saved, cotangent):
    q, k, v, logits, log_total, y = saved
    weights = jnp.exp(logits.astype(jnp.float32) - log_total)
    of_weights = jnp.matmul(cotangent, v.mT, preferred_element_type=jnp.float32)
    # sum_j weights_ij of_weights_ij, from the outputs.
    mean = (cotangent.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)
    of_logits = weights * (of_weights - mean)
    of_bias = of_logits.sum(0)
    of_logits = of_logits.astype(q.dtype)
    of_v = jnp.matmul(weights.astype(v.dtype).mT, cotangent)
    return jnp.matmul(of_logits, k), jnp.matmul(of_logits.mT, q), of_v, of_bias, None


_attend.defvjp(_attend_forward, _attend_backward)


# The kernel. It takes as many heads at a time as fill the lanes of a register, and a strip of the
# map as high as a window, whose cells it moves into windows by itself: XLA would take longer for
# it, and compute queries, keys and values of the cells around the map as well.
# Logits have a row for each key and a lane for each query of each head: a sum over keys adds up
# registers, where a sum over lanes would move them, and the queries of all heads fill the lanes
# better than the keys of a window. Each head's queries begin at a register; what remains of them
# beyond full registers comes after those of all heads.
LANES = 128
MEMORY = 14 << 20  # Bytes that a step may take, of the 16 MiB of a v4.
MOST_LOGITS = 1 << 19  # At a time: their like in the backward pass takes most of that.
TOGETHER = 5  # Windows: while one waits for its products, another computes.


def fits_kernel(q: jax.Array, heads: int, windows: Windows) -> bool:
    """Whether `attend_in_kernel` takes arrays like `q` [B,h·w,C].

    They fill registers, what is computed of a window and the strips of a map that are at hand fit a
    chip's vector memory, and every device of the mesh in use has whole samples; without a mesh
    (`sharding.on_mesh`) nothing is known of the devices.
    """
    B, _, C = q.shape
    side, n = windows.side, windows.side**2
    mesh = jax.sharding.get_abstract_mesh()
    return (
        (q.dtype == jnp.bfloat16 and side % 4 == 0 and windows.shift % 2 == 0)
        and (C % LANES == 0 and LANES % (C // heads) == 0)
        and LANES * heads // C * n * n <= MOST_LOGITS
        and 14 * windows.columns * n * LANES * q.dtype.itemsize <= MEMORY
        and (not mesh.empty and B % mesh.size == 0)
    )


def attend_in_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
    bias: jax.Array,
    windows: Windows,
) -> jax.Array:
    """`window_attention` as a kernel for TPUs of arrays that `fits_kernel`."""
    (h, w), (B, _, C) = windows.size, q.shape
    if w % 2 == 0:
        return _attend_in_kernel(q, k, v, padding, bias, windows)
    # Two cells of bfloat16 share a row of a register: one more column.
    assert windows.columns * windows.side > w
    columns = jnp.zeros_like(padding[0]), *padding
    q, k, v = (
        jnp.concatenate([x.reshape(B, h, w, C), jnp.broadcast_to(p, (B, h, 1, C))], 2)
        for x, p in zip((q, k, v), columns, strict=True)
    )
    q, k, v = (x.reshape(B, -1, C) for x in (q, k, v))
    wider = dataclasses.replace(windows, size=(h, w + 1))
    y = _attend_in_kernel(q, k, v, padding, bias, wider)
    return y.reshape(B, h, w + 1, C)[:, :, :w].reshape(B, -1, C)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend_in_kernel(q, k, v, padding, bias, windows):
    return _divided(False, windows, (q, k, v), padding, bias)


def _in_kernel_forward(q, k, v, padding, bias, windows):
    return _attend_in_kernel(q, k, v, padding, bias, windows), (q, k, v, padding, bias)


def _in_kernel_backward(windows, saved, cotangent):
    # The logits are computed once more: that takes less than to write and read them.
    *arrays, padding, bias = saved
    return _divided(True, windows, (*arrays, cotangent), padding, bias)


_attend_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


def _divided(
    backward: bool,
    windows: Windows,
    arrays: tuple[jax.Array, ...],
    padding: jax.Array,
    bias: jax.Array,
) -> Any:
    """Runs the kernel where the samples are: XLA cannot divide it among devices by itself."""
    samples, whole = kernel_places()

    def run(padding, bias, *arrays):
        results = _run(backward, windows, arrays, padding, bias)
        if backward:
            *results, of_padding, of_bias = results
            results = *results, *jax.lax.psum((of_padding, of_bias), *samples)
        return results

    results = jax.shard_map(
        run,
        in_specs=(whole, whole, *[samples] * len(arrays)),
        out_specs=(samples, samples, samples, whole, whole) if backward else samples,
        check_vma=False,
    )(padding, bias.mT, *arrays)
    if backward:
        *results, of_padding, of_bias = results
        results = *results, of_padding.astype(padding.dtype), of_bias.mT
    return results


@dataclasses.dataclass(frozen=True)
class _Steps:
    """How the kernel goes over a map, strip by strip.

    Windows that are not shifted are those of a strip. Else the upper part of a strip of windows is
    the lower part of a strip of the map, the lower part is the upper part of the next, and around
    the map. So the last strip of windows comes first; there is one more step before, which reads
    its upper part, and one after, which writes it.
    """

    windows: Windows

    def __len__(self) -> int:
        return self.windows.rows + 2 * bool(self.windows.shift)

    def _strip(self, step: jax.Array, before: int) -> jax.Array:
        last = self.windows.rows - 1
        return jnp.clip(step - before, 0, last) if self.windows.shift else step

    def read(self, step: jax.Array) -> jax.Array:
        """Which strip of the map is read."""
        first = self.windows.rows - 1 if self.windows.shift else 0
        return jnp.where(step == 0, first, self._strip(step, 1))

    def computed(self, step: jax.Array) -> jax.Array:
        """Which strip of windows is computed, if any."""
        first = self.windows.rows - 1 if self.windows.shift else 0
        return jnp.where(step <= 1, first, step - 2) if self.windows.shift else step

    def written(self, step: jax.Array) -> jax.Array:
        """Which strip of the map is written."""
        return self._strip(step, 2)


def _run(
    backward: bool,
    windows: Windows,
    arrays: tuple[jax.Array, ...],
    padding: jax.Array,
    bias: jax.Array,
) -> Any:
    """The kernel for every group of heads, sample and strip, the last two one after another."""
    B, _, C = arrays[0].shape
    (_, w), side, n = windows.size, windows.side, windows.side**2
    dtype, packed = arrays[0].dtype, 4 // arrays[0].dtype.itemsize
    steps = _Steps(windows)

    def strip(which: Callable) -> pl.BlockSpec:
        return pl.BlockSpec((1, side * w, LANES), lambda g, b, i: (b, which(i), g))

    # The same block for all strips: it is read and written once.
    heads = len(bias) * LANES // C
    of_group = pl.BlockSpec((heads, n, n), lambda g, b, i: (g, 0, 0))
    of_padding = pl.BlockSpec((2, side, LANES), lambda g, b, i: (0, 0, g))
    cells = ("q", "k", "v", "of_y")[: len(arrays)]
    inputs = {name: (x, strip(steps.read)) for name, x in zip(cells, arrays, strict=True)}
    inputs["bias"] = bias, of_group
    if windows.padded:
        rows = jnp.broadcast_to(padding[:, None], (2, side, C))
        inputs["padding"] = rows, of_padding
    if windows.shift:
        # A window is cut or not, downwards and across.
        regions = _regions_of_kinds(windows)
        queries = np.concatenate([regions[:, None, part] for _, part, _ in _lanes(n, heads)], -1)
        for name, x in ("keys", regions[:, :, None]), ("queries", queries):
            inputs[name] = jnp.asarray(x), pl.BlockSpec(x.shape, lambda g, b, i: (0, 0, 0))
    if windows.padded and backward:
        outside = windows.cells().reshape(windows.rows, windows.columns, 1, n) < 0
        outside = jnp.broadcast_to(jnp.asarray(outside, dtype), (*outside.shape[:2], 8, n))
        block = 1, *outside.shape[1:]
        inputs["outside"] = (
            outside,
            pl.BlockSpec(block, lambda g, b, i: (steps.computed(i), 0, 0, 0)),
        )
    like_x = jax.ShapeDtypeStruct(arrays[0].shape, dtype)
    names = ("of_q", "of_k", "of_v") if backward else ("y",)
    outputs = {name: (like_x, strip(steps.written)) for name in names}
    if backward:
        outputs["of_bias"] = jax.ShapeDtypeStruct(bias.shape, bias.dtype), of_group
        if windows.padded:
            like_padding = jax.ShapeDtypeStruct((2, 8, C), jnp.float32)
            block = pl.BlockSpec((2, 8, LANES), lambda g, b, i: (0, 0, g))
            outputs["of_padding"] = like_padding, block
    of_rows = jnp.int32 if packed > 1 else dtype
    in_windows = pltpu.VMEM((windows.columns, n // packed, LANES), of_rows)
    scratch = {f"{name}_cells": in_windows for name in cells}
    for name in ("bias", "of_bias") if backward else ("bias",):
        scratch[f"{name}_lanes"] = pltpu.VMEM((n, heads * n), jnp.float32)
    if windows.shift:
        upper = (side - windows.shift) * side // packed
        upper = pltpu.VMEM((windows.columns, upper, LANES), of_rows)
        scratch |= {f"{name}_first": upper for name in names}
    refs = (*inputs, *outputs, *scratch)
    results = pl.pallas_call(
        functools.partial(_kernel, windows, dtype, refs),
        name="window_attention_backward" if backward else "window_attention",
        grid=(C // LANES, B, len(steps)),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=(5 if backward else 2) * 2 * B * windows.rows * windows.columns * n * n * C,
            bytes_accessed=(7 if backward else 4) * like_x.size * dtype.itemsize,
            transcendentals=B * windows.rows * windows.columns * bias.size,
        ),
    )(*(x for x, _ in inputs.values()))
    if not backward:
        return results[0]
    results = dict(zip(outputs, results, strict=True))
    of_padding = results["of_padding"][:, 0] if windows.padded else jnp.zeros(padding.shape)
    return *(results[name] for name in names), of_padding, results["of_bias"]


def _in_full_registers(n: int) -> int:
    return n // LANES * LANES


def _lanes(n: int, heads: int) -> list[tuple[int, slice, slice]]:
    """(a head, some of its queries, the lanes where they lie), in the order of the lanes."""
    full = _in_full_registers(n)
    places, start = [], 0
    for queries in slice(0, full), slice(full, n):
        count = queries.stop - queries.start
        for head in range(heads if count else 0):
            places.append((head, queries, slice(start, start + count)))
            start += count
    return places


def _regions_of_kinds(windows: Windows) -> np.ndarray:
    """The regions of a window that is cut as 2 · downwards + across says, int32 [4, side²]."""
    beyond = np.int32(np.arange(windows.side) >= windows.side - windows.shift)
    kinds = [2 * y * beyond[:, None] + x * beyond for y in (0, 1) for x in (0, 1)]
    return np.stack(kinds).reshape(4, -1)


def _kernel(windows: Windows, dtype: jnp.dtype, names: tuple[str, ...], *refs: Any) -> None:
    """One step of the grid. Results take the place of the cells that they belong to."""
    refs = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    steps, step = _Steps(windows), pl.program_id(2)
    side, shift, rows = windows.side, windows.shift, windows.rows
    backward = hasattr(refs, "of_bias")
    names = ("q", "k", "v", "of_y") if backward else ("q", "k", "v")
    results = {"of_q": "q", "of_k": "k", "of_v": "v"} if backward else {"y": "q"}
    packed = 4 // dtype.itemsize

    def around(name, cells):
        """As many rows of what lies around the map."""
        if name in ("k", "v"):
            return _rows(refs.padding)[("k", "v").index(name), :cells]
        return jnp.zeros((cells, LANES), refs.q_cells.dtype)

    def pad(names):
        """Fills the places beyond the end of the map's rows."""
        for name, row, (column, place, source, count) in itertools.product(
            names, range(side), _runs(windows)
        ):
            if source is None:
                place, count = (row * side + place) // packed, count // packed
                getattr(refs, f"{name}_cells")[column, place : place + count] = around(name, count)

    @pl.when((pl.program_id(1) == 0) & (step == 0))
    def _():
        pad(names)
        for head, queries, lanes in _lanes(*refs.bias.shape[1::-1]):
            refs.bias_lanes[:, lanes] = refs.bias[head, :, queries]
        for name in {"of_bias_lanes", "of_padding"} & set(vars(refs)):
            ref = getattr(refs, name)
            ref[...] = jnp.zeros_like(ref)

    def read(first, last, to):
        """Moves rows of a strip of the map to those of windows, from row `to`."""
        for name in names:
            strip, cells = _rows(getattr(refs, name)), getattr(refs, f"{name}_cells")
            for row, (column, place, source, count) in itertools.product(
                range(first, last), _runs(windows)
            ):
                if source is not None:
                    place = ((row - first + to) * side + place) // packed
                    source, count = (row * windows.size[1] + source) // packed, count // packed
                    cells[column, place : place + count] = strip[0, source : source + count]
        beyond = windows.size[0] - (rows - 1) * side
        if beyond < last:

            @pl.when(steps.read(step) == rows - 1)
            def _():
                for name, row in itertools.product(names, range(max(first, beyond), last)):
                    place, count = (row - first + to) * side // packed, side // packed
                    for column in range(windows.columns):
                        cells = getattr(refs, f"{name}_cells")
                        cells[column, place : place + count] = around(name, count)

    def write(first, last, of, where="{}_cells"):
        """Moves rows of windows, from row `of`, to those of a strip of the map."""
        for result, name in results.items():
            strip = _rows(getattr(refs, result))
            cells = getattr(refs, where.format(result if "first" in where else name))
            for row, (column, place, target, count) in itertools.product(
                range(first, last), _runs(windows)
            ):
                if target is not None:
                    place = ((row - first + of) * side + place) // packed
                    target, count = (row * windows.size[1] + target) // packed, count // packed
                    strip[0, target : target + count] = cells[column, place : place + count]

    def compute():
        if backward:
            pad("kv")  # There are gradients now.
        strip = steps.computed(step)
        most = MOST_LOGITS // refs.bias.size
        together = max(
            n for n in range(1, TOGETHER + 1) if windows.columns % n == 0 and n <= max(most, 1)
        )

        def some(i, _):
            columns = [i * together + j for j in range(together)]
            (_backward if backward else _forward)(windows, dtype, refs, strip, columns)

        if together == windows.columns:
            some(0, None)
        else:
            jax.lax.fori_loop(0, windows.columns // together, some, None)

    if not shift:
        read(0, side, 0)
        compute()
        write(0, side, 0)
    else:

        @pl.when(step >= 2)
        def _():
            write(0, shift, side - shift)

        @pl.when((step >= 1) & (step <= rows))
        def _():
            read(0, shift, side - shift)
            compute()

        @pl.when(step == 1)
        def _():
            for result, name in results.items():
                first, cells = getattr(refs, f"{result}_first"), getattr(refs, f"{name}_cells")
                first[...] = cells[:, : first.shape[1]]

        @pl.when((step >= 2) & (step <= rows))
        def _():
            write(shift, side, 0)

        @pl.when(step == rows + 1)
        def _():
            write(shift, side, 0, "{}_first")

        @pl.when(step <= rows)
        def _():
            read(shift, side, 0)

    if backward:

        @pl.when((pl.program_id(1) == pl.num_programs(1) - 1) & (step == len(steps) - 1))
        def _():
            for head, queries, lanes in _lanes(*refs.bias.shape[1::-1]):
                refs.of_bias[head, :, queries] = refs.of_bias_lanes[:, lanes]


def _rows(ref: Any) -> Any:
    """`ref` as rows of registers: vector units of before v6e know no bfloat16, two of which are one
    integer."""
    return ref if ref.dtype.itemsize == 4 else ref.bitcast(jnp.int32)


def _runs(windows: Windows) -> Iterator[tuple[int, int, int | None, int]]:
    """The cells of a row of the map that come to lie in a row.

    Yields (column of windows, first place in the row of its window, first cell in the row of the
    map or None beyond its end, count).
    """
    side, w = windows.side, windows.size[1]
    for column in range(windows.columns):
        cells = (np.arange(side) + column * side + windows.shift) % (windows.columns * side)
        ends = [0, *(np.flatnonzero((np.diff(cells) != 1) | (cells[1:] == w)) + 1), side]
        for first, end in itertools.pairwise(map(int, ends)):
            source = int(cells[first])
            yield column, first, source if source < w else None, end - first


def _forward(windows, dtype, refs, strip, columns):
    heads = len(refs.bias)
    results = []
    for column in columns:
        q, k, v = (
            pltpu.bitcast(cells[column], dtype)
            for cells in (refs.q_cells, refs.k_cells, refs.v_cells)
        )
        bias = _bias(windows, refs, strip, column)
        weights = _weights(_one_by_one(q, heads), k, bias).astype(dtype)
        y = _sum_over_keys(weights, v, heads).astype(dtype)
        results.append(pltpu.bitcast(y, refs.q_cells.dtype))
    for column, y in zip(columns, results, strict=True):
        refs.q_cells[column] = y


def _backward(windows, dtype, refs, strip, columns):
    heads = len(refs.bias)
    results = []
    of_bias = of_padding = 0
    for column in columns:
        q, k, v, of_y = (
            pltpu.bitcast(cells[column], dtype)
            for cells in (refs.q_cells, refs.k_cells, refs.v_cells, refs.of_y_cells)
        )
        queries, of_y = _one_by_one(q, heads), _one_by_one(of_y, heads)
        weights = _weights(queries, k, _bias(windows, refs, strip, column))
        of_weights = _product(v, of_y, 1, 1)
        of_logits = weights * (of_weights - (weights * of_weights).sum(0, keepdims=True))
        of_bias += of_logits
        of_logits = of_logits.astype(dtype)
        of_q = _sum_over_keys(of_logits, k, heads).astype(dtype)
        of_k = _product(of_logits, queries, 1, 0).astype(dtype)
        of_v = _product(weights.astype(dtype), of_y, 1, 0).astype(dtype)
        if windows.padded:
            outside = refs.outside[0, column]
            of_padding += jnp.stack([_product(outside, x, 1, 0) for x in (of_k, of_v)])
        results.append([pltpu.bitcast(x, refs.q_cells.dtype) for x in (of_q, of_k, of_v)])
    refs.of_bias_lanes[...] += of_bias
    if windows.padded:
        refs.of_padding[...] += of_padding
    for column, (of_q, of_k, of_v) in zip(columns, results, strict=True):
        refs.q_cells[column] = of_q
        refs.k_cells[column] = of_k
        refs.v_cells[column] = of_v


def _bias(windows, refs, strip, column) -> jax.Array:
    """What is added to the logits, float32 [n, heads · n]."""
    bias = refs.bias_lanes[...]
    if windows.shift:
        down, across = strip == windows.rows - 1, column == windows.columns - 1
        kind = 2 * jnp.int32(down) + jnp.int32(across)
        bias += jnp.where(refs.keys[kind] == refs.queries[kind], 0.0, APART)
    return bias


def _weights(queries: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
    """Softmax over the keys, float32 [n, heads · n], of `_one_by_one` queries and k [n, 128]."""
    logits = _product(k, queries, 1, 1) + bias
    weights = jnp.exp(logits - logits.max(0, keepdims=True))
    return weights * (1 / weights.sum(0, keepdims=True))


def _product(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Sums over axis `of_a` of a matrix and `of_b` of another, float32."""
    dimensions = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _one_by_one(x: jax.Array, heads: int) -> jax.Array:
    """[n, 128] -> [heads · n, 128]: a copy for each head in which all others' lanes are 0.

    A product with them is one of full registers, and reads the other matrix once for all heads.
    Rows are in the order of `_lanes`.
    """
    # Two rows of bfloat16 as one of integers: vector units of before v6e know no bfloat16.
    bits = pltpu.bitcast(x, jnp.int32)
    lane = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1)
    head = jax.lax.div(lane, LANES // heads)
    full = _in_full_registers(len(x)) * len(bits) // len(x)
    copies = [jnp.where(head == i, bits, 0) for i in range(heads)]
    parts = [c[:full] for c in copies if full] + [c[full:] for c in copies if full < len(bits)]
    return pltpu.bitcast(jnp.concatenate(parts), x.dtype)


def _sum_over_keys(weights: jax.Array, x: jax.Array, heads: int) -> jax.Array:
    """[n, heads · n] and x [n, 128] -> float32 [n, 128], the lanes of each head by its weights.

    It is computed with channels as rows, of which each head's are multiplied alone, so that
    nothing as large as the weights is transposed.
    """
    n, d = len(x), LANES // heads
    full, x = _in_full_registers(n), x.T
    parts = []
    if full:
        own = [
            _product(x[h * d : (h + 1) * d], weights[:, h * full : (h + 1) * full], 1, 0)
            for h in range(heads)
        ]
        parts.append(jnp.concatenate(own).T)
    if rest := n - full:
        y = _product(x, weights[:, heads * full :], 1, 0)
        own = [y[h * d : (h + 1) * d, h * rest : (h + 1) * rest] for h in range(heads)]
        parts.append(jnp.concatenate(own).T)
    return jnp.concatenate(parts)
