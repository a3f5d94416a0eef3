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

from refseg_jax.sharding import divides_samples, kernel_places

Shapes = tuple[tuple[int, int], ...]

# For 128 queries of one head at a time the kernel makes the matrix of all weights of a tile, some
# rows of a level's pixels by the queries, and multiplies the values with it. Queries side by side
# on the map mostly look at the same part of it, so that it goes only through the tiles between
# the uppermost and the lowest of their points.
LANES = 128
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
    queries = locations.shape[1]
    levels = tuple(map(_level, spatial_shapes))
    ends = np.cumsum([h * w for h, w in spatial_shapes])[:-1]
    parts = jnp.split(value.transpose(0, 2, 3, 1), ends, axis=-1)
    tiles = tuple(_to_tiles(x, level) for x, level in zip(parts, levels, strict=True))
    size = np.array(spatial_shapes, np.float32)[:, None, ::-1]
    points = jnp.concatenate([locations * size - 0.5, weights[..., None]], -1)
    points = points.transpose(0, 2, 3, 5, 4, 1)  # [B,M,L,3,P,Lq]
    # As the last query: then a block looks no further for those beyond.
    points = jnp.pad(points, [(0, 0)] * 5 + [(0, -queries % LANES)], mode="edge")
    out = _sample(levels, tiles, points)[..., :queries]
    return out.reshape(b, m * d, queries).mT


def _to_tiles(x: jax.Array, level: _Level) -> jax.Array:
    """[B,M,D,h·w] -> [B,M,tiles,D,pixels of a tile]."""
    b, m, d, _ = x.shape
    x = x.reshape(b, m, d, level.h, level.w)
    below, right = level.count * level.rows - level.h, level.width - level.w
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, below), (0, right)])
    return x.reshape(b, m, d, level.count, level.pixels).swapaxes(2, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sample(
    levels: tuple[_Level, ...], tiles: tuple[jax.Array, ...], points: jax.Array
) -> jax.Array:
    """Values in tiles [B,M,tiles,D,pixels] at points float32 [B,M,L,3,P,Lq] -> [B,M,D,Lq].

    Points are (x, y, weight), in pixels from the centre of a level's first.
    """
    return _divided(levels, tiles, points)


def _sample_forward(levels, tiles, points):
    return _sample(levels, tiles, points), (tiles, points)


def _sample_backward(levels, saved, cotangent):
    tiles, points = saved
    *of_tiles, of_points = _divided(levels, tiles, points, cotangent)
    return tuple(x.astype(tiles[0].dtype) for x in of_tiles), of_points


_sample.defvjp(_sample_forward, _sample_backward)


def _divided(levels: tuple[_Level, ...], tiles: tuple[jax.Array, ...], *arrays: jax.Array) -> Any:
    """Runs the kernel where the samples are: XLA cannot divide it among devices by itself."""
    samples, _ = kernel_places()
    run = jax.shard_map(
        functools.partial(_run, levels), in_specs=samples, out_specs=samples, check_vma=False
    )
    return run(tiles, *arrays)


def _run(levels: tuple[_Level, ...], tiles: tuple[jax.Array, ...], *arrays: jax.Array) -> Any:
    """The kernel for every sample, head and 128 queries; with the results' gradients, backward."""
    points, *of_out = arrays
    backward = bool(of_out)
    b, m, *of_query, queries = points.shape
    d, dtype = tiles[0].shape[3], tiles[0].dtype
    ranges = _ranges(levels, points)

    def of_head(x: jax.Array, space: Any = None) -> pl.BlockSpec:
        rest = x.shape[2:]
        at = [0] * len(rest)
        return pl.BlockSpec((None, None, *rest), lambda i, j, k: (i, j, *at), memory_space=space)

    def of_queries(*shape: int) -> pl.BlockSpec:
        at = [0] * len(shape)
        return pl.BlockSpec((None, None, *shape, LANES), lambda i, j, k: (i, j, *at, k))

    whole_levels = [of_head(x) for x in tiles]
    widest = max(level.width for level in levels)
    columns = pltpu.VMEM((of_query[-1], widest, LANES), jnp.float32)
    if backward:
        like_tiles = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in tiles]
        out_shape = *like_tiles, jax.ShapeDtypeStruct(points.shape, points.dtype)
        out_specs = *whole_levels, of_queries(*of_query)
        transposed = [pltpu.VMEM((x.shape[2], x.shape[4], d), dtype) for x in tiles]
        scratch = columns, columns, *transposed
    else:
        out_shape = jax.ShapeDtypeStruct((b, m, d, queries), dtype)
        out_specs = of_queries(d)
        scratch = (columns,)
    pixels = sum(level.count * level.pixels for level in levels)
    return pl.pallas_call(
        functools.partial(_backward_kernel if backward else _forward_kernel, levels),
        name="deformable_backward" if backward else "deformable",
        grid=(b, m, queries // LANES),
        in_specs=[
            of_head(ranges, pltpu.SMEM),
            of_queries(*of_query),
            *whole_levels,
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
    )(ranges, points, *tiles, *of_out)


def _ranges(levels: tuple[_Level, ...], points: jax.Array) -> jax.Array:
    """The tiles that each 128 queries read: (first, end), int32 [B,M,blocks,2·L]."""
    b, m, count, _, _, queries = points.shape
    y = points[:, :, :, 1].reshape(b, m, count, -1, queries // LANES, LANES)
    h = np.array([level.h for level in levels])[:, None]
    rows = np.array([level.rows for level in levels])[:, None]
    first = jnp.clip(jnp.floor(y.min((3, 5))), 0, h) // rows
    end = -(-jnp.clip(jnp.floor(y.max((3, 5))) + 2, 0, h) // rows)
    ranges = jnp.stack([first, end], 3).astype(jnp.int32)
    return ranges.transpose(0, 1, 4, 2, 3).reshape(b, m, queries // LANES, 2 * count)


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

    def to_columns(self, p: int) -> jax.Array:
        """How far they are from a point, [width,128]."""
        column = jax.lax.broadcasted_iota(jnp.int32, (self.level.width, LANES), 0)
        return column.astype(jnp.float32) - self.x[p : p + 1]

    def to_rows(self, tile: jax.Array) -> list[jax.Array]:
        """How far a tile's are from the points, [P,128] each."""
        first = tile * self.level.rows
        return [(first + i).astype(jnp.float32) - self.y for i in range(self.level.rows)]

    def rows(self, tile: jax.Array) -> list[jax.Array]:
        return [_weight(distance) for distance in self.to_rows(tile)]

    def column(self, p: int) -> jax.Array:
        return self.columns[p, : self.level.width]

    def of_pixels(self, rows: list[jax.Array]) -> jax.Array:
        """What a tile's pixels count, the points taken together: float32 [pixels,128]."""
        points = range(len(self.x))
        return jnp.concatenate(
            [sum(row[p : p + 1] * self.column(p) for p in points) for row in rows]
        )


def _looks(levels: tuple[_Level, ...], ranges: Any, points: Any, columns: Any) -> Iterator[_Look]:
    """At one level after another, as all have the same scratch."""
    block = pl.program_id(2)
    for i, level in enumerate(levels):
        first, end = ranges[block, 2 * i], ranges[block, 2 * i + 1]
        first, end = jnp.maximum(first, 0), jnp.minimum(end, level.count)
        look = _Look(level, first, end, *(points[i, part] for part in range(3)), columns)
        for p in range(len(look.x)):
            columns[p, : level.width] = _weight(look.to_columns(p)) * look.weight[p : p + 1]
        yield look


def _forward_kernel(levels: tuple[_Level, ...], ranges, points, *refs) -> None:
    *tiles, out, columns = refs
    total = jnp.zeros(out.shape, jnp.float32)
    for look, values in zip(_looks(levels, ranges, points, columns), tiles, strict=True):
        total = _read(look, values, total)
    out[...] = total.astype(out.dtype)


def _read(look: _Look, values: Any, total: jax.Array) -> jax.Array:
    """`total` [D,128] and what the queries read of `values` [tiles,D,pixels]."""

    def add(tile, carry):
        total, rows = carry
        total += _product(values[tile], look.of_pixels(rows).astype(values.dtype), 1, 0)
        # The next tile's, which do not wait for the product.
        return total, look.rows(tile + 1)

    return jax.lax.fori_loop(look.first, look.end, add, (total, look.rows(look.first)))[0]


def _backward_kernel(levels: tuple[_Level, ...], ranges, points, *refs) -> None:
    count = len(levels)
    tiles, of_out, of_tiles = refs[:count], refs[count], refs[count + 1 : 2 * count + 1]
    of_points, columns, of_columns, *transposed = refs[2 * count + 1 :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for values, of_values, by_pixel in zip(tiles, of_tiles, transposed, strict=True):
            of_values[...] = jnp.zeros_like(of_values)
            _transpose(values, by_pixel)

    looks = _looks(levels, ranges, points, columns)
    for i, (look, by_pixel, of_values) in enumerate(zip(looks, transposed, of_tiles, strict=True)):
        of_look = _read_backward(look, by_pixel, of_out[...], of_values, of_columns)
        for part, x in enumerate(of_look):
            of_points[i, part] = x


def _transpose(values: Any, by_pixel: Any) -> None:
    def one(tile, _):
        by_pixel[tile] = values[tile].T

    jax.lax.fori_loop(0, len(values), one, None)


def _read_backward(
    look: _Look, by_pixel: Any, of_out: jax.Array, of_values: Any, of_columns: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of x, y and weight; and that of the values is added to `of_values`.

    `by_pixel` [tiles,pixels,D] are the values, `of_columns` is scratch like the look's columns.
    """
    points, width = range(len(look.x)), look.level.width
    for p in points:
        of_columns[p, :width] = jnp.zeros((width, LANES))

    def of_pixels(tile):
        return _product(by_pixel[jnp.minimum(tile, look.level.count - 1)], of_out, 1, 0)

    def add(tile, carry):
        of_y, of_weights = carry
        following = of_pixels(tile + 1)  # Nothing of this tile waits for it.
        weights = look.of_pixels(look.rows(tile)).astype(by_pixel.dtype)
        of_values[tile] += _product(of_out, weights, 1, 1)
        for i, distance in enumerate(look.to_rows(tile)):
            row, of_row = _weight(distance), of_weights[i * width : (i + 1) * width]
            of_rows = []
            for p in points:
                of_columns[p, :width] += row[p : p + 1] * of_row
                of_rows.append((look.column(p) * of_row).sum(0, keepdims=True))
            of_y += _slope(distance) * jnp.concatenate(of_rows)
        return of_y, following

    start = jnp.zeros_like(look.y), of_pixels(look.first)
    of_y, _ = jax.lax.fori_loop(look.first, look.end, add, start)

    def over_columns(factor: Callable) -> jax.Array:
        products = [factor(look.to_columns(p)) * of_columns[p, :width] for p in points]
        return jnp.concatenate([x.sum(0, keepdims=True) for x in products])

    return over_columns(_slope) * look.weight, of_y, over_columns(_weight)


def _product(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Sums over axis `of_a` of a matrix and `of_b` of another, float32."""
    dimensions = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
