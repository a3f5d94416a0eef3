"""Sampling of a multi-scale deformable attention as a kernel of our own for TPUs."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.registers import LANES, product, traced_once
from refseg_jax.sharding import divides_samples, kernel_places

Shapes = tuple[tuple[int, int], ...]

# For 128 queries of one head at a time the kernel makes the matrix of all weights of a tile, some
# rows of a level's pixels by the queries, and multiplies the values with it. Queries side by side
# on the map mostly look at the same part of it, so that it goes only through the tiles between
# the uppermost and the lowest of their points.
MEMORY = 12 << 20  # Bytes for a head's values and their gradients, of the 16 MiB of a v4.


class _Level(NamedTuple):
    """How the pixels [h, w] of a level lie in `count` tiles of `rows` rows of `width` pixels."""

    h: int
    w: int
    width: int
    rows: int

    @property
    def count(self) -> int:
        return -(-self.h // self.rows)

    @property
    def pixels(self) -> int:
        """Of a tile: full registers of lanes."""
        return self.rows * self.width


def _level(size: tuple[int, int]) -> _Level:
    h, w = size
    width = max(16, 1 << (w - 1).bit_length()) if w <= 64 else -(-w // 64) * 64
    return _Level(h, w, width, LANES // math.gcd(LANES, width))


def fits_kernel(value: jax.Array, spatial_shapes: Shapes) -> bool:
    """Whether `sample_in_kernel` takes `value` [B,S,M,D] of levels of such (h, w).

    A head's channels fill registers, its values fit a chip's vector memory, and every device has
    whole samples.
    """
    b, _, _, d = value.shape
    pixels = sum(level.count * level.pixels for level in map(_level, spatial_shapes))
    # Values and their gradients, of each two, as one is moved while the other is in use; and values
    # with their channels, fewer than lanes, in lanes.
    memory = pixels * (2 * d * 2 + 2 * d * 4 + -(-d // LANES) * LANES * 2)
    fills = value.dtype == jnp.bfloat16 and d % 16 == 0
    return fills and memory <= MEMORY and divides_samples(b)


def sample_in_kernel(
    spatial_shapes: Shapes, value: jax.Array, locations: jax.Array, weights: jax.Array
) -> jax.Array:
    """`ms_deform_attn` as a kernel for TPUs of values that `fits_kernel`."""
    b, _, m, d = value.shape
    levels = tuple(map(_level, spatial_shapes))
    ends = np.cumsum([h * w for h, w in spatial_shapes])[:-1]
    parts = jnp.split(value.reshape(b, -1, m * d), ends, axis=1)
    tiles = [_to_tiles(x, level) for x, level in zip(parts, levels, strict=True)]
    tiles = tuple(x.reshape(b, -1, m, d, x.shape[-1]) for x in tiles)
    size = np.array(spatial_shapes, np.float32)[:, None, ::-1]
    places = (locations * size - 0.5).reshape(*locations.shape[:4], -1)
    out = _sample(levels, tiles, places.transpose(0, 2, 3, 4, 1), weights.transpose(0, 2, 3, 4, 1))
    return out.reshape(b, m * d, -1).mT


def _to_tiles(x: jax.Array, level: _Level) -> jax.Array:
    """[B,h·w,C] -> [B,tiles,C,pixels of a tile].

    A product with ones and zeros: a TPU would take four times as long to move the pixels.
    """
    b, _, c = x.shape
    pixels = level.rows * level.w
    x = jnp.pad(x, ((0, 0), (0, level.count * pixels - x.shape[1]), (0, 0)))
    row, column = np.divmod(np.arange(pixels), level.w)
    pick = row[:, None] * level.width + column[:, None] == np.arange(level.pixels)
    x = x.reshape(b, level.count, pixels, c)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("btnc,np->btcp", x, jnp.asarray(pick, x.dtype), precision=highest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sample(
    levels: tuple[_Level, ...],
    tiles: tuple[jax.Array, ...],
    places: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Values in tiles [B,tiles,M,D,pixels] at places [B,M,L,2·P,Lq] -> [B,M,D,Lq].

    Places are float32 (x, y) of one point after another, in pixels from the centre of a level's
    first; their weights are float32 [B,M,L,P,Lq].
    """
    return _divided(levels, tiles, places, weights)


def _sample_forward(levels, *arrays):
    return _sample(levels, *arrays), arrays


def _sample_backward(levels, arrays, cotangent):
    *of_tiles, of_places, of_weights = _divided(levels, *arrays, cotangent)
    return tuple(x.astype(arrays[0][0].dtype) for x in of_tiles), of_places, of_weights


_sample.defvjp(_sample_forward, _sample_backward)


def _divided(levels: tuple[_Level, ...], tiles: tuple[jax.Array, ...], *arrays: jax.Array) -> Any:
    """Runs the kernel where the samples are: XLA cannot divide it among devices by itself."""
    samples, _ = kernel_places()
    run = jax.shard_map(
        functools.partial(_run, levels), in_specs=samples, out_specs=samples, check_vma=False
    )
    return run(tiles, *arrays)


@traced_once(0)
def _run(levels: tuple[_Level, ...], tiles: tuple[jax.Array, ...], *arrays: jax.Array) -> Any:
    """The kernel for every sample, head and 128 queries; with the results' gradients, backward."""
    places, weights, *of_out = arrays
    backward = bool(of_out)
    b, m, _, count, queries = weights.shape
    d, dtype = tiles[0].shape[3], tiles[0].dtype

    def of_queries(*shape: int) -> pl.BlockSpec:
        at = [0] * len(shape)
        return pl.BlockSpec((None, None, *shape, LANES), lambda i, j, k: (i, j, *at, k))

    def of_tiles(x: jax.Array) -> pl.BlockSpec:
        tiles, _, *shape = x.shape[1:]
        return pl.BlockSpec((None, tiles, None, *shape), lambda i, j, k: (i, 0, j, 0, 0))

    of_points = [of_queries(*x.shape[2:4]) for x in (places, weights)]
    widest = max(level.width for level in levels)
    columns = pltpu.VMEM((count, widest, LANES), jnp.float32)
    if backward:
        out_shape = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (*tiles, places, weights)]
        out_specs = [*map(of_tiles, tiles), *of_points]
        scratch = [pltpu.VMEM((x.shape[1], x.shape[4], d), dtype) for x in tiles]
        scratch = [columns, columns, *scratch]
    else:
        out_shape, out_specs = jax.ShapeDtypeStruct((b, m, d, queries), dtype), of_queries(d)
        scratch = [columns]
    pixels = sum(level.count * level.pixels for level in levels)
    return pl.pallas_call(
        functools.partial(_backward_kernel if backward else _forward_kernel, levels, queries),
        name="deformable_backward" if backward else "deformable",
        grid=(b, m, pl.cdiv(queries, LANES)),
        in_specs=[
            *of_points,
            *map(of_tiles, tiles),
            *[of_queries(d) for _ in of_out],
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        # Of whole levels; how much of them is needed only the points say.
        cost_estimate=pl.CostEstimate(
            flops=(2 if backward else 1) * 2 * b * m * pixels * d * queries,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*tiles, *arrays)),
            transcendentals=0,
        ),
    )(places, weights, *tiles, *of_out)


def _weight(distance: jax.Array) -> jax.Array:
    """Linear interpolation: what a pixel counts for a point at such a distance."""
    return jnp.maximum(1 - jnp.abs(distance), 0)


def _slope(distance: jax.Array) -> jax.Array:
    """The derivative of `_weight(pixel - point)` by the point, on whose pixel it is that to the
    right."""
    right = jnp.where((distance > 0) & (distance <= 1), 1.0, 0.0)
    return jnp.where((distance > -1) & (distance <= 0), -1.0, right)


class _Look(NamedTuple):
    """How 128 queries look at a level: their points, and the tiles from `first` to `end`.

    x, y, weight: float32 [P,128]. `columns` is scratch float32 [P,.,128], for what each column of
    the level counts for a point, times the point's weight.
    """

    level: _Level
    first: jax.Array
    end: jax.Array
    x: jax.Array
    y: jax.Array
    weight: jax.Array
    columns: Any

    @property
    def points(self) -> range:
        return range(len(self.weight))

    def to_columns(self, p: int) -> jax.Array:
        """How far they are from a point, [width,128]."""
        column = jax.lax.broadcasted_iota(jnp.int32, (self.level.width, LANES), 0)
        return column.astype(jnp.float32) - self.x[p : p + 1]

    def to_rows(self, tile: jax.Array) -> list[jax.Array]:
        """How far a tile's are from the points, [P,128] each."""
        first = tile * self.level.rows
        return [(first + i).astype(jnp.float32) - self.y for i in range(self.level.rows)]

    def rows(self, tile: jax.Array) -> list[jax.Array]:
        """What they count for the points."""
        return [_weight(distance) for distance in self.to_rows(tile)]

    def column(self, p: int) -> jax.Array:
        return self.columns[p, : self.level.width]

    def of_pixels(self, rows: list[jax.Array]) -> jax.Array:
        """What a tile's pixels count, the points taken together: float32 [pixels,128]."""
        sums = [sum(row[p : p + 1] * self.column(p) for p in self.points) for row in rows]
        return jnp.concatenate(sums)


def _looks(
    levels: tuple[_Level, ...], queries: int, places: Any, weights: Any, columns: Any
) -> Iterator[_Look]:
    """At one level after another, as all have the same scratch."""
    inside = _inside(queries)
    for i, level in enumerate(levels):
        # Beyond the last query there is anything: as the first, which widens no range.
        of_level = jnp.where(inside, places[i], places[i][:, :1])
        x, y = (_every_other(of_level, start) for start in (0, 1))
        row = jnp.clip(jnp.floor(y), -2, level.h)
        first = jnp.maximum(row.min().astype(jnp.int32), 0)
        last = jnp.maximum(row.max().astype(jnp.int32) + 1, -1)
        first, end = (jax.lax.div(n, level.rows) for n in (first, last + level.rows))
        weight = jnp.where(inside, weights[i], 0.0)
        look = _Look(level, first, jnp.minimum(end, level.count), x, y, weight, columns)
        for p in look.points:
            columns[p, : level.width] = _weight(look.to_columns(p)) * weight[p : p + 1]
        yield look


def _inside(queries: int) -> jax.Array:
    """Which of 128 are queries: bool [1,128]."""
    query = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1) + pl.program_id(2) * LANES
    return query < queries


def _every_other(x: jax.Array, start: int) -> jax.Array:
    return jnp.concatenate([x[i : i + 1] for i in range(start, len(x), 2)])


def _forward_kernel(levels, queries, places, weights, *refs) -> None:
    *tiles, out, columns = refs
    total = jnp.zeros(out.shape, jnp.float32)
    looks = _looks(levels, queries, places, weights, columns)
    for look, values in zip(looks, tiles, strict=True):
        total = _read(look, values, total)
    out[...] = total.astype(out.dtype)


def _read(look: _Look, values: Any, total: jax.Array) -> jax.Array:
    """`total` [D,128] and what the queries read of `values` [tiles,D,pixels]."""

    def add(tile, carry):
        total, rows = carry
        total += product(values[tile], look.of_pixels(rows).astype(values.dtype), 1, 0)
        # The next tile's, which do not wait for the product.
        return total, look.rows(tile + 1)

    return jax.lax.fori_loop(look.first, look.end, add, (total, look.rows(look.first)))[0]


def _backward_kernel(levels, queries, places, weights, *refs) -> None:
    count = len(levels)
    tiles, of_out, of_tiles = refs[:count], refs[count], refs[count + 1 : 2 * count + 1]
    of_places, of_weights, columns, of_columns, *transposed = refs[2 * count + 1 :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for values, of_values, by_pixel in zip(tiles, of_tiles, transposed, strict=True):
            of_values[...] = jnp.zeros_like(of_values)
            _transpose(values, by_pixel)

    of_out = jnp.where(_inside(queries), of_out[...].astype(jnp.float32), 0.0).astype(of_out.dtype)
    looks = _looks(levels, queries, places, weights, columns)
    for i, (look, by_pixel, of_values) in enumerate(zip(looks, transposed, of_tiles, strict=True)):
        of_places[i], of_weights[i] = _read_backward(look, by_pixel, of_out, of_values, of_columns)


def _transpose(values: Any, by_pixel: Any) -> None:
    def one(tile, _):
        by_pixel[tile] = values[tile].T

    jax.lax.fori_loop(0, len(values), one, None)


def _read_backward(
    look: _Look, by_pixel: Any, of_out: jax.Array, of_values: Any, of_columns: Any
) -> tuple[jax.Array, jax.Array]:
    """The gradients of places and weights; and that of the values is added to `of_values`.

    `by_pixel` [tiles,pixels,D] are the values, `of_columns` is scratch like the look's columns.
    """
    width = look.level.width
    for p in look.points:
        of_columns[p, :width] = jnp.zeros((width, LANES))

    def of_pixels(tile):
        return product(by_pixel[jnp.minimum(tile, look.level.count - 1)], of_out, 1, 0)

    def add(tile, carry):
        of_y, of_tile = carry
        following = of_pixels(tile + 1)  # Nothing of this tile waits for it.
        weights = look.of_pixels(look.rows(tile)).astype(by_pixel.dtype)
        of_values[tile] += product(of_out, weights, 1, 1)
        for i, distance in enumerate(look.to_rows(tile)):
            row, of_row = _weight(distance), of_tile[i * width : (i + 1) * width]
            sums = []
            for p in look.points:
                of_columns[p, :width] += row[p : p + 1] * of_row
                sums.append((look.column(p) * of_row).sum(0, keepdims=True))
            of_y += _slope(distance) * jnp.concatenate(sums)
        return of_y, following

    start = jnp.zeros_like(look.y), of_pixels(look.first)
    of_y, _ = jax.lax.fori_loop(look.first, look.end, add, start)

    def over_columns(factor: Callable) -> jax.Array:
        products = [factor(look.to_columns(p)) * of_columns[p, :width] for p in look.points]
        return jnp.concatenate([x.sum(0, keepdims=True) for x in products])

    of_x = over_columns(_slope) * look.weight
    pairs = [z[p : p + 1] for p in look.points for z in (of_x, of_y)]
    return jnp.concatenate(pairs), over_columns(_weight)
