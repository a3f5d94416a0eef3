"""Multi-scale deformable attention (Zhu et al., Deformable DETR) and the encoder built from it."""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.models.layers.deformable_kernel import Shapes, fits_kernel, sample_in_kernel
from refseg_jax.models.layers.dense import Dense
from refseg_jax.models.layers.positions import sine_positions
from refseg_jax.models.layers.transformer import AddNorm, FeedForward
from refseg_jax.sharding import on_gpus

# Up to this many positions over all levels a CPU samples by a matrix product. That is three times
# as fast at 336 positions, equally fast at 1344 and slower beyond, where the matrix also outgrows
# the gathered rows (`benchmarks/deformable.py`).
MATRIX_LIMIT = 1024


def ms_deform_attn(
    value: jax.Array,
    spatial_shapes: Shapes,
    sampling_locations: jax.Array,
    attention_weights: jax.Array,
    form: str | None = None,
) -> jax.Array:
    """Weighted sum of values sampled bilinearly at P points on each of L levels.

    A location (x, y) in [0, 1] spans a level from edge to edge (pixel centres at (i + 0.5) / size);
    what lies outside counts as zero.

    Args:
        value: [B,S,M,D], M heads of D channels; the levels' pixels one after another, row by row.
        spatial_shapes: (h, w) of each level, static; S = sum of h * w.
        sampling_locations: float32 [B,Lq,M,L,P,2], last axis (x, y).
        attention_weights: float32 [B,Lq,M,L,P].
        form: how to come to the same result: "gather" the pixels' rows, multiply by the "matrix"
            of all weights, or "separable", without gather or scatter. None is what suits the
            platform: on a TPU a kernel for values that fit it (`fits_kernel`) and separable for
            others, elsewhere the matrix up to `MATRIX_LIMIT` positions.

    Returns:
        [B,Lq,M*D] in the dtype of `value`.

    Raises:
        ValueError: the levels do not add up to S, or there is no such form.
    """
    s = value.shape[1]
    if sum(h * w for h, w in spatial_shapes) != s:
        raise ValueError(f"levels {spatial_shapes} do not make up the {s} positions of the values")
    gather = _sample_on_gpu if on_gpus() else _sample_by_gather
    forms = {
        name: functools.partial(function, spatial_shapes)
        for name, function in (
            ("gather", functools.partial(_sample_taps, gather)),
            ("matrix", functools.partial(_sample_taps, _sample_by_matrix)),
            ("separable", _sample_separably),
        )
    }
    arguments = value, sampling_locations, attention_weights
    if form is None:
        default = forms["matrix" if s <= MATRIX_LIMIT else "gather"]
        tpu = forms["separable"]
        if fits_kernel(value, spatial_shapes):
            tpu = functools.partial(sample_in_kernel, spatial_shapes)
        return jax.lax.platform_dependent(*arguments, tpu=tpu, default=default)
    if form not in forms:
        raise ValueError(f"form {form!r} is not one of {', '.join(forms)}")
    return forms[form](*arguments)


def _sample_taps(
    sample: Callable,
    spatial_shapes: Shapes,
    value: jax.Array,
    locations: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """`ms_deform_attn` by a `sample` that is told of each pixel to read."""
    b, _, m, d = value.shape
    index, weight = _bilinear_taps(spatial_shapes, locations, weights)
    # Mapped over images rather than flattened with them into one table of rows: a batch that is
    # spread over devices then stays where it is.
    out = jax.vmap(sample)(*(x.swapaxes(1, 2) for x in (value, index, weight)))
    return out.swapaxes(1, 2).reshape(b, -1, m * d).astype(value.dtype)


def _bilinear_taps(
    spatial_shapes: Shapes, locations: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The K = 4LP pixels that each query and head reads: int32 and float32 [B,Lq,M,K]."""
    height, width = np.array(spatial_shapes, np.int32).T[:, :, None]
    start = np.cumsum(height * width, axis=0) - height * width
    # Corner by corner, not by broadcasting over an axis of corners: the gradient of that is a sum
    # over an axis of two, on which XLA's CPU backend (jaxlib 0.10) crashes for large arrays.
    taps = [
        (start + width * y + x, weights * y_weight * x_weight)
        for y, y_weight in _linear_taps(locations[..., 1], height)
        for x, x_weight in _linear_taps(locations[..., 0], width)
    ]
    index, weight = (jnp.stack(corners, axis=-1) for corners in zip(*taps, strict=True))
    flat = (*index.shape[:3], -1)
    return index.reshape(flat), weight.reshape(flat)


def _linear_taps(location: jax.Array, size: np.ndarray) -> list[tuple[jax.Array, jax.Array]]:
    """The two pixels around `location` [...,L,P] on axes of `size` [L,1], with their weights.

    A pixel outside its axis becomes pixel 0 with weight 0.
    """
    position = location * size - 0.5
    low = jnp.floor(position)
    taps = []
    for pixel, weight in (low, 1 - (position - low)), (low + 1, position - low):
        inside = (pixel >= 0) & (pixel < size)
        taps.append((jnp.where(inside, pixel, 0).astype(jnp.int32), jnp.where(inside, weight, 0)))
    return taps


# Without the checkpoint the backward pass would keep all gathered rows: K times the values.
@jax.checkpoint
def _sample_by_gather(value: jax.Array, index: jax.Array, weight: jax.Array) -> jax.Array:
    """Sums the rows of `value` [M,S,D] that each query reads, of one image: [M,Lq,D]."""
    heads, positions, width = value.shape
    row = index + positions * np.arange(heads)[:, None, None]
    rows = jnp.take(value.reshape(-1, width), row, axis=0, mode="clip")
    return _contract("mqk,mqkd->mqd", weight, rows)


def _sample_on_gpu(value: jax.Array, index: jax.Array, weight: jax.Array) -> jax.Array:
    """`_sample_by_gather` as XLA's GPU compiler does it with the least traffic."""
    heads, positions, width = value.shape
    row = index + positions * np.arange(heads)[:, None, None]
    return _sum_of_rows(value.reshape(-1, width), row, weight)


@jax.custom_vjp
def _sum_of_rows(value: jax.Array, row: jax.Array, weight: jax.Array) -> jax.Array:
    """sum_k weight_qk value_row(qk) -> float32 [...,D].

    `value` is [N,D], `row` int32 and `weight` float32 [...,K]. Row by row, so that no array has all
    rows, which are K times the values. The backward pass adds up in float32 what `value` may have
    in bfloat16.
    """
    return sum(weight[..., k, None] * _rows(value, row[..., k]) for k in range(row.shape[-1]))


def _rows(value: jax.Array, row: jax.Array) -> jax.Array:
    return jnp.take(value.astype(jnp.float32), row, axis=0, mode="clip")


def _sum_of_rows_forward(value, row, weight):
    return _sum_of_rows(value, row, weight), (value, row, weight)


def _sum_of_rows_backward(saved, cotangent):
    value, row, weight = saved
    of_weight = jnp.einsum("...kd,...d->...k", _rows(value, row), cotangent)
    of_rows = weight[..., None] * cotangent[..., None, :]
    of_value = jnp.zeros(value.shape).at[row].add(of_rows, mode="promise_in_bounds")
    return of_value.astype(value.dtype), None, of_weight


_sum_of_rows.defvjp(_sum_of_rows_forward, _sum_of_rows_backward)


def _sample_by_matrix(value: jax.Array, index: jax.Array, weight: jax.Array) -> jax.Array:
    """As `_sample_by_gather`, with the weights [M,Lq,K] laid out as a matrix times `value`."""
    heads, queries, _ = index.shape
    shape = heads, queries, value.shape[1]
    cell = index + shape[2] * np.arange(heads * queries).reshape(heads, queries, 1)
    # In one dimension: the backward pass, a gather, is twice as fast on a CPU as in three.
    matrix = jnp.zeros(math.prod(shape))
    matrix = matrix.at[cell.ravel()].add(weight.ravel(), mode="promise_in_bounds")
    return _contract("mqs,msd->mqd", matrix.reshape(shape), value)


def _sample_separably(
    spatial_shapes: Shapes, value: jax.Array, locations: jax.Array, weights: jax.Array
) -> jax.Array:
    """`ms_deform_attn` without gather or scatter, of which a TPU does one row at a time.

    The pixels that a point reads, laid out over a level, are the outer product of its two taps on
    each axis. Head by head, as the matrix of all weights is as large as that of an attention.
    """
    b, _, m, d = value.shape
    levels = jnp.split(value, np.cumsum([h * w for h, w in spatial_shapes])[:-1], axis=1)
    levels = [
        level.reshape(b, h, w, m, d).transpose(3, 0, 1, 2, 4)
        for level, (h, w) in zip(levels, spatial_shapes, strict=True)
    ]
    size = np.array(spatial_shapes, np.float32)[:, None, ::-1]
    # [M,L,P,...,B,Lq]: what differs from query to query lies along the last axis.
    pixels = (locations * size - 0.5).transpose(2, 3, 4, 5, 0, 1)
    weights = weights.transpose(2, 3, 4, 0, 1)

    @jax.checkpoint
    def head(arguments):
        levels, pixels, weights = arguments
        total = 0
        for level, points, of_points in zip(levels, pixels, weights, strict=True):
            _, h, w, _ = level.shape
            columns = [_axis_weights(x, w) for x, _ in points]
            rows = [
                _axis_weights(y, h) * a[:, None]
                for (_, y), a in zip(points, of_points, strict=True)
            ]
            total += _sum_of_products(rows, columns, level)
        return total.astype(value.dtype)

    out = jax.lax.map(head, (levels, pixels, weights))
    return out.transpose(1, 3, 0, 2).reshape(b, -1, m * d)


def _axis_weights(pixel: jax.Array, size: int) -> jax.Array:
    """Linear interpolation at `pixel` [B,Lq]: the weights of all `size` pixels, [B,size,Lq]."""
    low = jnp.floor(pixel)
    above = (pixel - low)[:, None]
    is_low = np.arange(size, dtype=np.float32)[:, None] - low[:, None]
    return jnp.where(is_low == 0, 1 - above, jnp.where(is_low == 1, above, 0))


@jax.custom_vjp
def _sum_of_products(
    rows: list[jax.Array], columns: list[jax.Array], value: jax.Array
) -> jax.Array:
    """sum_{p,y,x} rows[p]_yq columns[p]_xq value_yxd -> float32 [B,D,Lq].

    The backward pass is our own: it has no array of the pixels by the queries but this matrix of
    weights, which XLA makes inside of the product.

    Args:
        rows: P of float32 [B,h,Lq].
        columns: P of float32 [B,w,Lq].
        value: [B,h,w,D]; its dtype is that of the products.
    """
    return _contract("byxq,byxd->bdq", _outer_sum(rows, columns), value)


def _outer_sum(rows, columns):
    return sum(y[:, :, None] * x[:, None] for y, x in zip(rows, columns, strict=True))


def _sum_of_products_forward(rows, columns, value):
    return _sum_of_products(rows, columns, value), (rows, columns, value)


def _sum_of_products_backward(saved, cotangent):
    rows, columns, value = saved
    cotangent = cotangent.astype(value.dtype)

    def times_cotangent(weights):
        return weights.astype(value.dtype)[:, :, None] * cotangent[:, None]

    of_rows = [_contract("byxd,bxdq->byq", value, times_cotangent(x)) for x in columns]
    of_columns = [_contract("byxd,bydq->bxq", value, times_cotangent(y)) for y in rows]
    of_value = _contract("byxq,bdq->byxd", _outer_sum(rows, columns), cotangent)
    return of_rows, of_columns, of_value.astype(value.dtype)


_sum_of_products.defvjp(_sum_of_products_forward, _sum_of_products_backward)


def _contract(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product in the dtype of the second that adds up in float32."""
    return jnp.einsum(spec, left.astype(right.dtype), right, preferred_element_type=jnp.float32)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention: each query reads `points` places per head and level.

    Where it reads and how much it weighs each place are linear functions of the query, in float32.
    """

    dim: int
    heads: int
    levels: int
    points: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        query: jax.Array,
        reference_points: jax.Array,
        inputs: jax.Array,
        spatial_shapes: Shapes,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """`query` [B,Lq,dim] over `inputs` [B,S,dim] -> [B,Lq,dim].

        Args:
            query: what decides the places and their weights.
            reference_points: float32 [B or 1,Lq,L,2], (x, y) in [0, 1] on each level.
            inputs: the levels' pixels one after another, row by row.
            spatial_shapes: (h, w) of each level, static.
            mask: bool [B,S], True = real; padding is read as zero.

        Raises:
            ValueError: `dim` is not a multiple of `heads`, or the levels do not add up to S.
        """
        if self.dim % self.heads:
            raise ValueError(f"attention width {self.dim} is not a multiple of {self.heads} heads")
        b, lq, _ = query.shape
        xavier = nn.initializers.xavier_uniform()

        value = Dense(self.dim, dtype=self.dtype, kernel_init=xavier, name="value_proj")(inputs)
        if mask is not None:
            value = jnp.where(mask[..., None], value, 0)
        value = value.reshape(b, -1, self.heads, self.dim // self.heads)

        grid = (self.heads, self.levels, self.points)
        offsets = Dense(
            2 * math.prod(grid),
            dtype=jnp.float32,
            kernel_init=nn.initializers.zeros,
            bias_init=lambda *_: jnp.asarray(_ring(*grid)),
            name="sampling_offsets",
        )(query).reshape(b, lq, *grid, 2)
        weights = Dense(
            math.prod(grid),
            dtype=jnp.float32,
            kernel_init=nn.initializers.zeros,
            name="attention_weights",
        )(query).reshape(b, lq, self.heads, -1)
        weights = nn.softmax(weights).reshape(b, lq, *grid)

        size = np.array(spatial_shapes, np.float32)[:, None, ::-1]
        locations = reference_points[:, :, None, :, None] + offsets / size
        out = ms_deform_attn(value, spatial_shapes, locations, weights)
        return Dense(self.dim, dtype=self.dtype, kernel_init=xavier, name="output_proj")(out)


def _ring(heads: int, levels: int, points: int) -> np.ndarray:
    """Initial offsets in pixels, float32 [heads * levels * points * 2].

    Each head looks its own way, around the border of a square; point p lies p + 1 pixels out.
    """
    angle = 2 * math.pi * np.arange(heads) / heads
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    direction /= np.abs(direction).max(axis=-1, keepdims=True)
    distance = np.arange(1, points + 1)[:, None]
    ring = np.broadcast_to(direction[:, None, None] * distance, (heads, levels, points, 2))
    return ring.astype(np.float32).ravel()


class DeformableEncoderLayer(nn.Module):
    """`MSDeformAttn` of all levels over all levels, then a feed-forward block; post-norm."""

    dim: int
    heads: int
    levels: int
    points: int = 4
    ffn_dim: int = 1024
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        position: jax.Array,
        reference_points: jax.Array,
        spatial_shapes: Shapes,
        mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """`x` [B,S,dim] -> [B,S,dim]; `position` [S,dim] is added to the queries only.

        `reference_points`, `spatial_shapes` and `mask` are those of `MSDeformAttn`.
        """
        attention = MSDeformAttn(
            self.dim, self.heads, self.levels, self.points, self.dtype, name="attention"
        )
        update = attention(x + position, reference_points, x, spatial_shapes, mask)
        x = AddNorm(self.dropout, self.dtype, name="attention_end")(x, update, train)
        return FeedForward(self.dim, self.ffn_dim, self.dropout, self.dtype, name="feed_forward")(
            x, train
        )


class DeformableEncoder(nn.Module):
    """`layers` deformable layers over a pyramid of feature maps, as in Mask2Former.

    Queries carry sine positions and a learned embedding of their level. `remat` recomputes each
    layer in the backward pass instead of keeping its activations.
    """

    layers: int
    dim: int
    heads: int
    points: int = 4
    ffn_dim: int = 1024
    dropout: float = 0.0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Sequence[jax.Array], train: bool = False) -> list[jax.Array]:
        """Feature maps, each [B,h,w,dim], to as many of the same shapes, in the same order."""
        shapes = tuple(f.shape[1:3] for f in features)
        level_embedding = self.param(
            "level_embedding", nn.initializers.normal(1.0), (len(shapes), self.dim)
        )
        position = jnp.concatenate(
            [
                sine_positions(*shape, self.dim) + level_embedding[i]
                for i, shape in enumerate(shapes)
            ]
        )
        reference_points = np.repeat(pixel_centres(shapes)[None, :, None], len(shapes), axis=2)

        layer = DeformableEncoderLayer
        if self.remat:
            layer = nn.remat(layer, static_argnums=(4, 6))
        x = jnp.concatenate([f.reshape(len(f), -1, self.dim) for f in features], axis=1)
        for i in range(self.layers):
            x = layer(
                self.dim,
                self.heads,
                len(shapes),
                self.points,
                self.ffn_dim,
                self.dropout,
                self.dtype,
                name=f"layer{i}",
            )(x, position, reference_points, shapes, None, train)
        ends = np.cumsum([h * w for h, w in shapes])[:-1]
        return [
            level.reshape(f.shape)
            for level, f in zip(jnp.split(x, ends, axis=1), features, strict=True)
        ]


def pixel_centres(spatial_shapes: Shapes) -> np.ndarray:
    """(x, y) in [0, 1] of every pixel of every level, float32 [S,2], row by row."""
    levels = [
        np.stack(np.meshgrid((np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h), axis=-1)
        for h, w in spatial_shapes
    ]
    return np.concatenate([level.reshape(-1, 2) for level in levels]).astype(np.float32)
