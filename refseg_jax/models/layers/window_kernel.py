"""Attention inside windows of a map as a kernel of our own for TPUs: how it goes over the map."""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.window_strip import Strip, kinds_of, lanes_of
from refseg_jax.models.layers.windows import Windows
from refseg_jax.registers import LANES, traced_once
from refseg_jax.sharding import divides_samples, kernel_places

# The kernel takes as many heads at a time as fill the lanes of a register, and a strip of the map
# as high as a window, or all strips of a small map, whose cells it moves into windows by itself:
# XLA would take longer for it.
MEMORY = 16 << 20  # Bytes, of a v4.


def fits_kernel(q: jax.Array, heads: int, windows: Windows) -> bool:
    """Whether `attend_in_kernel` takes arrays like `q` [B,h·w,C].

    They fill registers, what is computed of a window and the strips of a map that are at hand fit a
    chip's vector memory, and every device has whole samples.
    """
    B, _, C = q.shape
    return (
        (q.dtype == jnp.bfloat16 and windows.side % 4 == 0 and windows.shift % 2 == 0)
        and (C % LANES == 0 and LANES % (C // heads) == 0)
        and _memory(windows, LANES * heads // C) <= MEMORY
        and divides_samples(B)
    )


def _memory(windows: Windows, heads: int, strips: int = 1) -> int:
    """Bytes that the backward pass takes at most, with so many heads and strips at a time.

    Counted from what the compiler says of maps that are too wide: 18 to 19 strips, biases and their
    gradients, two of each and once more as logits lie, of all queries and of fewer, and what does
    not fit the registers.
    """
    n, few = windows.side**2, _pick_few(windows).shape[1]
    strip = windows.columns * n * LANES * 2
    whole, whole_few = (heads * n * (lanes + -lanes % LANES) * 4 for lanes in (n, few))
    logits, logits_few = (heads * n * lanes * 4 for lanes in (n, few))
    return 20 * strips * strip + 4 * (whole + whole_few) + 7 * logits + 2 * logits_few


def _at_once(windows: Windows, heads: int) -> bool:
    """Whether a step has the whole of a small map, in place of a strip."""
    return windows.rows <= 3 and _memory(windows, heads, windows.rows) <= MEMORY


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


@traced_once(0, 1)
def _run(
    backward: bool,
    windows: Windows,
    arrays: tuple[jax.Array, ...],
    padding: jax.Array,
    bias: jax.Array,
) -> Any:
    """The kernel for every group of heads, sample and strip, the last two one after another."""
    B, _, C = arrays[0].shape
    (h, w), side, n = windows.size, windows.side, windows.side**2
    dtype, packed = arrays[0].dtype, 4 // arrays[0].dtype.itemsize
    heads = len(bias) * LANES // C
    steps, at_once = _Steps(windows), _at_once(windows, heads)

    def strip(which: Callable) -> pl.BlockSpec:
        if at_once:
            return pl.BlockSpec((1, h * w, LANES), lambda g, b, i: (b, 0, g))
        return pl.BlockSpec((1, side * w, LANES), lambda g, b, i: (b, which(i), g))

    # The same block for all strips: it is read and written once.
    cells = ("q", "k", "v", "of_y")[: len(arrays)]
    inputs = {name: (x, strip(steps.read)) for name, x in zip(cells, arrays, strict=True)}
    if windows.padded:
        rows = jnp.broadcast_to(padding[:, None], (2, side, C))
        inputs["padding"] = rows, pl.BlockSpec((2, side, LANES), lambda g, b, i: (0, 0, g))
    inputs["bias"] = bias, pl.BlockSpec((heads, n, n), lambda g, b, i: (g, 0, 0))
    kinds, pick = kinds_of(windows), _pick_few(windows)
    if pick.size:
        few = jnp.matmul(bias, pick, precision=jax.lax.Precision.HIGHEST)
        block = pl.BlockSpec((heads, *few.shape[1:]), lambda g, b, i: (g, 0, 0))
        inputs["bias_few"] = few, block
    if windows.shift:
        keys = np.stack([kind.regions() for kind in kinds], -1)
        queries = np.zeros((len(kinds), heads * n), np.int32)
        for number, kind in enumerate(kinds):
            of_queries = keys[kind.queries(), number]
            for _, some, lanes in lanes_of(of_queries.size, heads):
                queries[number, lanes] = of_queries[some]
        for name, x in ("keys", keys), ("queries", queries):
            inputs[name] = jnp.asarray(x), pl.BlockSpec(x.shape, lambda g, b, i: (0, 0))
    if windows.padded and backward:
        outside = windows.cells().reshape(windows.rows, windows.columns, 1, n) < 0
        outside = jnp.broadcast_to(jnp.asarray(outside, dtype), (*outside.shape[:2], 8, n))
        if at_once:
            block = pl.BlockSpec(outside.shape, lambda g, b, i: (0, 0, 0, 0))
        else:
            block = 1, *outside.shape[1:]
            block = pl.BlockSpec(block, lambda g, b, i: (steps.computed(i), 0, 0, 0))
        inputs["outside"] = outside, block
    like_x = jax.ShapeDtypeStruct(arrays[0].shape, dtype)
    names = ("of_q", "of_k", "of_v") if backward else ("y",)
    outputs = {name: (like_x, strip(steps.written)) for name in names}
    if backward:
        for name in ("bias", "bias_few") if pick.size else ("bias",):
            x, block = inputs[name]
            outputs[f"of_{name}"] = jax.ShapeDtypeStruct(x.shape, x.dtype), block
        if windows.padded:
            like_padding = jax.ShapeDtypeStruct((2, 8, C), jnp.float32)
            block = pl.BlockSpec((2, 8, LANES), lambda g, b, i: (0, 0, g))
            outputs["of_padding"] = like_padding, block
    of_rows = jnp.int32 if packed > 1 else dtype
    rows = windows.rows if at_once else 1
    in_windows = pltpu.VMEM((rows, windows.columns, n // packed, LANES), of_rows)
    scratch = {f"{name}_cells": in_windows for name in cells}
    for number, kind in enumerate(kinds):
        lanes = pltpu.VMEM((n, heads * kind.queries().size), jnp.float32)
        for name in ("bias", "of_bias") if backward else ("bias",):
            if number == 0 or not kind.whole:
                scratch[f"{name}_lanes{number}"] = lanes
    if windows.shift and not at_once:
        upper = (side - windows.shift) * side // packed
        upper = pltpu.VMEM((1, windows.columns, upper, LANES), of_rows)
        scratch |= {f"{name}_kept": upper for name in names}
    refs = (*inputs, *outputs, *scratch)
    results = pl.pallas_call(
        functools.partial(_kernel, windows, dtype, at_once, refs),
        name="window_attention_backward" if backward else "window_attention",
        grid=(C // LANES, B, 1 if at_once else len(steps)),
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
    of_bias = results["of_bias"]
    if pick.size:
        few = results["of_bias_few"]
        of_bias += jnp.matmul(few, pick.T, precision=jax.lax.Precision.HIGHEST)
    return *(results[name] for name in names), of_padding, of_bias


@functools.cache
def _pick_few(windows: Windows) -> np.ndarray:
    """Ones of [side², queries]: which cells ask in the kinds of windows where not all do."""
    cells = [kind.queries() for kind in kinds_of(windows) if not kind.whole]
    return np.eye(windows.side**2, dtype=np.float32)[:, np.concatenate([[], *cells]).astype(int)]


def _kernel(
    windows: Windows, dtype: jnp.dtype, at_once: bool, names: tuple[str, ...], *refs: Any
) -> None:
    """One step of the grid."""
    strip = Strip(windows, dtype, SimpleNamespace(**dict(zip(names, refs, strict=True))))
    sample, step = pl.program_id(1), pl.program_id(2)

    @pl.when((sample == 0) & (step == 0))
    def _():
        strip.begin_group()

    if at_once:
        _whole_map(strip)
    else:
        _strip_by_strip(strip, step)

    @pl.when((sample == pl.num_programs(1) - 1) & (step == pl.num_programs(2) - 1))
    def _():
        strip.end_group()


def _whole_map(strip: Strip) -> None:
    """All rows of windows in one step: none waits for the one before."""
    side, shift, last = strip.windows.side, strip.windows.shift, strip.windows.rows - 1
    for row in range(last + 1):
        below = (row + 1) % (last + 1)
        # (from and up to which row of a strip, the windows' row where these begin, whether it is
        # the map's last strip, its number)
        parts = [(shift, side, 0, row == last, row)]
        if shift:
            parts.append((0, shift, side - shift, below == last, below))
        windows = dataclasses.replace(strip, row=row)
        for part in parts:
            windows.read(*part)
        windows.compute(row == last)
        for part in parts:
            windows.write(*part)


def _strip_by_strip(strip: Strip, step: jax.Array) -> None:
    side, shift, rows = strip.windows.side, strip.windows.shift, strip.windows.rows

    def unshifted(end: bool) -> None:
        strip.read(0, side, 0, end)
        strip.compute(end)
        strip.write(0, side, 0, end)

    def shifted(end: bool) -> None:
        strip.write(0, shift, side - shift, False)
        strip.read(0, shift, side - shift, end)
        strip.compute(False)
        strip.write(shift, side, 0, False)
        strip.read(shift, side, 0, end)

    def first() -> None:
        strip.read(0, shift, side - shift, rows == 1)
        strip.compute(True)
        strip.keep()
        strip.read(shift, side, 0, rows == 1)

    def last() -> None:
        strip.write(0, shift, side - shift, True)
        strip.write(shift, side, 0, True, kept=True)

    # From one step up to another: without branches in them, what can be done at once is.
    below = strip.windows.size[0] % side > 0
    if shift:
        end = max(rows + (not below), 2)
        cases = [
            (0, 1, lambda: strip.read(shift, side, 0, True)),
            (1, 2, first),
            (2, end, lambda: shifted(False)),
            (end, rows + 1, lambda: shifted(True)),
            (rows + 1, rows + 2, last),
        ]
    else:
        end = rows - below
        cases = [(0, end, lambda: unshifted(False)), (end, rows, lambda: unshifted(True))]
    for start, stop, action in cases:
        if start < stop:
            pl.when((start <= step) & (step < stop))(action)
