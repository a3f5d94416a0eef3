"""Attention inside windows: as XLA compiles it well, and as a kernel of our own for TPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.sharding import kernel_places

# What is added to the logits of cells that are no neighbours on the map.
APART = -100.0


def window_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, regions: np.ndarray | None
) -> jax.Array:
    """softmax(q k^T + bias) v of each head and window, where cells of one region see each other.

    Logits and softmax are computed in float32. On a TPU, bfloat16 arrays that fill its registers go
    through a kernel, in which a window's logits never leave the chip; in all else they are kept in
    the dtype of `q`. See `fits_kernel`.

    Args:
        q: [W,n,C], scaled; W windows of n cells, the channels of one head after those of another.
        k: as `q`.
        v: as `q`.
        bias: float32 [heads,n,n].
        regions: int [windows of one sample, n], or None for one region.

    Returns:
        [W,n,C] in the dtype of `q`.
    """
    if fits_kernel(q, len(bias), 1 if regions is None else len(regions)):
        return jax.lax.platform_dependent(
            *(q, k, v, bias),
            tpu=functools.partial(attend_in_kernel, regions=regions),
            default=functools.partial(attend, regions=regions),
        )
    return attend(q, k, v, bias, regions)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, regions: np.ndarray | None
) -> jax.Array:
    """`window_attention` in XLA's operations."""

    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], len(bias), -1).swapaxes(1, 2)

    y = _attend(by_head(q), by_head(k), by_head(v), bias, regions)
    return y.swapaxes(1, 2).reshape(q.shape)


@jax.custom_vjp
def _attend(q, k, v, bias, regions):
    """The same of [W,heads,n,d].

    The traffic of the logits is most of what the attention costs. So they are kept in the dtype of
    `q`, and the backward pass is our own: it reads the logits, and neither they nor the weights
    are read just to be summed up.
    """
    return _attend_forward(q, k, v, bias, regions)[0]


def _attend_forward(q, k, v, bias, regions):
    logits = jnp.matmul(q, k.mT, preferred_element_type=jnp.float32)
    if regions is None:
        logits += bias
    else:
        regions = jnp.asarray(regions)
        same = regions[:, None, :, None] == regions[:, None, None, :]
        by_sample = logits.reshape(-1, len(regions), *logits.shape[1:])
        logits = (by_sample + bias + jnp.where(same, 0.0, APART)).reshape(logits.shape)
    logits = logits.astype(q.dtype)
    largest = logits.max(-1, keepdims=True).astype(jnp.float32)
    weights = jnp.exp(logits.astype(jnp.float32) - largest).astype(v.dtype)
    # The product with ones is the softmax's denominator.
    ones = jnp.ones_like(v[..., :1])
    y = jnp.matmul(weights, jnp.concatenate([v, ones], -1), preferred_element_type=jnp.float32)
    y, total = y[..., :-1], y[..., -1:]
    y = (y / total).astype(v.dtype)
    return y, (q, k, v, logits, largest + jnp.log(total), y)


def _attend_backward(saved, cotangent):
    q, k, v, logits, log_total, y = saved
    weights = jnp.exp(logits.astype(jnp.float32) - log_total)
    of_weights = jnp.matmul(cotangent, v.mT, preferred_element_type=jnp.float32)
    # sum_j weights_ij of_weights_ij, from the outputs.
    mean = (cotangent.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)
    of_logits = weights * (of_weights - mean)
    of_bias = of_logits.sum(0)
    of_logits = of_logits.astype(q.dtype)
    of_v = jnp.matmul(weights.astype(v.dtype).mT, cotangent)
    return jnp.matmul(of_logits, k), jnp.matmul(of_logits.mT, q), of_v, of_bias, None


_attend.defvjp(_attend_forward, _attend_backward)


# The kernel. It takes as many heads at a time as fill the lanes of a register, and one place on the
# map of a few samples. Logits have a row for each key and a lane for each query of each head: a sum
# over keys adds up registers, where a sum over lanes would move them, and the queries of all heads
# fill the lanes better than the keys of a window. Each head's queries begin at a register; what
# remains of them beyond full registers comes after those of all heads.
LANES = 128
ROWS = 16  # Of bfloat16 in a register.
SAMPLES = (4, 2, 1)  # At a time: while one waits for its products, another computes.
MOST_LOGITS = 1 << 19  # At a time: their like in the backward pass takes most of 16 MiB.


def fits_kernel(q: jax.Array, heads: int, windows: int) -> bool:
    """Whether `attend_in_kernel` takes arrays like `q` [W,n,C].

    They fill registers, what is computed of a window fits a chip's vector memory, and every device
    of the mesh in use has whole samples, of so many windows; without a mesh (`sharding.on_mesh`)
    nothing is known of the devices.
    """
    W, n, C = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    return (
        (q.dtype == jnp.bfloat16 and n % ROWS == 0)
        and (C % LANES == 0 and LANES % (C // heads) == 0)
        and LANES * heads // C * n * n <= MOST_LOGITS
        and (not mesh.empty and W % (mesh.size * windows) == 0)
    )


@jax.custom_vjp
def attend_in_kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, regions: np.ndarray | None
) -> jax.Array:
    """`window_attention` as a kernel for TPUs of arrays that `fits_kernel`."""
    return _divided(_forward_kernel, (q, k, v), bias, regions)


def _in_kernel_forward(q, k, v, bias, regions):
    return attend_in_kernel(q, k, v, bias, regions), (q, k, v, bias, regions)


def _in_kernel_backward(saved, cotangent):
    # The logits are computed once more: that takes less than to write and read them.
    *arrays, bias, regions = saved
    return *_divided(_backward_kernel, (*arrays, cotangent), bias, regions), None


attend_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


def _in_lanes(x: jax.Array) -> jax.Array:
    """[...,heads,n] -> [...,heads · n], queries as they lie in lanes."""
    parts = jnp.split(x, [_in_full_registers(x.shape[-1])], -1)
    return jnp.concatenate([part.reshape(*x.shape[:-2], -1) for part in parts], -1)


def _out_of_lanes(x: jax.Array, heads: int) -> jax.Array:
    """The reverse of `_in_lanes`."""
    parts = jnp.split(x, [heads * _in_full_registers(x.shape[-1] // heads)], -1)
    return jnp.concatenate([part.reshape(*x.shape[:-1], heads, -1) for part in parts], -1)


def _in_full_registers(n: int) -> int:
    return n // LANES * LANES


def _divided(
    kernel: Callable, arrays: tuple[jax.Array, ...], bias: jax.Array, regions: np.ndarray | None
) -> Any:
    """Runs `kernel` where the windows are: XLA cannot divide it among devices by itself."""
    backward = kernel is _backward_kernel
    groups, (all_heads, n, _) = arrays[0].shape[-1] // LANES, bias.shape
    heads = all_heads // groups
    bias = _in_lanes(bias.reshape(groups, heads, n, n).transpose(0, 3, 1, 2))
    operands = [*arrays, bias]
    if regions is not None:
        regions = jnp.asarray(regions)
        of_queries = jnp.broadcast_to(regions[:, None, None], (len(regions), 1, heads, n))
        operands += [regions[:, :, None], _in_lanes(of_queries)]
    windows, whole = kernel_places()
    places = tuple(windows if i < len(arrays) else whole for i in range(len(operands)))

    def run(*operands):
        results = _run(kernel, operands[: len(arrays)], *operands[len(arrays) :])
        if backward:
            *results, of_bias = results
            results = *results, jax.lax.psum(of_bias, *windows)
        return results

    results = (windows, windows, windows, whole) if backward else windows
    results = jax.shard_map(run, in_specs=places, out_specs=results, check_vma=False)(*operands)
    if backward:
        *results, of_bias = results
        of_bias = _out_of_lanes(of_bias, heads).transpose(0, 2, 3, 1)
        results = *results, of_bias.reshape(all_heads, n, n)
    return results


def _run(kernel: Callable, arrays: tuple[jax.Array, ...], bias: jax.Array, *regions) -> Any:
    """`kernel` for every group of heads and place on the map, the places one after another."""
    backward = kernel is _backward_kernel
    W, n, C = arrays[0].shape
    R = len(regions[0]) if regions else 1
    most = MOST_LOGITS // (n * bias.shape[2])
    T = next(t for t in SAMPLES if W % (t * R) == 0 and t <= most)
    # Windows W // T apart are of the same place, and so of the same regions.
    arrays = [x.reshape(T, W // T, n, C) for x in arrays]
    x = pl.BlockSpec((T, 1, n, LANES), lambda g, w: (0, w, 0, g))
    # The same block for all windows: it is read once, and in the backward pass added up to.
    b = pl.BlockSpec((1, *bias.shape[1:]), lambda g, w: (g, 0, 0))
    of_place = [
        pl.BlockSpec((1, *r.shape[1:]), lambda g, w: (jax.lax.rem(w, R), 0, 0)) for r in regions
    ]
    like_x, like_bias = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (arrays[0], bias))
    products = 5 if backward else 2
    results = pl.pallas_call(
        kernel,
        name="window_attention_backward" if backward else "window_attention",
        grid=(C // LANES, W // T),
        in_specs=[x] * len(arrays) + [b] + of_place,
        out_specs=(x, x, x, b) if backward else x,
        out_shape=(like_x, like_x, like_x, like_bias) if backward else like_x,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * W * n * n * C,
            bytes_accessed=(7 if backward else 4) * like_x.size * like_x.dtype.itemsize,
            transcendentals=W * bias.size,
        ),
    )(*arrays, bias, *regions)
    if not backward:
        return results.reshape(W, n, C)
    *results, of_bias = results
    return *(x.reshape(W, n, C) for x in results), of_bias


def _forward_kernel(q, k, v, bias, *others):
    *regions, y = others
    bias = _bias(bias, *regions)
    heads = bias.shape[1] // len(bias)
    for t in range(len(q)):
        weights = _weights(_one_by_one(q[t, 0], heads), k[t, 0], bias).astype(v.dtype)
        y[t, 0] = _sum_over_keys(weights, v[t, 0], heads).astype(y.dtype)


def _backward_kernel(q, k, v, cotangent, bias, *others):
    *regions, of_q, of_k, of_v, of_bias = others

    @pl.when(pl.program_id(1) == 0)
    def _():
        of_bias[...] = jnp.zeros_like(of_bias)

    bias = _bias(bias, *regions)
    heads = bias.shape[1] // len(bias)
    total = jnp.zeros_like(bias)
    for t in range(len(q)):
        queries, of_y = (_one_by_one(x[t, 0], heads) for x in (q, cotangent))
        weights = _weights(queries, k[t, 0], bias)
        of_weights = _product(v[t, 0], of_y, 1, 1)
        of_logits = weights * (of_weights - (weights * of_weights).sum(0, keepdims=True))
        total += of_logits
        of_logits = of_logits.astype(q.dtype)
        of_q[t, 0] = _sum_over_keys(of_logits, k[t, 0], heads).astype(of_q.dtype)
        of_k[t, 0] = _product(of_logits, queries, 1, 0).astype(of_k.dtype)
        of_v[t, 0] = _product(weights.astype(v.dtype), of_y, 1, 0).astype(of_v.dtype)
    of_bias[0] += total


def _bias(bias, of_keys=None, of_queries=None) -> jax.Array:
    """What is added to the logits, float32 [n, heads · n]."""
    bias = bias[0]
    if of_keys is not None:
        bias += jnp.where(of_keys[0] == of_queries[0], 0.0, APART)
    return bias


def _weights(queries: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
    """Softmax over the keys, float32 [n, heads · n], of `_one_by_one` queries and k [n, 128]."""
    logits = _product(k, queries, 1, 1) + bias
    weights = jnp.exp(logits - logits.max(0, keepdims=True))
    return weights * (1 / weights.sum(0, keepdims=True))


def _product(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Sums over axis `of_a` of a matrix and `of_b` of another, float32."""
    dimensions = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _one_by_one(x: jax.Array, heads: int) -> jax.Array:
    """[n, 128] -> [heads · n, 128]: a copy for each head in which all others' lanes are 0.

    A product with them is one of full registers, and reads the other matrix once for all heads.
    Rows are in the order of `_in_lanes`.
    """
    # Two rows of bfloat16 as one of integers: vector units of before v6e know no bfloat16.
    bits = pltpu.bitcast(x, jnp.int32)
    lane = jax.lax.broadcasted_iota(jnp.int32, bits.shape, 1)
    head = jax.lax.div(lane, LANES // heads)
    full = _in_full_registers(len(x)) * len(bits) // len(x)
    copies = [jnp.where(head == i, bits, 0) for i in range(heads)]
    parts = [c[:full] for c in copies if full] + [c[full:] for c in copies if full < len(bits)]
    return pltpu.bitcast(jnp.concatenate(parts), x.dtype)


def _sum_over_keys(weights: jax.Array, x: jax.Array, heads: int) -> jax.Array:
    """[n, heads · n] and x [n, 128] -> float32 [n, 128], the lanes of each head by its weights.

    It is computed with channels as rows, of which each head's are multiplied alone, so that
    nothing as large as the weights is transposed.
    """
    n, d = len(x), LANES // heads
    full, x = _in_full_registers(n), x.T
    parts = []
    if full:
        own = [
            _product(x[h * d : (h + 1) * d], weights[:, h * full : (h + 1) * full], 1, 0)
            for h in range(heads)
        ]
        parts.append(jnp.concatenate(own).T)
    if rest := n - full:
        y = _product(x, weights[:, heads * full :], 1, 0)
        own = [y[h * d : (h + 1) * d, h * rest : (h + 1) * rest] for h in range(heads)]
        parts.append(jnp.concatenate(own).T)
    return jnp.concatenate(parts)
