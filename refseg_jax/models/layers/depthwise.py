"""Convolution of each channel by itself: as each platform does it best, on TPUs in a kernel."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.dense import add_bias
from refseg_jax.registers import LANES, traced_once
from refseg_jax.sharding import divides_samples, kernel_places


class DepthwiseConv(nn.Module):
    """Convolution of each channel by itself: [B,h,w,C] -> same, with zeros around the map.

    Parameters `kernel` [size,size,1,C], `bias` [C], as those of `nn.Conv` with C groups. `size`,
    the side of the window, is odd.
    """

    size: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, 1, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:])
        return depthwise_conv(x.astype(self.dtype), kernel[:, :, 0], bias)


def depthwise_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Each channel of `x` [B,h,w,C] by its own of `kernel` [size,size,C], plus `bias` [C].

    Same shape and dtype as `x`. XLA's grouped convolution takes a CPU many times as long as what
    it comes to, and a TPU three times as long; see `fits_kernel` for where the latter has a kernel.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        bias,
        cpu=shifted_conv,
        tpu=convolve_in_kernel if fits_kernel(x) else grouped_conv,
        default=grouped_conv,
    )


def grouped_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`depthwise_conv` as the primitive that accelerators have."""
    y = jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )
    return add_bias(y, bias)


def shifted_conv(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`depthwise_conv` as the sum over the window's cells of the map, shifted and scaled."""
    return add_bias(_sum_of_shifted(x, kernel), bias)


def _around(x: jax.Array, size: int) -> jax.Array:
    """The map with the zeros that a window of `size` sees around it."""
    edge = (size // 2, size // 2)
    return jnp.pad(x, ((0, 0), edge, edge, (0, 0)))


@jax.custom_vjp
def _sum_of_shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    (_, h, w, _), size = x.shape, len(kernel)
    x = _around(x, size)
    cells = [(i, j) for i in range(size) for j in range(size)]
    return sum(x[:, i : i + h, j : j + w] * kernel[i, j] for i, j in cells)


def _shifted_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return _sum_of_shifted(x, kernel), (x, kernel)


def _shifted_backward(saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    size, around = len(kernel), _around(x, len(kernel))

    def of_cell(cell: jax.Array) -> jax.Array:
        corner = (0, cell // size, cell % size, 0)
        return (jax.lax.dynamic_slice(around, corner, x.shape) * cotangent).sum((0, 1, 2))

    # In a loop, as XLA makes one slow fusion of all cells otherwise.
    of_kernel = jax.lax.map(of_cell, jnp.arange(size * size)).reshape(kernel.shape)
    return _sum_of_shifted(cotangent, kernel[::-1, ::-1]), of_kernel


_sum_of_shifted.defvjp(_shifted_forward, _shifted_backward)


# The kernel. A pixel of so many samples and channels fills a register, so its neighbours are whole
# registers too, and nothing is moved inside of one.
SAMPLES = 8
BLOCK = 6 * 2**20  # Bytes of a map of those; two and the results fit into the memory of any TPU.
ROWS, COLUMNS = 4, 18  # What is unrolled of it at a time.


def fits_kernel(x: jax.Array) -> bool:
    """Whether `convolve_in_kernel` takes arrays like `x` [B,h,w,C].

    They fill registers, small enough maps, and every device has samples by the eight.
    """
    B, h, w, C = x.shape
    return (
        (x.dtype == jnp.bfloat16 and C % LANES == 0)
        and (h * w * SAMPLES * LANES * x.dtype.itemsize <= BLOCK)
        and divides_samples(B, SAMPLES)
    )


@jax.custom_vjp
def convolve_in_kernel(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`depthwise_conv` as a kernel for TPUs of arrays that `fits_kernel`; adds up in float32."""
    samples, whole = kernel_places()
    run = jax.shard_map(
        _convolve, in_specs=(samples, whole, whole), out_specs=samples, check_vma=False
    )
    return run(x, kernel, bias)


def _in_kernel_forward(x, kernel, bias):
    return convolve_in_kernel(x, kernel, bias), (x, kernel, bias)


def _in_kernel_backward(saved, cotangent):
    x, kernel, bias = saved
    samples, whole = kernel_places()

    def run(x, cotangent):
        return jax.lax.psum(_gradients(x, cotangent, len(kernel)), *samples)

    of_kernel, of_bias = jax.shard_map(
        run, in_specs=(samples, samples), out_specs=whole, check_vma=False
    )(x, cotangent)
    of_x = convolve_in_kernel(cotangent, kernel[::-1, ::-1], jnp.zeros_like(bias))
    return of_x, of_kernel.astype(kernel.dtype), of_bias.astype(bias.dtype)


convolve_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


def _by_pixels(x: jax.Array) -> jax.Array:
    """[B,h,w,C] -> [h,w,B/8,8,C]: on a TPU, how convolutions' results lie already."""
    B, h, w, C = x.shape
    return x.transpose(1, 2, 0, 3).reshape(h, w, B // SAMPLES, SAMPLES, C)


def _blocks(x: jax.Array) -> tuple[tuple[int, int, int], pl.BlockSpec, pl.BlockSpec]:
    """For x [h,w,B/8,8,C]: a grid of samples, channels and rows; a whole map's block; its rows'."""
    h, w, groups, _, C = x.shape
    rows = max(n for n in range(1, ROWS + 1) if h % n == 0)
    block = (w, None, SAMPLES, LANES)
    return (
        (groups, C // LANES, h // rows),
        pl.BlockSpec((h, *block), lambda b, c, i: (0, 0, b, 0, c)),
        pl.BlockSpec((rows, *block), lambda b, c, i: (i, 0, b, 0, c)),
    )


_IN_TURN = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


@traced_once()
def _convolve(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    B, h, w, C = x.shape
    x = _by_pixels(x)
    grid, whole, rows = _blocks(x)
    # The kernel's cells one after another, then the bias.
    weights = jnp.concatenate([kernel.reshape(-1, C), bias[None]]).astype(jnp.float32)
    weights = jnp.broadcast_to(weights[:, None], (len(weights), SAMPLES, C))
    y = pl.pallas_call(
        functools.partial(_forward_kernel, len(kernel)),
        name="depthwise",
        grid=grid,
        in_specs=[whole, pl.BlockSpec((len(weights), SAMPLES, LANES), lambda b, c, i: (0, 0, c))],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=_IN_TURN,
        cost_estimate=_cost(x, len(kernel)),
    )(x, weights)
    return y.reshape(h, w, B, C).transpose(2, 0, 1, 3)


@traced_once(2)
def _gradients(x: jax.Array, cotangent: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Of x, cotangent [B,h,w,C]: the kernel's, float32 [size,size,C], and the bias's, [C]."""
    C, cells = x.shape[-1], size**2
    x, cotangent = _by_pixels(x), _by_pixels(cotangent)
    grid, whole, rows = _blocks(x)
    sums = pl.pallas_call(
        functools.partial(_backward_kernel, size),
        name="depthwise_backward",
        grid=grid,
        in_specs=[whole, rows],
        # The same block for all rows of a map: it is added up to.
        out_specs=pl.BlockSpec((None, cells + 1, SAMPLES, LANES), lambda b, c, i: (b, 0, 0, c)),
        out_shape=jax.ShapeDtypeStruct((grid[0], cells + 1, SAMPLES, C), jnp.float32),
        compiler_params=_IN_TURN,
        cost_estimate=_cost(x, size),
    )(x, cotangent)
    sums = sums.sum((0, 2))
    return sums[:cells].reshape(size, size, C), sums[cells]


def _cost(x: jax.Array, size: int) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * size**2 * x.size, bytes_accessed=2 * x.size * x.dtype.itemsize, transcendentals=0
    )


def _forward_kernel(size: int, x, weights, y):
    for row, (start, stop) in itertools.product(range(len(y)), _runs(x.shape[1])):
        total = jnp.broadcast_to(weights[size**2], (stop - start, SAMPLES, LANES))
        for i in range(size):
            line, inside = _line(x, len(y), row + i - size // 2, start, stop, size)
            for j in range(size):
                total += line[j : j + stop - start] * (weights[i * size + j] * inside)
        y[row, start:stop] = total.astype(y.dtype)


def _backward_kernel(size: int, x, cotangent, sums):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    rows = len(cotangent)
    for i in range(size):
        of_kernel = [jnp.zeros((SAMPLES, LANES), jnp.float32)] * size
        of_bias = 0
        for row, (start, stop) in itertools.product(range(rows), _runs(x.shape[1])):
            line, inside = _line(x, rows, row + i - size // 2, start, stop, size)
            of_y = cotangent[row, start:stop].astype(jnp.float32)
            of_bias += of_y.sum(0)
            for j in range(size):
                of_kernel[j] += (line[j : j + stop - start] * of_y).sum(0) * inside
        for j in range(size):
            sums[i * size + j] += of_kernel[j]
    sums[size**2] += of_bias


def _runs(w: int) -> list[tuple[int, int]]:
    """The columns of a row in equal parts, of which sums and what goes into them fill registers."""
    step = -(-w // -(-w // COLUMNS))
    return [(start, min(start + step, w)) for start in range(0, w, step)]


def _line(x, rows: int, row: int, start: int, stop: int, size: int) -> tuple[jax.Array, jax.Array]:
    """What a window of `size` that goes from column `start` to `stop` sees of a row of the map.

    `row` counts from the first of the `rows` at hand. Returns float32 [stop-start+size-1,8,128],
    with zeros beyond the columns' ends, and 1.0, or 0.0 where there is no such row.
    """
    h, w = x.shape[:2]
    row += pl.program_id(2) * rows
    left, right = start - size // 2, stop + size // 2
    line = x[jnp.clip(row, 0, h - 1), max(left, 0) : min(right, w)].astype(jnp.float32)
    line = jnp.pad(line, ((max(-left, 0), max(right - w, 0)), (0, 0), (0, 0)))
    return line, ((row >= 0) & (row < h)).astype(jnp.float32)
