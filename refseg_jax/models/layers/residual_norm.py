"""Where one layer of a transformer ends and the next begins: norm, dropout, residual and norm."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.dropout import drop, kept
from refseg_jax.models.layers.layer_norm import (
    fits_kernel,
    gradient,
    normalize,
    rows_at_a_time,
    standardize,
)
from refseg_jax.registers import traced_once
from refseg_jax.sharding import kernel_places

Weights = tuple[jax.Array, jax.Array]


def residual_norm(
    x: jax.Array,
    update: jax.Array,
    before: Weights,
    after: Weights,
    epsilon: float,
    rate: float,
    words: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """x + dropout(norm(update)), and the norm of that.

    On a TPU, bfloat16 rows that fill its registers go through one kernel, which reads and writes
    each array once; XLA takes longer for the dropout alone (docs/scale.md).

    Args:
        x: [B,n,C], the residual.
        update: [B,n,C] of the same dtype, which is that of the results.
        before: scale and bias, float32 [C], of the norm of the update.
        after: those of the norm of the sum.
        epsilon: of both norms.
        rate: of the dropout; 0 for none.
        words: its random words, int32 [B,2] (see dropout.py), if there is any.

    Returns:
        Both [B,n,C].
    """
    words = jnp.zeros((len(x), 2), jnp.int32) if words is None else words
    arguments = x, update, words, before, after
    plain = functools.partial(add_and_normalize, epsilon, rate)
    if fits_kernel(x) and x.ndim == 3:
        kernel = functools.partial(in_kernel, epsilon, rate)
        return jax.lax.platform_dependent(*arguments, tpu=kernel, default=plain)
    return plain(*arguments)


def add_and_normalize(epsilon, rate, x, update, words, before, after):
    """`residual_norm` in XLA's operations."""
    update = normalize(update, *before, epsilon)
    total = x + (drop(rate, update, words) if rate else update)
    return total, normalize(total, *after, epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_kernel(
    epsilon: float,
    rate: float,
    x: jax.Array,
    update: jax.Array,
    words: jax.Array,
    before: Weights,
    after: Weights,
) -> tuple[jax.Array, jax.Array]:
    """`residual_norm` as a kernel for TPUs."""
    samples, whole = kernel_places()
    return jax.shard_map(
        functools.partial(_forward, epsilon, rate),
        in_specs=(samples, samples, samples, whole, whole),
        out_specs=samples,
        check_vma=False,
    )(words, x, update, before, after)


def _in_kernel_forward(epsilon, rate, x, update, words, before, after):
    total, y = in_kernel(epsilon, rate, x, update, words, before, after)
    return (total, y), (words, update, total, before, after)


def _in_kernel_backward(epsilon, rate, saved, cotangents):
    words, update, total, before, after = saved
    samples, whole = kernel_places()

    def run(words, *arrays):
        of_x, of_update, *sums = _backward(epsilon, rate, words, *arrays)
        sums = [jax.lax.psum(s.sum((0, 1)), *samples) for s in sums]
        return of_x, of_update, tuple(sums[:2]), tuple(sums[2:])

    of_x, of_update, of_before, of_after = jax.shard_map(
        run,
        in_specs=(*[samples] * 5, whole, whole),
        out_specs=(samples, samples, whole, whole),
        check_vma=False,
    )(words, update, total, *cotangents, before[0], after[0])
    return of_x, of_update, None, of_before, of_after


in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


@traced_once(0, 1)
def _forward(epsilon, rate, words, x, update, before, after):
    """(the sum, its norm)."""
    kernel = functools.partial(_forward_kernel, epsilon, rate)
    return _call("residual_norm", kernel, words, (x, update), (*before, *after), 0)


@traced_once(0, 1)
def _backward(epsilon, rate, words, update, total, of_total, of_y, before, after):
    """Gradients of x and update, and parts of those of both norms' scales and biases."""
    kernel = functools.partial(_backward_kernel, epsilon, rate)
    arrays = update, total, of_total, of_y
    return _call("residual_norm_backward", kernel, words, arrays, (before, after), 4)


def _call(name, kernel, words, arrays, vectors, totals):
    """A kernel for blocks of rows of `arrays` [B,n,C], with `words` and `vectors` [C] for all.

    It makes two arrays like them, and sums of each sample's rows, float32 [B,1,C].
    """
    (B, n, C), dtype = arrays[0].shape, arrays[0].dtype
    rows = rows_at_a_time(n, C)
    block = pl.BlockSpec((None, rows, C), lambda b, i: (b, i, 0))
    vector = pl.BlockSpec((1, C), lambda b, i: (0, 0))
    total = pl.BlockSpec((None, 1, C), lambda b, i: (b, 0, 0))
    like_array = jax.ShapeDtypeStruct((B, n, C), dtype)
    like_total = jax.ShapeDtypeStruct((B, 1, C), jnp.float32)
    return pl.pallas_call(
        functools.partial(kernel, n if n % rows else None),
        name=name,
        grid=(B, -(-n // rows)),
        in_specs=[
            pl.BlockSpec((None, 1, 2), lambda b, i: (b, 0, 0), memory_space=pltpu.SMEM),
            *[block] * len(arrays),
            *[vector] * len(vectors),
        ],
        out_specs=[block] * 2 + [total] * totals,
        out_shape=[like_array] * 2 + [like_total] * totals,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=20 * len(arrays) * like_array.size,
            bytes_accessed=(len(arrays) + 2) * like_array.size * dtype.itemsize,
            transcendentals=2 * B * n,
        ),
    )(words[:, None], *arrays, *(v.astype(jnp.float32)[None] for v in vectors))


def _forward_kernel(epsilon, rate, _, words, x, update, *refs):
    *vectors, total, y = refs
    scale_before, bias_before, scale, bias = (v[...] for v in vectors)
    standard, _ = standardize(update[...].astype(jnp.float32), epsilon)
    change = _drop(rate, words, standard * scale_before + bias_before)
    # As it is written, so that the gradients are those of what is read.
    total[...] = (x[...].astype(jnp.float32) + change).astype(total.dtype)
    standard, _ = standardize(total[...].astype(jnp.float32), epsilon)
    y[...] = (standard * scale + bias).astype(y.dtype)


def _backward_kernel(epsilon, rate, end, words, update, total, of_total, of_y, *refs):
    scale_before, scale, of_x, of_update, *sums = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        for s in sums:
            s[...] = jnp.zeros_like(s)

    def rows(ref):
        """In float32; beyond the last there is anything, which must not be added up."""
        values = ref[...].astype(jnp.float32)
        if end is None:
            return values
        row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0) + pl.program_id(1) * len(values)
        return jnp.where(row < end, values, 0.0)

    def back(values, cotangent, scale, of_scale, of_bias):
        standard, factor = standardize(values, epsilon)
        of_scale[...] += (cotangent * standard).sum(0, keepdims=True)
        of_bias[...] += cotangent.sum(0, keepdims=True)
        return gradient(standard, factor, cotangent * scale[...])

    change = rows(of_total) + back(rows(total), rows(of_y), scale, *sums[2:])
    of_x[...] = change.astype(of_x.dtype)
    change = back(rows(update), _drop(rate, words, change), scale_before, *sums[:2])
    of_update[...] = change.astype(of_update.dtype)


def _drop(rate: float, words: Any, x: jax.Array) -> jax.Array:
    """`drop` of a block of a sample's rows."""
    if not rate:
        return x
    row = jax.lax.broadcasted_iota(jnp.int32, (len(x), 1), 0) + pl.program_id(1) * len(x)
    channel = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    keep = kept(rate, words[0, 0], words[0, 1], row, channel)
    return jnp.where(keep, x * (1 / (1 - rate)), 0.0)
