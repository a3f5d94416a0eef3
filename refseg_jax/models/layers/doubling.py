"""Bilinear interpolation to twice the size, as a kernel for TPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.depthwise import SAMPLES
from refseg_jax.models.layers.feed_forward import room
from refseg_jax.models.layers.norms import Vectors
from refseg_jax.registers import LANES, traced_once
from refseg_jax.sharding import divides_samples, kernel_places

# A pixel of so many samples and channels fills a register, so its neighbours are whole registers.
# A map of those, with rows of the larger map, may have so many bytes: twice as many fit 16 MiB,
# which the compiler gives a kernel, and a v4 has. Where there is more room twice LARGE_BLOCK fit
# MEMORY.
BLOCK = 29 << 18
LARGE_BLOCK = 23 << 20
MEMORY = 52 << 20
ROWS = 2


def fits_kernel(x: jax.Array, normed: bool = False) -> bool:
    """Whether `double_in_kernel` takes arrays like `x` [B,h,w,C], `normed` with vectors.

    They fill registers, small enough maps, and every device has samples by the eight.
    """
    B, h, w, C = x.shape
    return (
        (x.dtype == jnp.bfloat16 and C % LANES == 0)
        and _block_bytes(h, w, x.dtype, normed) <= (LARGE_BLOCK if room() > 1 else BLOCK)
        and divides_samples(B, SAMPLES)
    )


def rows_at_a_time(h: int) -> int:
    """Of the smaller map."""
    return max(n for n in range(1, ROWS + 1) if h % n == 0)


def _block_bytes(h: int, w: int, dtype: jnp.dtype, normed: bool) -> int:
    maps = 2 if normed else 1  # To which the gradients of a norm need what went in.
    return (maps * h + 4 * rows_at_a_time(h)) * w * SAMPLES * LANES * dtype.itemsize


@jax.custom_vjp
def double_in_kernel(x: jax.Array, vectors: Vectors | None = None) -> jax.Array:
    """[B,h,w,C] -> [B,2h,2w,C] of the same dtype; in float32 inside.

    With `vectors`, float32 [C], x goes through that batch norm and a ReLU first (see norms.py).
    """
    samples, whole = kernel_places()
    places = dict(in_specs=(samples, whole), out_specs=samples, check_vma=False)
    return jax.shard_map(_forward, **places)(x, vectors)


def _double_forward(x, vectors):
    return double_in_kernel(x, vectors), (None, None) if vectors is None else (x, vectors)


def _double_backward(saved, cotangent):
    samples, whole = kernel_places()

    def run(cotangent, x, vectors):
        of_x, *sums = _backward(cotangent, x, vectors)
        return of_x, [jax.lax.psum(s.sum((0, 1)), *samples) for s in sums]

    of_x, sums = jax.shard_map(
        run, in_specs=(samples, samples, whole), out_specs=(samples, whole), check_vma=False
    )(cotangent, *saved)
    if not sums:
        return of_x, None
    _, factor, _ = saved[1]
    of_factor, of_bias = sums
    return of_x, (-factor * of_bias, of_factor, of_bias)


double_in_kernel.defvjp(_double_forward, _double_backward)


def _blocks(h: int, w: int, groups: int, C: int):
    """A grid of samples, channels and rows.

    Blocks of the smaller map, of the larger's rows, of a vector, and of sums by sample.
    """
    rows = rows_at_a_time(h)
    block = (None, SAMPLES, LANES)
    grid = groups, C // LANES, h // rows
    small = pl.BlockSpec((h, w, *block), lambda b, c, i: (0, 0, b, 0, c))
    large = pl.BlockSpec((2 * rows, w, 2, *block), lambda b, c, i: (i, 0, 0, b, 0, c))
    vector = pl.BlockSpec((1, LANES), lambda b, c, i: (0, c))
    total = pl.BlockSpec(block, lambda b, c, i: (b, 0, c))
    return grid, small, large, vector, total


def _options(h: int, w: int, larger: jax.Array, normed: bool) -> dict:
    size = larger.size
    much = _block_bytes(h, w, larger.dtype, normed) > BLOCK
    return dict(
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=MEMORY if much else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * size, bytes_accessed=5 * size // 2, transcendentals=0
        ),
    )


@traced_once()
def _forward(x: jax.Array, vectors: Vectors | None) -> jax.Array:
    B, h, w, C = x.shape
    grid, small, large, vector, _ = _blocks(h, w, B // SAMPLES, C)
    vectors = [v[None] for v in vectors or ()]
    larger = jax.ShapeDtypeStruct((2 * h, w, 2, B // SAMPLES, SAMPLES, C), x.dtype)
    y = pl.pallas_call(
        _forward_kernel,
        name="doubling",
        grid=grid,
        in_specs=[small, *[vector] * len(vectors)],
        out_specs=large,
        out_shape=larger,
        **_options(h, w, larger, False),
    )(by_pixels(x), *vectors)
    return y.reshape(2 * h, 2 * w, B, C).transpose(2, 0, 1, 3)


@traced_once()
def _backward(
    cotangent: jax.Array, x: jax.Array | None, vectors: Vectors | None
) -> list[jax.Array]:
    """The gradient of x, and parts of those of factor and bias, float32 [B/8,8,C]."""
    B, H, W, C = cotangent.shape
    h, w = H // 2, W // 2
    grid, small, large, vector, total = _blocks(h, w, B // SAMPLES, C)
    normed = vectors is not None
    like_total = jax.ShapeDtypeStruct((B // SAMPLES, SAMPLES, C), jnp.float32)
    line = pltpu.VMEM((w, SAMPLES, LANES), jnp.float32)
    of_x, *sums = pl.pallas_call(
        functools.partial(_backward_kernel, grid[2] - 1, normed),
        name="doubling_backward",
        grid=grid,
        in_specs=[large, *([small, vector, vector, vector] if normed else [])],
        out_specs=[small, *[total] * (2 * normed)],
        out_shape=[
            jax.ShapeDtypeStruct((h, w, B // SAMPLES, SAMPLES, C), cotangent.dtype),
            *[like_total] * (2 * normed),
        ],
        scratch_shapes=[line, line],
        **_options(h, w, cotangent, normed),
    )(
        cotangent.transpose(1, 2, 0, 3).reshape(H, w, 2, B // SAMPLES, SAMPLES, C),
        *([by_pixels(x), *(v[None] for v in vectors)] if normed else []),
    )
    return [of_x.reshape(h, w, B, C).transpose(2, 0, 1, 3), *sums]


def by_pixels(x: jax.Array) -> jax.Array:
    """[B,h,w,C] -> [h,w,B/8,8,C], whose pixels are registers."""
    B, h, w, C = x.shape
    return x.transpose(1, 2, 0, 3).reshape(h, w, B // SAMPLES, SAMPLES, C)


def _forward_kernel(x, *refs):
    *vectors, y = refs
    rows, last = len(y) // 2, len(x) - 1
    first = pl.program_id(2) * rows

    def cells(row):
        values = x[row].astype(jnp.float32)
        if not vectors:
            return values
        mean, factor, bias = (v[...] for v in vectors)
        return jnp.maximum((values - mean) * factor + bias, 0.0)

    near = [cells(jnp.clip(first + row, 0, last)) for row in range(-1, rows + 1)]
    for row in range(rows):
        for side in (0, 1):
            line = 0.75 * near[row + 1] + 0.25 * near[row + 2 * side]
            much, little = 0.75 * line, 0.25 * line
            left = jnp.concatenate([little[:1], little[:-1]])
            right = jnp.concatenate([little[1:], little[-1:]])
            y[2 * row + side, :, 0] = (much + left).astype(y.dtype)
            y[2 * row + side, :, 1] = (much + right).astype(y.dtype)


def _backward_kernel(end, normed, cotangent, *refs):
    """In turn: a step gets the line above its own, and the row before, which lacks its first."""
    x, mean, factor, bias = refs[:4] if normed else [None] * 4
    of_x, *sums, before, pending = refs[4:] if normed else refs
    rows, step = len(cotangent) // 2, pl.program_id(2)

    def line(k):
        """What a row of the larger map gives to the columns of the smaller."""
        even, odd = (cotangent[k, :, side].astype(jnp.float32) for side in (0, 1))
        left = jnp.concatenate([even[:1], odd[:-1]])
        right = jnp.concatenate([even[1:], odd[-1:]])
        return 0.75 * (even + odd) + 0.25 * (left + right)

    def finish(row, total):
        if normed:
            of_factor, of_bias = sums
            values = x[row].astype(jnp.float32) - mean[...]
            total = jnp.where(values * factor[...] + bias[...] > 0, total, 0.0)
            of_factor[...] += (total * values).sum(0)
            of_bias[...] += total.sum(0)
            total *= factor[...]
        of_x[row] = total.astype(of_x.dtype)

    lines = [line(k) for k in range(2 * rows)]

    @pl.when(step == 0)
    def _():
        before[...] = lines[0]
        for total in sums:
            total[...] = jnp.zeros_like(total)

    @pl.when(step > 0)
    def _():
        finish(step * rows - 1, pending[...] + 0.25 * lines[0])

    above = before[...]
    for row in range(rows):
        total = 0.75 * (lines[2 * row] + lines[2 * row + 1]) + 0.25 * above
        above = lines[2 * row + 1]
        if row < rows - 1:
            total += 0.25 * lines[2 * row + 2]
            finish(step * rows + row, total)
    pending[...] = total
    before[...] = above

    @pl.when(step == end)
    def _():
        finish(len(of_x) - 1, total + 0.25 * above)
