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

from refseg_jax.models.layers.window_strip import Strip, lanes_of
from refseg_jax.models.layers.windows import Windows
from refseg_jax.registers import LANES, traced_once
from refseg_jax.sharding import divides_samples, kernel_places

# The kernel takes as many heads at a time as fill the lanes of a register, and a strip of the map
# as high as a window, whose cells it moves into windows by itself: XLA would take longer for it.
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


def _memory(windows: Windows, heads: int) -> int:
    """Bytes that the backward pass takes at most, with so many heads at a time.

    Counted from what the compiler says of maps that are too wide: 18 to 19 strips, biases and their
    gradients, two of each and once more as logits lie, and what does not fit the registers.
    """
    n = windows.side**2
    strip = windows.columns * n * LANES * 2
    whole = heads * n * (n + -n % LANES) * 4
    logits = heads * n * n * 4
    return 20 * strip + 4 * whole + 7 * logits


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
        queries = np.concatenate([regions[:, None, part] for _, part, _ in lanes_of(n, heads)], -1)
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
        scratch |= {f"{name}_kept": upper for name in names}
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


def _regions_of_kinds(windows: Windows) -> np.ndarray:
    """The regions of a window that is cut as 2 · downwards + across says, int32 [4, side²]."""
    beyond = np.int32(np.arange(windows.side) >= windows.side - windows.shift)
    kinds = [2 * y * beyond[:, None] + x * beyond for y in (0, 1) for x in (0, 1)]
    return np.stack(kinds).reshape(4, -1)


def _kernel(windows: Windows, dtype: jnp.dtype, names: tuple[str, ...], *refs: Any) -> None:
    """One step of the grid."""
    refs = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    step, steps = pl.program_id(2), _Steps(windows)
    strip = Strip(windows, dtype, refs, steps.read(step), steps.computed(step))
    side, shift, rows = windows.side, windows.shift, windows.rows
    sample = pl.program_id(1)

    @pl.when((sample == 0) & (step == 0))
    def _():
        strip.begin_group()

    if not shift:
        strip.read(0, side, 0)
        strip.compute()
        strip.write(0, side, 0)
    else:

        @pl.when(step >= 2)
        def _():
            strip.write(0, shift, side - shift)

        @pl.when((step >= 1) & (step <= rows))
        def _():
            strip.read(0, shift, side - shift)
            strip.compute()

        @pl.when(step == 1)
        def _():
            strip.keep()

        @pl.when((step >= 2) & (step <= rows))
        def _():
            strip.write(shift, side, 0)

        @pl.when(step == rows + 1)
        def _():
            strip.write(shift, side, 0, kept=True)

        @pl.when(step <= rows)
        def _():
            strip.read(shift, side, 0)

    @pl.when((sample == pl.num_programs(1) - 1) & (step == len(steps) - 1))
    def _():
        strip.end_group()
