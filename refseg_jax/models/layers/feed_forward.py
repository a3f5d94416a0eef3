"""The feed-forward half of a pre-norm block: in XLA's operations, and as a kernel for TPUs."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.activations import gelu
from refseg_jax.models.layers.dense import add_bias
from refseg_jax.models.layers.layer_norm import gradient, layer_norm, normalize, standardize
from refseg_jax.registers import LANES, product, traced_once
from refseg_jax.sharding import divides_samples, kernel_places, on_tpus

EPSILON = 1e-5  # Of the norm.

# A step takes a block of one sample's rows, and WIDTH of the H hidden units. MOST_NUMBERS bounds
# rows times WIDTH: few enough to compile fast, and enough that loading the weights into the matrix
# units again for each block costs little. With weights of MOST_CHANNELS and 4 times as many, and
# with their gradients, it fits the 16 MiB that the compiler gives a kernel, and that a v4 has.
# Other TPUs have LARGE bytes at least: there twice as many rows still fit those, and twice as many
# rows and channels fit MEMORY. With more channels XLA is as fast: what lies between the layers
# grows with them, the products with their square.
WIDTH = 512
MOST_NUMBERS = 29 << 13
MOST_CHANNELS = 256
MEMORY = 48 << 20
LARGE = 64 << 20

# tanh(x p(x²)) is erf(x / √2), so that 1/2 x (1 + tanh(x p(x²))) is GELU, to 3e-5, and its
# derivative to 1.2e-4: bfloat16 has 4e-3 of a number. A TPU has an instruction for tanh; for erf
# it computes longer than for the products. Beyond |x| = 5 p stays what it is there.
P = (7.97506586e-1, 3.70068271e-2, -3.51708640e-4)
END = 25.0


def feed_forward(
    x: jax.Array,
    kept: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    fc1: tuple[jax.Array, jax.Array],
    fc2: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """x + kept * fc2(gelu(fc1(norm(x)))): [B, ..., C] -> same shape and dtype.

    `norm` is a layer norm with `scale`, `bias` [C]; `fc1` and `fc2` are kernel [C, H] and bias [H],
    kernel [H, C] and bias [C]; all of them float32. `kept` [B, 1, ...], float32, is what stochastic
    depth multiplies a sample's layers by; its gradient is not taken.

    On a TPU, bfloat16 rows of few channels go through a kernel, in which nothing between x and the
    result leaves the chip, and which computes all of it again for the gradients: XLA writes what
    lies between the layers to memory, and reads it again (docs/scale.md).
    """
    operands = (x, kept, scale, bias, *fc1, *fc2)
    if fits_kernel(x, fc1[0].shape[1]):
        default = functools.partial(feed, norm=normalize)
        return jax.lax.platform_dependent(*operands, tpu=feed_in_kernel, default=default)
    return feed(*operands)


def feed(x, kept, scale, bias, w1, b1, w2, b2, norm=layer_norm):
    """`feed_forward` in XLA's operations."""
    x, y = norm(x, scale, bias, EPSILON, True)
    y = gelu(add_bias(y @ w1.astype(x.dtype), b1))
    y = add_bias(y @ w2.astype(x.dtype), b2)
    return x + (kept * y).astype(x.dtype)


def gelu_by_tanh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GELU of float32 numbers, to 3e-5, and its derivative, to 1.2e-4."""
    square = jnp.minimum(x * x, END)
    p = (P[2] * square + P[1]) * square + P[0]
    slope = (5 * P[2] * square + 3 * P[1]) * square + P[0]
    t, half = jnp.tanh(x * p), 0.5 * x
    return half + half * t, 0.5 + 0.5 * t + half * (1 - t * t) * slope


def fits_kernel(x: jax.Array, hidden: int) -> bool:
    """Whether `feed_in_kernel` takes arrays like `x` [B, ..., C] with `hidden` numbers in between.

    Rows fill registers but have few channels, blocks of rows have no rest, and every device has
    whole samples.
    """
    n, channels = math.prod(x.shape[1:-1]), x.shape[-1]
    fills = x.dtype == jnp.bfloat16 and channels % LANES == hidden % LANES == 0
    if not fills or not divides_samples(x.shape[0]):
        return False
    most = MOST_CHANNELS * room()
    few = channels <= most and channels * hidden <= 4 * most**2
    return few and rows_of_block(n) >= min(n, LANES)


def room() -> int:
    """How many times what a v4 has room for."""
    return 2 if on_tpus() and pltpu.get_tpu_info().vmem_capacity_bytes >= LARGE else 1


def rows_of_block(n: int) -> int:
    """Of a block: a sample's `n`, or the most that divide them, in whole tiles; 0 for none."""
    most = MOST_NUMBERS * room() // WIDTH
    if n <= most:
        return n
    return max((rows for rows in range(16, most + 1, 16) if n % rows == 0), default=0)


def _width(hidden: int) -> int:
    """How many of the numbers between the layers a kernel has at a time."""
    return math.gcd(hidden, WIDTH)


@jax.custom_vjp
def feed_in_kernel(x, kept, scale, bias, w1, b1, w2, b2):
    """`feed_forward` as a kernel for TPUs of arrays that `fits_kernel`."""
    samples, whole = kernel_places()
    run = jax.shard_map(
        _forward,
        in_specs=(samples, samples, *[whole] * 6),
        out_specs=samples,
        check_vma=False,
    )
    return run(x, kept, scale, bias, w1, b1, w2, b2)


def _in_kernel_forward(*operands):
    return feed_in_kernel(*operands), operands


def _in_kernel_backward(saved, cotangent):
    x, *operands, _ = saved
    samples, whole = kernel_places()
    of_x, *sums = jax.shard_map(
        _backward,
        in_specs=(*[samples] * 3, *[whole] * 5),
        out_specs=samples,
        check_vma=False,
    )(x, cotangent, *operands)
    of_scale, of_bias, of_w1, of_b1, of_w2_t, of_b2 = (jax.lax.reduce_sum(s, (0,)) for s in sums)
    of_parameters = of_scale, of_bias, of_w1, of_b1, of_w2_t.T, of_b2
    of_parameters = (
        of_it.reshape(parameter.shape).astype(parameter.dtype)
        for of_it, parameter in zip(of_parameters, saved[2:], strict=True)
    )
    return of_x, jnp.zeros_like(saved[1]), *of_parameters


feed_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


def specs(B: int, n: int):
    """A grid (parts of the samples, all blocks of rows of one), and where its steps find blocks.

    Functions of their last axes: of rows [B, n, C], of what a sample has [B, 1, C], of what all
    have in common [a, b], and of sums [parts, a, b].
    """
    parts = _parts(B)
    rows = rows_of_block(n)
    grid = parts, B // parts * (n // rows)

    def sample(i, j):
        return i * (B // parts) + j // (n // rows)

    def block(C):
        return pl.BlockSpec((1, rows, C), lambda i, j: (sample(i, j), j % (n // rows), 0))

    def factor(C):
        return pl.BlockSpec((1, 1, C), lambda i, j: (sample(i, j), 0, 0))

    def common(*shape):
        return pl.BlockSpec(shape, lambda i, j: (0, 0))

    def total(*shape):
        return pl.BlockSpec((1, *shape), lambda i, j: (i, 0, 0))

    return grid, block, factor, common, total


def _cores() -> int:
    """Of a chip."""
    return pltpu.get_tpu_info().num_cores if on_tpus() else 2


def _parts(B: int) -> int:
    """Of the samples, for a chip's cores."""
    return math.gcd(B, _cores())


def _options(
    x: jax.Array, block: pl.BlockSpec, hidden: int, arrays: int, products: int, sums: int = 0
) -> dict:
    """How a kernel of so many `arrays` like `x` and `products` of it with `hidden` is called.

    It gets room for float32 rows of a block, and for `sums` of [C, hidden].
    """
    C = x.shape[-1]
    # On a v5p, without optimisation, twice as many rows take a little more than 16 MiB, too.
    more = C > MOST_CHANNELS or room() == _cores() == 2
    return dict(
        scratch_shapes=[
            pltpu.VMEM(shape, jnp.float32)
            for shape in (block.block_shape[1:], *[(C, hidden)] * sums)
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=MEMORY if more else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * x.size * hidden,
            bytes_accessed=arrays * x.size * x.dtype.itemsize,
            transcendentals=x.size // C * hidden,
        ),
    )


@traced_once()
def _forward(x, kept, scale, bias, w1, b1, w2, b2):
    """Of the samples of one device."""
    C, hidden = w1.shape
    rows = x.reshape(len(x), -1, C)
    grid, block, factor, common, _ = specs(*rows.shape[:2])
    block, factor = block(C), factor(C)
    vectors = common(1, C), common(1, hidden)
    y = pl.pallas_call(
        _forward_kernel,
        name="feed_forward",
        grid=grid,
        in_specs=[
            *(block, factor, vectors[0], vectors[0]),
            *(common(C, hidden), vectors[1], common(hidden, C), vectors[0]),
        ],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(rows.shape, x.dtype),
        **_options(x, block, hidden, 2, 2),
    )(rows, _factor(kept, C), scale[None], bias[None], w1, b1[None], w2, b2[None])
    return y.reshape(x.shape)


@traced_once()
def _backward(x, cotangent, kept, scale, bias, w1, b1, w2):
    """(of x, sums of scale, bias, w1, b1, w2.T, b2), of the samples of one device.

    The sums are [parts, rows, columns]: vectors float32, as a single row, and matrices in the dtype
    of `x`, in which devices add them up as they do those of XLA's products.
    """
    C, hidden = w1.shape
    rows = x.reshape(len(x), -1, C)
    grid, block, factor, common, total = specs(*rows.shape[:2])
    block, factor = block(C), factor(C)
    shapes = [(1, C), (1, C), (C, hidden), (1, hidden), (C, hidden), (1, C)]
    dtypes = [x.dtype if a > 1 else jnp.float32 for a, _ in shapes]
    of_x, *sums = pl.pallas_call(
        functools.partial(_backward_kernel, grid[1] - 1),
        name="feed_forward_backward",
        grid=grid,
        in_specs=[
            *(block, block, factor, common(1, C), common(1, C)),
            *(common(C, hidden), common(1, hidden), common(hidden, C)),
        ],
        out_specs=[block, *(total(*shape) for shape in shapes)],
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, x.dtype),
            *(
                jax.ShapeDtypeStruct((grid[0], *shape), dtype)
                for shape, dtype in zip(shapes, dtypes, strict=True)
            ),
        ],
        **_options(x, block, hidden, 3, 5, sums=2),
    )(
        *(rows, cotangent.reshape(rows.shape), _factor(kept, C), scale[None], bias[None]),
        *(w1, b1[None], w2),
    )
    return of_x.reshape(x.shape), *sums


def _factor(kept: jax.Array, C: int) -> jax.Array:
    return jnp.broadcast_to(kept.reshape(-1, 1, 1), (len(kept), 1, C))


def _forward_kernel(x, kept, scale, bias, w1, b1, w2, b2, y, total):
    rows = x[0].astype(jnp.float32)
    standard, _ = standardize(rows, EPSILON)
    normed = (standard * scale[...] + bias[...]).astype(x.dtype)

    def part(at):
        g, _ = gelu_by_tanh(product(normed, w1[:, at].astype(x.dtype), 1, 0) + b1[:, at])
        return product(g.astype(x.dtype), w2[at].astype(x.dtype), 1, 0)

    z = _sum_of_parts(part, w1.shape[1], total) + b2[...]
    y[0] = (rows + kept[0] * z).astype(y.dtype)


def _backward_kernel(last, x, cotangent, kept, scale, bias, w1, b1, w2, of_x, *refs):
    of_scale, of_bias, of_w1, of_b1, of_w2_t, of_b2, total, sum_w1, sum_w2_t = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        for each in (of_scale, of_bias, sum_w1, of_b1, sum_w2_t, of_b2):
            each[...] = jnp.zeros_like(each)

    standard, factor = standardize(x[0].astype(jnp.float32), EPSILON)
    normed = (standard * scale[...] + bias[...]).astype(x.dtype)
    of_y = cotangent[0].astype(jnp.float32)
    of_z = kept[0] * of_y
    of_b2[0] += of_z.sum(0, keepdims=True)
    of_z = of_z.astype(x.dtype)

    def part(at):
        into, out = w1[:, at].astype(x.dtype), w2[at].astype(x.dtype)
        g, slope = gelu_by_tanh(product(normed, into, 1, 0) + b1[:, at])
        of_h = product(of_z, out, 1, 1) * slope
        of_b1[0, :, at] += of_h.sum(0, keepdims=True)
        of_h = of_h.astype(x.dtype)
        sum_w1[:, at] += product(normed, of_h, 0, 0)
        sum_w2_t[:, at] += product(of_z, g.astype(x.dtype), 0, 0)
        return product(of_h, into, 1, 1)

    of_normed = _sum_of_parts(part, w1.shape[1], total)
    of_scale[0] += (of_normed * standard).sum(0, keepdims=True)
    of_bias[0] += of_normed.sum(0, keepdims=True)
    of_x[0] = (of_y + gradient(standard, factor, of_normed * scale[...])).astype(of_x.dtype)

    @pl.when(pl.program_id(1) == last)
    def _():
        of_w1[0] = sum_w1[...].astype(of_w1.dtype)
        of_w2_t[0] = sum_w2_t[...].astype(of_w2_t.dtype)


def _sum_of_parts(part, hidden, total):
    """The sum of part(at) of all parts of `hidden`; `total` is where to add it up."""
    width = _width(hidden)
    if width == hidden:
        return part(slice(None))
    total[...] = jnp.zeros_like(total)

    @pl.loop(0, hidden // width)
    def _(i):
        total[...] += part(pl.ds(pl.multiple_of(i * width, width), width))

    return total[...]
