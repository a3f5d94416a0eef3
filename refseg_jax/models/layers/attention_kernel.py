"""Attention of a map's cells to each other: in XLA's operations, and as a kernel for TPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.registers import LANES, product, traced_once
from refseg_jax.sharding import divides_samples, kernel_places

# The kernel takes as many heads at a time as fill the lanes of a register, all their keys, and so
# many queries that there are about as many logits as this of a head at most.
LOGITS = 1 << 19
MOST_KEYS = 4096


def self_attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """softmax(q k^T) v of each head; `q` is scaled: q [B,N,C], k, v [B,T,C] -> [B,N,C].

    In the dtype of `q`; logits and softmax are float32. On a TPU, bfloat16 arrays that fill its
    registers go through a kernel where T = N, in which logits never leave the chip; XLA writes them
    to memory.
    """
    plain = functools.partial(attend, heads=heads)
    if q.shape == k.shape and fits_kernel(q, heads):
        kernel = functools.partial(attend_in_kernel, heads=heads)
        return jax.lax.platform_dependent(q, k, v, tpu=kernel, default=plain)
    return plain(q, k, v)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """`self_attention` in XLA's operations."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, -1)

    logits = jnp.einsum("bnhd,bthd->bhnt", split(q), split(k), preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits).astype(q.dtype)
    return jnp.einsum("bhnt,bthd->bnhd", weights, split(v)).reshape(q.shape)


def fits_kernel(q: jax.Array, heads: int) -> bool:
    """Whether `attend_in_kernel` takes arrays like `q` [B,N,C].

    They fill registers, the logits at hand fit a chip's vector memory, and every device has whole
    samples.
    """
    B, N, C = q.shape
    return (
        (q.dtype == jnp.bfloat16 and N <= MOST_KEYS)
        and (C % LANES == 0 and LANES % (C // heads) == 0)
        and divides_samples(B)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_in_kernel(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    """`self_attention` as a kernel for TPUs of arrays that `fits_kernel`.

    Its gradients are those of XLA's operations.
    """
    samples, _ = kernel_places()
    run = functools.partial(_run, heads)
    return jax.shard_map(run, in_specs=(samples,) * 3, out_specs=samples, check_vma=False)(q, k, v)


def _in_kernel_forward(q, k, v, heads):
    return attend_in_kernel(q, k, v, heads), (q, k, v)


def _in_kernel_backward(heads, saved, cotangent):
    return jax.vjp(functools.partial(attend, heads=heads), *saved)[1](cotangent)


attend_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


@traced_once(0)
def _run(heads: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The kernel for every sample, group of heads and block of queries."""
    B, N, C = q.shape
    steps = pl.cdiv(N * N, LOGITS)
    rows = -(-N // (16 * steps)) * 16  # Two of bfloat16 share one of a register's eight.
    of_queries = pl.BlockSpec((1, rows, LANES), lambda b, g, i: (b, i, g))
    of_keys = pl.BlockSpec((1, N, LANES), lambda b, g, i: (b, 0, g))
    return pl.pallas_call(
        functools.partial(_kernel, C // heads),
        name="self_attention",
        grid=(B, C // LANES, pl.cdiv(N, rows)),
        in_specs=[of_queries, of_keys, of_keys],
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * N * C,
            bytes_accessed=4 * q.size * q.dtype.itemsize,
            transcendentals=B * heads * N * N,
        ),
    )(q, k, v)


def _kernel(width: int, q_ref: Any, k_ref: Any, v_ref: Any, y_ref: Any) -> None:
    """One step of the grid: heads of `width` channels."""
    q, k, v = q_ref[0], k_ref[0], v_ref[0]
    head = jax.lax.broadcasted_iota(jnp.int32, k.shape, 1) // width
    y = jnp.zeros(q.shape, jnp.float32)
    for i in range(LANES // width):
        # With zeros in the other heads' channels products take no longer than with fewer channels,
        # and each head's results are where they belong.
        keys, values = (jnp.where(head == i, x, 0) for x in (k, v))
        logits = product(q, keys, 1, 1)
        weights = jnp.exp(logits - logits.max(1, keepdims=True))
        gathered = product(weights.astype(v.dtype), values, 1, 0)
        y += gathered / weights.sum(1, keepdims=True)
    y_ref[0] = y.astype(y_ref.dtype)
