"""Bilinear interpolation to twice the size, as a kernel for TPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.depthwise import SAMPLES
from refseg_jax.models.layers.feed_forward import room
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


def fits_kernel(x: jax.Array) -> bool:
    """Whether `double_in_kernel` takes arrays like `x` [B,h,w,C].

    They fill registers, small enough maps, and every device has samples by the eight.
    """
    B, h, w, C = x.shape
    return (
        (x.dtype == jnp.bfloat16 and C % LANES == 0)
        and _block_bytes(h, w, x.dtype) <= (LARGE_BLOCK if room() > 1 else BLOCK)
        and divides_samples(B, SAMPLES)
    )


def _rows(h: int) -> int:
    """Of the smaller map, at a time."""
    return max(n for n in range(1, ROWS + 1) if h % n == 0)


def _block_bytes(h: int, w: int, dtype: jnp.dtype) -> int:
    return (h + 4 * _rows(h)) * w * SAMPLES * LANES * dtype.itemsize


@jax.custom_vjp
def double_in_kernel(x: jax.Array) -> jax.Array:
    """[B,h,w,C] -> [B,2h,2w,C] of the same dtype; in float32 inside."""
    return _on_devices(_forward, x)


def _double_forward(x):
    return double_in_kernel(x), None


def _double_backward(_, cotangent):
    return (_on_devices(_backward, cotangent),)


double_in_kernel.defvjp(_double_forward, _double_backward)


def _on_devices(run, x):
    samples, _ = kernel_places()
    return jax.shard_map(run, in_specs=samples, out_specs=samples, check_vma=False)(x)


def _blocks(h: int, w: int, groups: int, C: int):
    """A grid of samples, channels and rows; blocks of the smaller map and of the larger's rows."""
    rows = _rows(h)
    block = (None, SAMPLES, LANES)
    grid = groups, C // LANES, h // rows
    small = pl.BlockSpec((h, w, *block), lambda b, c, i: (0, 0, b, 0, c))
    large = pl.BlockSpec((2 * rows, w, 2, *block), lambda b, c, i: (i, 0, 0, b, 0, c))
    return grid, small, large


def _options(h: int, w: int, larger: jax.Array) -> dict:
    size = larger.size
    return dict(
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=MEMORY if _block_bytes(h, w, larger.dtype) > BLOCK else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=6 * size, bytes_accessed=5 * size // 2, transcendentals=0
        ),
    )


@traced_once()
def _forward(x: jax.Array) -> jax.Array:
    B, h, w, C = x.shape
    grid, small, large = _blocks(h, w, B // SAMPLES, C)
    larger = jax.ShapeDtypeStruct((2 * h, w, 2, B // SAMPLES, SAMPLES, C), x.dtype)
    y = pl.pallas_call(
        _forward_kernel,
        name="doubling",
        grid=grid,
        in_specs=[small],
        out_specs=large,
        out_shape=larger,
        **_options(h, w, larger),
    )(x.transpose(1, 2, 0, 3).reshape(h, w, B // SAMPLES, SAMPLES, C))
    return y.reshape(2 * h, 2 * w, B, C).transpose(2, 0, 1, 3)


@traced_once()
def _backward(cotangent: jax.Array) -> jax.Array:
    B, H, W, C = cotangent.shape
    h, w = H // 2, W // 2
    grid, small, large = _blocks(h, w, B // SAMPLES, C)
    line = pltpu.VMEM((w, SAMPLES, LANES), jnp.float32)
    of_x = pl.pallas_call(
        functools.partial(_backward_kernel, grid[2] - 1),
        name="doubling_backward",
        grid=grid,
        in_specs=[large],
        out_specs=small,
        out_shape=jax.ShapeDtypeStruct((h, w, B // SAMPLES, SAMPLES, C), cotangent.dtype),
        scratch_shapes=[line, line],
        **_options(h, w, cotangent),
    )(cotangent.transpose(1, 2, 0, 3).reshape(H, w, 2, B // SAMPLES, SAMPLES, C))
    return of_x.reshape(h, w, B, C).transpose(2, 0, 1, 3)


def _forward_kernel(x, y):
    rows, last = len(y) // 2, len(x) - 1
    first = pl.program_id(2) * rows
    for row in range(rows):
        i = first + row
        here = x[i].astype(jnp.float32)
        for side, other in enumerate((jnp.maximum(i - 1, 0), jnp.minimum(i + 1, last))):
            line = 0.75 * here + 0.25 * x[other].astype(jnp.float32)
            much, little = 0.75 * line, 0.25 * line
            left = jnp.concatenate([little[:1], little[:-1]])
            right = jnp.concatenate([little[1:], little[-1:]])
            y[2 * row + side, :, 0] = (much + left).astype(y.dtype)
            y[2 * row + side, :, 1] = (much + right).astype(y.dtype)


def _backward_kernel(end, cotangent, of_x, before, pending):
    """In turn: a step gets the line above its own, and the row before, which lacks its first."""
    rows, step = len(cotangent) // 2, pl.program_id(2)

    def line(k):
        """What a row of the larger map gives to the columns of the smaller."""
        even, odd = (cotangent[k, :, side].astype(jnp.float32) for side in (0, 1))
        left = jnp.concatenate([even[:1], odd[:-1]])
        right = jnp.concatenate([even[1:], odd[-1:]])
        return 0.75 * (even + odd) + 0.25 * (left + right)

    lines = [line(k) for k in range(2 * rows)]

    @pl.when(step == 0)
    def _():
        before[...] = lines[0]

    @pl.when(step > 0)
    def _():
        of_x[step * rows - 1] = (pending[...] + 0.25 * lines[0]).astype(of_x.dtype)

    above = before[...]
    for row in range(rows):
        total = 0.75 * (lines[2 * row] + lines[2 * row + 1]) + 0.25 * above
        above = lines[2 * row + 1]
        if row < rows - 1:
            total += 0.25 * lines[2 * row + 2]
            of_x[step * rows + row] = total.astype(of_x.dtype)
    pending[...] = total
    before[...] = above

    @pl.when(step == end)
    def _():
        of_x[len(of_x) - 1] = (total + 0.25 * above).astype(of_x.dtype)
