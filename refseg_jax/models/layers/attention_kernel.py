"""Attention of cells or words to each other: in XLA's operations, and as a kernel for TPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.dropout import kept, words_of
from refseg_jax.registers import LANES, product, traced_once
from refseg_jax.sharding import divides_samples, kernel_places, on_gpus

# A step takes as many heads as fill the lanes of a register, all their keys, and as many queries as
# keep a head's logits at about LOGITS at most. The backward pass also holds the gradients of all
# keys and values, which bounds the number of cells (MOST_KEYS); the forward pass keeps that bound.
LOGITS = 1 << 19
MOST_KEYS = 2560


def self_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    heads: int,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:
    """softmax(q k^T) v of each head; `q` is scaled: q [B,N,C], k, v [B,T,C] -> [B,N,C].

    With `causal`, for which T = N, none attends to what comes after it. Weights are dropped with
    the probability `dropout`, for which it needs the random `key`, and the others divided by what
    is left of 1. In the dtype of `q`; logits and softmax are float32. On a TPU, bfloat16 arrays
    that fill its registers go through a kernel where T = N, in which logits never leave the chip;
    XLA writes them to memory, on a GPU in the dtype of `q`.
    """
    words = words_of(key, (len(q), heads)) if dropout else jnp.zeros((len(q), heads, 2), jnp.int32)
    form = attend_on_gpu if on_gpus() else attend

    def plain(q, k, v, words):
        return form(q, k, v, words, heads, dropout, causal)

    if q.shape == k.shape and fits_kernel(q, heads):

        def kernel(q, k, v, words):
            return attend_in_kernel(q, k, v, words, heads, dropout, causal)

        return jax.lax.platform_dependent(q, k, v, words, tpu=kernel, default=plain)
    return plain(q, k, v, words)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    words: jax.Array,
    heads: int,
    dropout: float,
    causal: bool = False,
) -> jax.Array:
    """`self_attention` in XLA's operations."""

    by_head = functools.partial(_by_head, heads=heads)
    logits = jnp.einsum(
        "bnhd,bthd->bhnt", by_head(q), by_head(k), preferred_element_type=jnp.float32
    )
    weights = _dropped(_softmax(logits, causal), words, dropout).astype(q.dtype)
    return jnp.einsum("bhnt,bthd->bnhd", weights, by_head(v)).reshape(q.shape)


def _by_head(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1)


def _softmax(logits: jax.Array, causal: bool) -> jax.Array:
    if causal:
        logits = jnp.where(jnp.tri(*logits.shape[2:], dtype=bool), logits, -jnp.inf)
    return jax.nn.softmax(logits)


def _dropped(weights: jax.Array, words: jax.Array, dropout: float) -> jax.Array:
    """Weights, or their gradients, [B,heads,N,T] as dropout leaves them."""
    if not dropout:
        return weights
    query, key = (jnp.arange(n, dtype=jnp.int32) for n in weights.shape[2:])
    first, second = words[..., 0, None, None], words[..., 1, None, None]
    keep = kept(dropout, first, second, query[:, None], key)
    return jnp.where(keep, weights / (1 - dropout), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend_on_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    words: jax.Array,
    heads: int,
    dropout: float,
    causal: bool = False,
) -> jax.Array:
    """`attend` as XLA's GPU compiler does it with the least traffic; see `window_attention.py`."""
    return _on_gpu_forward(q, k, v, words, heads, dropout, causal)[0]


def _on_gpu_forward(q, k, v, words, heads, dropout, causal):
    q_by_head, k_by_head, v_by_head = (_by_head(x, heads) for x in (q, k, v))
    logits = jnp.einsum("bnhd,bthd->bhnt", q_by_head, k_by_head).astype(jnp.float32)
    weights = jax.lax.optimization_barrier(_softmax(logits, causal).astype(q.dtype))
    y = jnp.einsum("bhnt,bthd->bnhd", _dropped(weights, words, dropout), v_by_head)
    return y.reshape(q.shape), (q, k, v, words, weights, y)


def _on_gpu_backward(heads, dropout, causal, saved, cotangent):
    q, k, v, words, weights, y = saved
    q_by_head, k_by_head, v_by_head = (_by_head(x, heads) for x in (q, k, v))
    cotangent = _by_head(cotangent, heads)
    of_weights = jnp.einsum("bnhd,bthd->bhnt", cotangent, v_by_head).astype(jnp.float32)
    of_weights = _dropped(of_weights, words, dropout)
    mean = (cotangent.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    of_logits = weights.astype(jnp.float32) * (of_weights - mean[..., None])
    # Without the barrier XLA would have it in float32, too.
    of_logits = jax.lax.optimization_barrier(of_logits.astype(q.dtype))
    of_q = jnp.einsum("bhnt,bthd->bnhd", of_logits, k_by_head)
    of_k = jnp.einsum("bhnt,bnhd->bthd", of_logits, q_by_head)
    of_v = jnp.einsum("bhnt,bnhd->bthd", _dropped(weights, words, dropout), cotangent)
    return of_q.reshape(q.shape), of_k.reshape(k.shape), of_v.reshape(v.shape), None


attend_on_gpu.defvjp(_on_gpu_forward, _on_gpu_backward)


def fits_kernel(q: jax.Array, heads: int) -> bool:
    """Whether `attend_in_kernel` takes arrays like `q` [B,N,C].

    They fill registers, the logits at hand fit a chip's vector memory, and every device has whole
    samples.
    """
    B, N, C = q.shape
    return (
        (q.dtype == jnp.bfloat16 and 1 < N <= MOST_KEYS)
        and (C % LANES == 0 and LANES % (C // heads) == 0)
        and divides_samples(B)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def attend_in_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    words: jax.Array,
    heads: int,
    dropout: float,
    causal: bool = False,
) -> jax.Array:
    """`self_attention` as a kernel for TPUs of arrays that `fits_kernel`."""
    return _divided(_forward, heads, dropout, causal, words, q, k, v)


def _in_kernel_forward(q, k, v, words, heads, dropout, causal):
    return attend_in_kernel(q, k, v, words, heads, dropout, causal), (q, k, v, words)


def _in_kernel_backward(heads, dropout, causal, saved, cotangent):
    # The logits are computed once more: that takes less than to write and read them.
    q, k, v, words = saved
    return *_divided(_backward, heads, dropout, causal, words, q, k, v, cotangent), None


attend_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


def _divided(run: Callable, heads: int, dropout: float, causal: bool, *arrays: jax.Array) -> Any:
    """Runs a kernel where the samples are."""
    samples, _ = kernel_places()
    run = functools.partial(run, heads, dropout, causal)
    return jax.shard_map(run, in_specs=samples, out_specs=samples, check_vma=False)(*arrays)


def _blocks(shape: tuple[int, ...], heads: int, rows: int) -> tuple[pl.BlockSpec, ...]:
    """(words of a sample, so many queries, all keys) at a step of the grid."""
    _, N, _ = shape
    return (
        pl.BlockSpec((1, heads, 2), lambda b, g, i: (b, 0, 0), memory_space=pltpu.SMEM),
        pl.BlockSpec((1, rows, LANES), lambda b, g, i: (b, i, g)),
        pl.BlockSpec((1, N, LANES), lambda b, g, i: (b, 0, g)),
    )


@traced_once(0, 1, 2)
def _forward(
    heads: int,
    dropout: float,
    causal: bool,
    words: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """The kernel for every sample, group of heads and block of queries."""
    B, N, C = q.shape
    steps = pl.cdiv(N * N, LOGITS)
    rows = -(-N // (16 * steps)) * 16  # Two of bfloat16 share one of a register's eight.
    of_sample, of_queries, of_keys = _blocks(q.shape, heads, rows)
    return pl.pallas_call(
        functools.partial(_forward_step, C // heads, dropout, causal),
        name="self_attention",
        grid=(B, C // LANES, pl.cdiv(N, rows)),
        in_specs=[of_sample, of_queries, of_keys, of_keys],
        out_specs=of_queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * N * C,
            bytes_accessed=4 * q.size * q.dtype.itemsize,
            transcendentals=B * heads * N * N,
        ),
    )(words, q, k, v)


def _forward_step(
    width: int,
    dropout: float,
    causal: bool,
    words_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    y_ref: Any,
) -> None:
    """One step of the grid: heads of `width` channels."""
    q, k, v = q_ref[0], k_ref[0], v_ref[0]
    head = jax.lax.broadcasted_iota(jnp.int32, k.shape, 1) // width
    drop = _dropper(dropout, words_ref, (len(q), len(k)), 0)
    hide = _hider(causal, (len(q), len(k)), 0)

    def attend_head(i: jax.Array, y: jax.Array) -> jax.Array:
        # With zeros in the other heads' channels products take no longer than with fewer channels,
        # and each head's results are where they belong.
        keys, values = (jnp.where(head == i, x, 0) for x in (k, v))
        logits = hide(product(q, keys, 1, 1))
        weights = jnp.exp(logits - logits.max(1, keepdims=True))
        total = (1 - dropout) * weights.sum(1, keepdims=True)
        return y + product(drop(i, weights).astype(v.dtype), values, 1, 0) / total

    y = _sum_of_heads(width, attend_head, q)
    y_ref[0] = y.astype(y_ref.dtype)


def _sum_of_heads(width: int, of_head: Callable, like: jax.Array) -> jax.Array:
    """What `of_head` makes of each head in a group and the sum so far, at first 0 as `like`.

    While one of two heads waits for its products, the other computes. More of them take turns: the
    compiler would have more of their logits at hand than fit the memory.
    """
    heads = LANES // width
    zeros = jnp.zeros(like.shape, jnp.float32)
    return jax.lax.fori_loop(0, heads, of_head, zeros, unroll=heads <= 2)


def _dropper(dropout: float, words_ref: Any, shape: tuple[int, int], axis: int) -> Callable:
    """A function of a head of the group and its weights, which puts zeros in the place of some.

    The weights have this `shape`, of the block's queries along `axis` and of all keys.
    """
    if not dropout:
        return lambda i, weights: weights
    first_head = pl.program_id(1) * (words_ref.shape[1] // pl.num_programs(1))
    queries = tuple(n if a == axis else 1 for a, n in enumerate(shape))
    query = jax.lax.broadcasted_iota(jnp.int32, queries, axis)
    query += pl.program_id(2) * shape[axis]
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis)

    def drop(i: jax.Array, weights: jax.Array) -> jax.Array:
        first, second = (words_ref[0, first_head + i, word] for word in (0, 1))
        return jnp.where(kept(dropout, first, second, query, key), weights, 0)

    return drop


def _hider(causal: bool, shape: tuple[int, int], axis: int) -> Callable:
    """A function of logits, as `_dropper`, that hides from each query what comes after it."""
    if not causal:
        return lambda logits: logits
    query = jax.lax.broadcasted_iota(jnp.int32, shape, axis) + pl.program_id(2) * shape[axis]
    before = jax.lax.broadcasted_iota(jnp.int32, shape, 1 - axis) <= query
    return lambda logits: jnp.where(before, logits, -1e30)


@traced_once(0, 1, 2)
def _backward(
    heads: int,
    dropout: float,
    causal: bool,
    words: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    of_y: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients of q, k, v: the kernel for every sample, group of heads and block of queries."""
    B, N, C = q.shape
    rows = min(max(LOGITS // N // LANES, 1) * LANES, -(-N // 16) * 16)  # Lanes, of logits.
    of_sample, of_queries, of_keys = _blocks(q.shape, heads, rows)
    return pl.pallas_call(
        functools.partial(_backward_step, C // heads, dropout, causal),
        name="self_attention_backward",
        grid=(B, C // LANES, pl.cdiv(N, rows)),
        in_specs=[of_sample, of_queries, of_keys, of_keys, of_queries],
        out_specs=[of_queries, of_keys, of_keys],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)] * 3,
        scratch_shapes=[pltpu.VMEM((N, LANES), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=10 * B * N * N * C,
            bytes_accessed=7 * q.size * q.dtype.itemsize,
            transcendentals=B * heads * N * N,
        ),
    )(words, q, k, v, of_y)


def _backward_step(
    width: int,
    dropout: float,
    causal: bool,
    words_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    of_y_ref: Any,
    of_q_ref: Any,
    of_k_ref: Any,
    of_v_ref: Any,
    sum_k_ref: Any,
    sum_v_ref: Any,
) -> None:
    """One step of the grid: gradients of a block of queries, and its share of those of all keys.

    Logits have a row for each key and a lane for each query: a sum over keys adds up registers, and
    nothing as large is transposed but for the gradients of queries.
    """
    q, k, v, of_y = q_ref[0], k_ref[0], v_ref[0], of_y_ref[0]
    block, (N, _) = pl.program_id(2), k.shape
    query = block * len(q) + jax.lax.broadcasted_iota(jnp.int32, q.shape, 0)
    head_of_q, head_of_k = (
        jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) // width for x in (q, k)
    )
    drop = _dropper(dropout, words_ref, (len(k), len(q)), 1)
    hide = _hider(causal, (len(k), len(q)), 1)

    @pl.when(block == 0)
    def _():
        sum_k_ref[...] = sum_v_ref[...] = jnp.zeros(k.shape, jnp.float32)

    def of_head(i: jax.Array, of_q: jax.Array) -> jax.Array:
        own = (head_of_q == i) & (query < N)  # Beyond the last query there may be anything.
        queries, of_own = (jnp.where(own, x, 0) for x in (q, of_y))
        logits = hide(product(k, queries, 1, 1))
        weights = jnp.exp(logits - logits.max(0, keepdims=True))
        weights *= 1 / weights.sum(0, keepdims=True)
        left = drop(i, weights)
        of_logits = left * product(v, of_own, 1, 1)
        of_logits -= weights * of_logits.sum(0, keepdims=True)
        of_logits = of_logits.astype(q.dtype)
        sum_v_ref[...] += product(left.astype(q.dtype), of_own, 1, 0)
        sum_k_ref[...] += product(of_logits, queries, 1, 0)
        return of_q + product(of_logits, jnp.where(head_of_k == i, k, 0), 0, 0)

    of_q = _sum_of_heads(width, of_head, q)
    scale = 1 / (1 - dropout)  # Of the weights that are left.
    of_q_ref[0] = (scale * of_q).astype(q.dtype)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        of_k_ref[0] = (scale * sum_k_ref[...]).astype(k.dtype)
        of_v_ref[0] = (scale * sum_v_ref[...]).astype(v.dtype)
