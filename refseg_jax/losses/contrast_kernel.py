"""The pairs of CoupAlign's pixel contrast as kernels for TPUs (see pixel_contrast.py).

A sample's pixels are put in order in the vector memory, those of its rarer class first, by products
of their blocks with ones and zeros. Then each block of the rarer class, the rows, meets each of the
others, the columns: their products, and what is made of those, never leave that memory. As vectors
have the length sqrt(1 / temperature), no product is more than 1 / temperature but for rounding:
that is taken from each before its exponential, and no maximum is looked for.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.registers import LANES, product, traced_once
from refseg_jax.sharding import divides_samples, kernel_places, on_tpus

BLOCK = 256  # Pixels, in their order; at most as many of the map.
TILE = 16  # Rows of a register of bfloat16: what is put in order, or read of it, has whole ones.
SUBLANES = 8  # Of a register: what the products of few vectors have as rows.
MOST_CHANNELS = 2048  # For whose blocks SPARE is enough, also without optimisation.
SPARE = 12 << 20  # Bytes that a kernel needs beside what it keeps of a sample.
LEAST_TEMPERATURE = 1 / 40  # exp(2 / temperature) is a number.


def contrast_in_kernel(pixels: jax.Array, labels: jax.Array, temperature: float) -> jax.Array:
    """`pixel_contrast_loss` with `normalize`, of pixels that `fits_kernel`: float32 [B]."""
    B, S, _ = pixels.shape
    rare = labels ^ (2 * labels.sum(1, keepdims=True) > S)
    of_classes = jnp.stack([rare, ~rare], 1).reshape(B, 2, -1, _taken(S))
    # Each pixel's place among those of its class in the block; below 0 for the other class.
    places = jnp.cumsum(of_classes, -1, dtype=jnp.int32) - 1
    places = jnp.where(of_classes, places, -BLOCK)
    ends = jnp.cumsum(of_classes.sum(-1, dtype=jnp.int32), -1)
    numbers = ends[..., -1]
    firsts = jnp.stack([jnp.zeros_like(numbers[:, 0]), _first_column(numbers[:, 0])], 1)
    starts = firsts[..., None] + jnp.pad(ends, ((0, 0), (0, 0), (1, 0)))
    sums, own = pair_sums(pixels, places.swapaxes(1, 2), starts, temperature)

    index = jnp.arange(sums[0].size).reshape(sums.shape[1:])
    contrast = 0.0
    for i in range(2):
        first, number = firsts[:, i, None, None], numbers[:, i, None, None]
        member = (index >= first) & (index < first + number)
        # -log(exp(own) / (exp(own) + sum of the others' exp)).
        others = jnp.log(jnp.where(member & (sums > 0), sums, 1)) + 1 / temperature
        per_pixel = jax.nn.softplus(others - jnp.where(member, own, 0))
        contrast += jnp.where(member, per_pixel / jnp.maximum(number, 1), 0).sum((1, 2))
    return jnp.where(numbers[:, 0] > 0, contrast, 0)


def fits_kernel(pixels: jax.Array, temperature: float) -> bool:
    """Whether `contrast_in_kernel` takes arrays like `pixels` [B,S,C].

    They fill registers, what is kept of a sample fits the vector memory, exponentials are numbers,
    and every device has whole samples.
    """
    B, S, C = pixels.shape
    memory = pltpu.get_tpu_info().vmem_capacity_bytes if on_tpus() else 2 * SPARE
    return (
        (pixels.dtype == jnp.bfloat16 and C % LANES == S % LANES == 0)
        and C <= MOST_CHANNELS
        and temperature >= LEAST_TEMPERATURE
        and _limit(_kept_backward(S, C, pixels.dtype)) <= memory
        and divides_samples(B)
    )


def _taken(S: int) -> int:
    """Pixels of a block of the map."""
    return math.gcd(S, BLOCK)


def _first_column(rows: jax.Array) -> jax.Array:
    """Where columns begin, behind so many rows and what is written behind those, in blocks."""
    return (rows + (TILE + 2 * BLOCK - 1)) // BLOCK * BLOCK


def _blocks(S: int) -> int:
    """In the order, with those between rows and columns."""
    return pl.cdiv(S, BLOCK) + 3


def _kept_forward(S: int, C: int, dtype: Any) -> list[tuple[tuple[int, int], Any]]:
    """Shapes and dtypes of what the forward kernel keeps of a sample."""
    # Behind the last block there may be written as behind the rows.
    return [
        (((_blocks(S) + 1) * BLOCK + TILE, C), dtype),  # Pixels, then their vectors.
        ((pl.cdiv(S // 2, BLOCK) * BLOCK, LANES), jnp.float32),  # Of rows, numbers in each lane.
        ((SUBLANES, C), jnp.float32),  # Sums of classes.
    ]


def _kept_backward(S: int, C: int, dtype: Any) -> list[tuple[tuple[int, int], Any]]:
    """The same of the backward kernel, and the gradients of vectors."""
    return [*_kept_forward(S, C, dtype), ((_blocks(S) * BLOCK, C), jnp.float32)]


def _limit(kept: list[tuple[tuple[int, int], Any]]) -> int:
    return SPARE + sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def pair_sums(
    pixels: jax.Array, places: jax.Array, starts: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """Of pixels [B,S,C] in their order, the sums of their pairs and their own class's products.

    Args:
      pixels: of any length; their vectors have sqrt(1 / temperature).
      places: int32 [B, blocks of the map, 2, pixels], for rows and columns: where a pixel stands
        among those of its block; below 0 where it is none.
      starts: int32 [B, 2, blocks of the map + 1]: where those of each block begin in the order,
        and where those of the last end.
      temperature: tau.

    Returns:
      (the sum of exp(product - 1 / temperature) over the vectors of the other class, the product
      with the mean of its own), float32 [B, blocks of the order, BLOCK]. Where no pixel stands
      there may be anything; their cotangents there must be 0.
    """
    return _divided(functools.partial(_forward, temperature), pixels, places, starts)


def _pair_sums_forward(pixels, places, starts, temperature):
    return pair_sums(pixels, places, starts, temperature), (pixels, places, starts)


def _pair_sums_backward(temperature, saved, cotangents):
    run = functools.partial(_backward, temperature)
    return _divided(run, *saved, *cotangents), None, None


pair_sums.defvjp(_pair_sums_forward, _pair_sums_backward)


def _divided(run: Callable, *arrays: jax.Array) -> Any:
    """Runs a kernel where the samples are."""
    samples, _ = kernel_places()
    return jax.shard_map(run, in_specs=samples, out_specs=samples, check_vma=False)(*arrays)


class Specs(NamedTuple):
    """Where a step of the grid, (sample, phase, block of the map), finds what it needs."""

    pixels: pl.BlockSpec
    places: pl.BlockSpec
    starts: pl.BlockSpec
    ordered: pl.BlockSpec  # A number of each pixel, in their order.


def _specs(S: int, C: int) -> Specs:
    taken = _taken(S)
    starts = (1, 2, S // taken + 1)
    return Specs(
        pl.BlockSpec((1, taken, C), lambda b, t, j: (b, j, 0)),
        pl.BlockSpec((1, 1, 2, taken), lambda b, t, j: (b, j, 0, 0)),
        pl.BlockSpec(starts, lambda b, t, j: (b, 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec((1, _blocks(S), 1, BLOCK), lambda b, t, j: (b, 0, 0, 0)),
    )


def _options(x: jax.Array, phases: int, kept: list, products: int) -> dict:
    """How a kernel of pixels `x` is called that keeps `kept`, and takes `products` of each pair."""
    B, S, C = x.shape
    pairs = B * S * S // 8  # Where a seventh of the pixels are rows.
    return dict(
        grid=(B, phases, S // _taken(S)),
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in kept],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=_limit(kept),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * pairs * C,
            bytes_accessed=(2 * phases - 1) * x.size * x.dtype.itemsize,
            transcendentals=pairs,
        ),
    )


@traced_once(0)
def _forward(
    temperature: float, pixels: jax.Array, places: jax.Array, starts: jax.Array
) -> tuple[jax.Array, ...]:
    """The kernel, for the samples of one device."""
    B, S, C = pixels.shape
    specs = _specs(S, C)
    ordered = jax.ShapeDtypeStruct((B, *specs.ordered.block_shape[1:]), jnp.float32)
    results = pl.pallas_call(
        functools.partial(_forward_step, temperature),
        name="pixel_contrast",
        in_specs=[specs.pixels, specs.places, specs.starts],
        out_specs=[specs.ordered] * 2,
        out_shape=[ordered] * 2,
        **_options(pixels, 1, _kept_forward(S, C, pixels.dtype), 1),
    )(pixels, places, starts)
    return tuple(x[:, :, 0] for x in results)


@traced_once(0)
def _backward(
    temperature: float,
    pixels: jax.Array,
    places: jax.Array,
    starts: jax.Array,
    of_sums: jax.Array,
    of_own: jax.Array,
) -> jax.Array:
    """Gradients of the pixels: the kernel, for the samples of one device."""
    _, S, C = pixels.shape
    specs = _specs(S, C)
    return pl.pallas_call(
        functools.partial(_backward_step, temperature),
        name="pixel_contrast_backward",
        in_specs=[specs.pixels, specs.places, specs.starts, specs.ordered, specs.ordered],
        # The first phase writes nothing: it stays at the block that the second writes first.
        out_specs=pl.BlockSpec((1, _taken(S), C), lambda b, t, j: (b, jnp.where(t == 0, 0, j), 0)),
        out_shape=jax.ShapeDtypeStruct(pixels.shape, pixels.dtype),
        **_options(pixels, 2, _kept_backward(S, C, pixels.dtype), 3),
    )(pixels, places, starts, of_sums[:, :, None], of_own[:, :, None])


class Sample:
    """Where a kernel's step finds what of its sample, by blocks of the order."""

    def __init__(self, places: Any, starts: Any):
        last = starts.shape[-1] - 1  # Where the last block's pixels end.
        S = last * places.shape[-1]
        self.places, self.starts = places, starts
        self.phase, self.block = pl.program_id(1), pl.program_id(2)
        self.is_last = self.block == last - 1
        self.number = starts[0, 0, last]  # Of rows.
        self.row_blocks = _div(self.number + (BLOCK - 1), BLOCK)
        self.first_column = starts[0, 1, 0]
        column_blocks = _div(S - self.number + (BLOCK - 1), BLOCK)
        # Their bounds, which bind nothing: benchmarks/tpu_kernels.py reads them off jnp.minimum.
        half, all_blocks = pl.cdiv(S // 2, BLOCK), pl.cdiv(S, BLOCK)
        self.rows_end = jnp.minimum(self.row_blocks, half)
        self.used = jnp.minimum(self.row_blocks + column_blocks, all_blocks + 1)
        pairs = self.row_blocks * column_blocks
        self.pairs = jnp.minimum(pairs, half * (all_blocks - half + 1))
        self.columns = S - self.number

    def shares(self) -> tuple[jax.Array, jax.Array]:
        """1 over the number of rows and of columns."""
        numbers = self.number, self.columns
        return tuple(1 / jnp.maximum(n, 1).astype(jnp.float32) for n in numbers)

    def each_row(self, do: Callable[[jax.Array], None]) -> None:
        """Calls `do` with every block of rows."""
        jax.lax.fori_loop(0, self.rows_end, lambda i, _: do(i), None)

    def each(self, do: Callable[[jax.Array, jax.Array, jax.Array], None]) -> None:
        """Calls `do` with every block, whether of rows, and where [1, BLOCK] a pixel stands."""

        def one(i: jax.Array, _: None) -> None:
            of_rows = i < self.row_blocks
            column = i - self.row_blocks
            block = jnp.where(of_rows, i, _div(self.first_column, BLOCK) + column)
            left = jnp.where(of_rows, self.number - i * BLOCK, self.columns - column * BLOCK)
            do(block, of_rows, jax.lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1) < left)

        jax.lax.fori_loop(0, self.used, one, None)

    def each_pair(self, do: Callable[[jax.Array, jax.Array, jax.Array], None]) -> None:
        """Calls `do` with a block of rows, one of columns, and where [BLOCK, BLOCK] two meet."""
        row = jax.lax.broadcasted_iota(jnp.int32, (BLOCK, 1), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (1, BLOCK), 1)

        def one(_: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            i, j = at
            meet = (row < self.number - i * BLOCK) & (column < self.columns - j * BLOCK)
            do(i, _div(self.first_column, BLOCK) + j, meet)
            ends = i + 1 == self.row_blocks
            return jnp.where(ends, 0, i + 1), jnp.where(ends, j + 1, j)

        jax.lax.fori_loop(0, self.pairs, one, (jnp.int32(0), jnp.int32(0)))

    def each_class(self, do: Callable[[jax.Array, jax.Array], None]) -> None:
        """Calls `do` where this block of the map has rows, and where it has columns.

        With the tile of the order in which they begin, and [n, pixels] that has their product with
        pixels begin there.
        """
        for i in range(2):
            start = self.starts[0, i, self.block]
            place = self.places[0, 0, i : i + 1]

            @pl.when(self.starts[0, i, self.block + 1] > start)
            def _(start=start, place=place):
                index = jax.lax.broadcasted_iota(jnp.int32, (place.size + TILE, 1), 0)
                do(_tile(start), index - start % TILE == place)


def _div(a: jax.Array, b: int) -> jax.Array:
    return jax.lax.div(a, jnp.int32(b))


def _tile(row: jax.Array) -> jax.Array:
    """The first of the rows that share a register with this one."""
    return pl.multiple_of(row - row % TILE, TILE)


def _at(block: jax.Array) -> pl.Slice:
    return pl.ds(pl.multiple_of(block * BLOCK, BLOCK), BLOCK)


def _factor(pixels: jax.Array, temperature: float) -> jax.Array:
    """Of float32 [n,C], what makes them vectors of the length sqrt(1 / temperature): [n,1]."""
    squares = jnp.sum(pixels * pixels, 1, keepdims=True)
    return jax.lax.rsqrt(jnp.maximum(squares, 1e-24)) / math.sqrt(temperature)


def _stacked(of_rows: jax.Array, *two: jax.Array) -> jax.Array:
    """[SUBLANES, n] for products: two rows [1, n], at 0 and 2 for rows, at 1 and 3 for columns."""
    index = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, two[0].shape[1]), 0)
    index -= jnp.where(of_rows, 0, 1)
    return jnp.where(index == 0, two[0], jnp.where(index == 2, two[1], 0.0))


def _exponentials(ordered: Any, i: jax.Array, j: jax.Array, meet: jax.Array, temperature: float):
    """exp(product - 1 / temperature) of two blocks where they `meet`, else 0."""
    products = product(ordered[_at(i)], ordered[_at(j)], 1, 1)
    return jnp.where(meet, jnp.exp(products - 1 / temperature), 0)


def _put_in_order(sample: Sample, pixels: Any, ordered: Any) -> None:
    """Puts a block of the map where its rows and columns stand."""
    dtype, C = ordered.dtype, ordered.shape[1]
    zeros = functools.partial(jnp.zeros, dtype=dtype)

    @pl.when(sample.block == 0)
    def _():
        ordered[:TILE] = zeros((TILE, C))
        ordered[pl.ds(_tile(sample.first_column), TILE)] = zeros((TILE, C))

    @sample.each_class
    def _(tile, pick):
        some = product(pick.astype(dtype), pixels[0], 1, 0).astype(dtype)
        # The first tile may have pixels of the blocks before, and behind those zeros.
        ordered[pl.ds(tile, TILE)] += some[:TILE]
        ordered[pl.ds(tile + TILE, len(some) - TILE)] = some[TILE:]

    @pl.when(sample.is_last)
    def _():
        for end in (sample.number, sample.first_column + sample.columns):
            ordered[pl.ds(_tile(end) + TILE, BLOCK)] = zeros((BLOCK, C))


def _make_vectors(
    sample: Sample, ordered: Any, classes: Any, temperature: float, weights: Any = None
) -> None:
    """Of the pixels in their order; and both classes' sums of them, at 2 and 3 with `weights`."""
    classes[...] = jnp.zeros_like(classes)

    @sample.each
    def _(block, of_rows, stands):
        pixels = ordered[_at(block)].astype(jnp.float32)
        vectors = (pixels * _factor(pixels, temperature)).astype(ordered.dtype)
        ordered[_at(block)] = vectors
        stands = stands.astype(jnp.float32)
        weight = stands if weights is None else weights[0, block]
        members = _stacked(of_rows, stands, weight).astype(ordered.dtype)
        classes[...] += product(members, vectors, 1, 0)


def _forward_step(temperature, pixels, places, starts, sums, own, ordered, lanes, classes):
    sample = Sample(places, starts)
    _put_in_order(sample, pixels, ordered)

    @pl.when(sample.is_last)
    def _():
        _make_vectors(sample, ordered, classes, temperature)
        lanes[...] = jnp.zeros_like(lanes)
        sums[...] = jnp.zeros_like(sums)

        @sample.each_pair
        def _(i, j, meet):
            terms = _exponentials(ordered, i, j, meet, temperature)
            sums[0, j] += terms.sum(0, keepdims=True)
            lanes[_at(i)] += functools.reduce(jnp.add, jnp.split(terms, BLOCK // LANES, 1))

        @sample.each_row
        def _(i):
            sums[0, i] = lanes[_at(i)].T.sum(0, keepdims=True)

        @sample.each
        def _(block, of_rows, _):
            means = product(classes[...].astype(ordered.dtype), ordered[_at(block)], 1, 1)
            share = jnp.where(of_rows, *sample.shares())
            own[0, block] = share * jnp.where(of_rows, means[:1], means[1:2])


def _backward_step(temperature, pixels, places, starts, of_sums, of_own, of_pixels, *kept):
    ordered, lanes, classes, of_vectors = kept
    sample, dtype = Sample(places, starts), ordered.dtype

    @pl.when(sample.phase == 0)
    def _():
        _put_in_order(sample, pixels, ordered)

    @pl.when((sample.phase == 0) & sample.is_last)
    def _():
        _make_vectors(sample, ordered, classes, temperature, of_own)
        of_vectors[...] = jnp.zeros_like(of_vectors)

        @sample.each_row
        def _(i):
            lanes[_at(i)] = jnp.broadcast_to(of_sums[0, i], (LANES, BLOCK)).T

        @sample.each_pair
        def _(i, j, meet):
            # A pair is a term of its row's sum and of its column's.
            weight = jnp.concatenate([lanes[_at(i)]] * (BLOCK // LANES), 1) + of_sums[0, j]
            terms = _exponentials(ordered, i, j, meet, temperature)
            terms = (terms * weight).astype(dtype)
            of_vectors[_at(i)] += product(terms, ordered[_at(j)], 1, 0)
            of_vectors[_at(j)] += product(terms, ordered[_at(i)], 0, 0)

        # From here on what is in order is the gradients of directions.
        @sample.each
        def _(block, of_rows, stands):
            # A class's mean pulls its members, and they pull it.
            share = jnp.where(of_rows, *sample.shares())
            members = _stacked(of_rows, share * of_own[0, block], jnp.where(stands, share, 0))
            of_means = product(members.astype(dtype), classes[...].astype(dtype), 0, 0)
            of_it = of_vectors[_at(block)] + of_means
            vectors = ordered[_at(block)].astype(jnp.float32)
            # As rounded they are no longer of the length that they were made to have.
            squares = jnp.maximum(jnp.sum(vectors * vectors, 1, keepdims=True), 1e-24)
            along = jnp.sum(of_it * vectors, 1, keepdims=True) / squares
            ordered[_at(block)] = (of_it - along * vectors).astype(dtype)

    @pl.when(sample.phase == 1)
    def _():
        of_pixels[...] = jnp.zeros_like(of_pixels)
        factor = _factor(pixels[0].astype(jnp.float32), temperature)

        @sample.each_class
        def _(tile, pick):
            some = ordered[pl.ds(tile, len(pick))]
            of_pixels[0] += (factor * product(pick.astype(dtype), some, 0, 0)).astype(dtype)
