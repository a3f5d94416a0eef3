"""Attention inside windows: as XLA compiles it well, and as a kernel of our own for TPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

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


# The kernel. It takes one window and as many heads at a time as fill the lanes of a register.
LANES = 128
ROWS = 16  # Of bfloat16 in a register.


def fits_kernel(q: jax.Array, heads: int, windows: int) -> bool:
    """Whether `attend_in_kernel` takes arrays like `q` [W,n,C].

    They fill registers, and every device of the mesh in use has whole samples, of so many windows;
    without a mesh (`sharding.on_mesh`) nothing is known of the devices.
    """
    W, n, C = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    return (
        (q.dtype == jnp.bfloat16 and n % ROWS == 0)
        and (C % LANES == 0 and LANES % (C // heads) == 0)
        and (not mesh.empty and W % (mesh.size * windows) == 0)
    )


@jax.custom_vjp
def attend_in_kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, regions: np.ndarray | None
) -> jax.Array:
    """`window_attention` as a kernel for TPUs of arrays that `fits_kernel`."""
    return _divided(_forward_kernel, (q, k, v, bias, *_both_ways(regions)))


def _in_kernel_forward(q, k, v, bias, regions):
    return attend_in_kernel(q, k, v, bias, regions), (q, k, v, bias, regions)


def _in_kernel_backward(saved, cotangent):
    # The logits are computed once more: that takes less than to write and read them.
    *arrays, regions = saved
    operands = (*arrays, *_both_ways(regions), cotangent)
    return *_divided(_backward_kernel, operands), None


attend_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


def _both_ways(regions: np.ndarray | None) -> tuple[jax.Array, ...]:
    """The cells' regions along rows and along columns: [R,n,1] and [R,1,n], or nothing."""
    if regions is None:
        return ()
    regions = jnp.asarray(regions)
    return regions[:, :, None], regions[:, None, :]


def _divided(kernel: Callable, operands: tuple[jax.Array, ...]) -> Any:
    """Runs `kernel` where the windows are: XLA cannot divide it among devices by itself."""
    backward = kernel is _backward_kernel
    mesh = jax.sharding.get_abstract_mesh()
    windows, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    places = [windows] * 3 + [whole] * (len(operands) - 3)
    if backward:
        places[-1] = windows

    def run(*operands):
        results = _run(kernel, *operands)
        if backward:
            *results, of_bias = results
            results = *results, jax.lax.psum(of_bias, mesh.axis_names)
        return results

    results = (windows, windows, windows, whole) if backward else windows
    return jax.shard_map(run, in_specs=tuple(places), out_specs=results, check_vma=False)(*operands)


def _run(kernel: Callable, *operands: jax.Array) -> Any:
    """`kernel` for every group of heads and window, the windows one after another."""
    q, _, _, bias, *others = operands
    (W, n, C), heads = q.shape, len(bias)
    backward, regions = kernel is _backward_kernel, len(others) > 1
    x = pl.BlockSpec((1, n, LANES), lambda g, w: (w, 0, g))
    # The same block for all windows: it is read once, and in the backward pass added up to.
    b = pl.BlockSpec((LANES * heads // C, n, n), lambda g, w: (g, 0, 0))
    specs = [x, x, x, b]
    if regions:
        R = len(others[0])
        specs += [
            pl.BlockSpec((1, n, 1), lambda g, w: (jax.lax.rem(w, R), 0, 0)),
            pl.BlockSpec((1, 1, n), lambda g, w: (jax.lax.rem(w, R), 0, 0)),
        ]
    like_q, like_bias = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, bias))
    products = 5 if backward else 2
    return pl.pallas_call(
        functools.partial(kernel, regions),
        name="window_attention_backward" if backward else "window_attention",
        grid=(C // LANES, W),
        in_specs=specs + [x] * backward,
        out_specs=(x, x, x, b) if backward else x,
        out_shape=(like_q, like_q, like_q, like_bias) if backward else like_q,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * W * n * n * C,
            bytes_accessed=(7 if backward else 4) * q.size * q.dtype.itemsize,
            transcendentals=W * heads * n * n,
        ),
    )(*operands)


def _forward_kernel(regions: bool, q, k, v, bias, *others):
    *regions, y = others
    heads, n, _ = bias.shape
    weights = _weights(q[0], k[0], bias[...], *(r[0] for r in regions)).astype(v.dtype)
    y[0] = _side_by_side(_product(weights, v[0], 1, 0), heads).astype(y.dtype)


def _backward_kernel(regions: bool, q, k, v, bias, *others):
    *regions, cotangent, of_q, of_k, of_v, of_bias = others
    heads, n, _ = bias.shape
    weights = _weights(q[0], k[0], bias[...], *(r[0] for r in regions))
    of_y = _one_by_one(cotangent[0], heads)
    of_weights = _product(of_y, v[0], 1, 1)
    of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True))

    @pl.when(pl.program_id(1) == 0)
    def _():
        of_bias[...] = jnp.zeros_like(of_bias)

    of_bias[...] += of_logits.reshape(of_bias.shape)
    of_logits = of_logits.astype(q.dtype)
    of_q[0] = _side_by_side(_product(of_logits, k[0], 1, 0), heads).astype(of_q.dtype)
    of_k[0] = _product(of_logits, _one_by_one(q[0], heads), 0, 0).astype(of_k.dtype)
    of_v[0] = _product(weights.astype(v.dtype), of_y, 0, 0).astype(of_v.dtype)


def _weights(
    q: jax.Array, k: jax.Array, bias: jax.Array, row: jax.Array = None, column: jax.Array = None
) -> jax.Array:
    """Softmax over the cells, float32 [heads · n, n], of q, k [n, 128], heads one after another."""
    heads, n, _ = bias.shape
    logits = _product(_one_by_one(q, heads), k, 1, 1) + bias.reshape(heads * n, n)
    if row is not None:
        apart = jnp.where(row == column, 0.0, APART)
        logits += jnp.concatenate([apart] * heads)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _product(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Sums over axis `of_a` of a matrix and `of_b` of another, float32."""
    dimensions = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _head(shape: tuple[int, int], heads: int) -> jax.Array:
    """Whose channel each lane of [n, 128] is."""
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jax.lax.div(lane, LANES // heads)


def _one_by_one(x: jax.Array, heads: int) -> jax.Array:
    """[n, 128] -> [heads · n, 128]: a copy for each head in which all others' lanes are 0.

    A product with them is one of full registers, and reads the other matrix once for all heads.
    """
    head = _head(x.shape, heads)
    return jnp.concatenate([jnp.where(head == i, x, jnp.zeros_like(x)) for i in range(heads)])


def _side_by_side(x: jax.Array, heads: int) -> jax.Array:
    """[heads · n, 128] -> [n, 128]: each head's lanes from its own rows."""
    parts = jnp.split(x, heads)
    head = _head(parts[0].shape, heads)
    return functools.reduce(lambda y, i: jnp.where(head == i, parts[i], y), range(heads), parts[0])
