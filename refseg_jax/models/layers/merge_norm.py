"""Layer norm of merged cells of a map: as XLA compiles it, and as a kernel of our own for TPUs."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.layer_norm import gradient, normalize, standardize
from refseg_jax.registers import LANES, traced_once
from refseg_jax.sharding import divides_samples, kernel_places


class MergeNorm(nn.Module):
    """Layer norm of 2 x 2 neighbours side by side: [B,h,w,C] -> [B,h/2,w/2,4C], h and w even.

    The four are in the order of published weights, column by column. Parameters `scale`, `bias`
    [4C], as those of `LayerNorm`.
    """

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (4 * x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return merge_norm(x.astype(self.dtype), scale, bias, self.epsilon)


def merge_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`MergeNorm` of x [B,h,w,C] with `scale`, `bias` [4C], in the dtype of `x`.

    To a TPU every other column is every other row of a register. XLA moves them in several times
    what the norm takes; a kernel has two bfloat16 of neighbours in one number (docs/scale.md).
    """
    if fits_kernel(x):
        return jax.lax.platform_dependent(
            *(x, scale, bias),
            tpu=functools.partial(merge_in_kernel, epsilon=epsilon),
            default=functools.partial(merge, epsilon=epsilon),
        )
    return merge(x, scale, bias, epsilon)


def merge(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`merge_norm` in XLA's operations."""
    B, h, w, C = x.shape
    x = x.reshape(B, h // 2, 2, w // 2, 2, C).transpose(0, 1, 3, 4, 2, 5)
    return normalize(x.reshape(B, h // 2, w // 2, 4 * C), scale, bias, epsilon)


# The kernel. It takes some pairs of the map's rows at a time, which make whole registers.
ROWS = 8
BLOCK = 1 << 17  # Numbers at a time, where that is enough,
LARGEST = 1 << 18  # and how many fit.


def _pairs(h: int, w: int, C: int) -> int:
    """How many pairs of rows it takes at a time."""
    whole = next(n for n in range(1, ROWS + 1) if n * w // 2 % ROWS == 0)
    return min(h // 2, max(whole, BLOCK // (2 * w * C) // whole * whole))


def fits_kernel(x: jax.Array) -> bool:
    """Whether `merge_in_kernel` takes arrays like `x` [B,h,w,C].

    Channels fill registers, enough pairs of rows fit the memory, and every device has whole
    samples.
    """
    B, h, w, C = x.shape
    return (
        (x.dtype == jnp.bfloat16 and C % LANES == 0)
        and _pairs(h, w, C) * 2 * w * C <= LARGEST
        and divides_samples(B)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def merge_in_kernel(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`merge_norm` as a kernel for TPUs of arrays that `fits_kernel`."""
    samples, whole = kernel_places()
    return jax.shard_map(
        functools.partial(_forward, epsilon),
        in_specs=(samples, whole, whole),
        out_specs=samples,
        check_vma=False,
    )(x, scale, bias)


def _in_kernel_forward(x, scale, bias, epsilon):
    return merge_in_kernel(x, scale, bias, epsilon), (x, scale, bias)


def _in_kernel_backward(epsilon, saved, cotangent):
    x, scale, bias = saved
    samples, whole = kernel_places()

    def run(x, cotangent, scale):
        of_x, *sums = _backward(epsilon, x, cotangent, scale)
        return of_x, *(jax.lax.psum(s.sum((0, 1)), *samples) for s in sums)

    of_x, of_scale, of_bias = jax.shard_map(
        run,
        in_specs=(samples, samples, whole),
        out_specs=(samples, whole, whole),
        check_vma=False,
    )(x, cotangent, scale)
    return of_x, of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


merge_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


def _about(x: jax.Array) -> dict[str, Any]:
    """What calls of the kernels for x [B,h,w,C] have in common."""
    B, h, w, C = x.shape
    pairs = _pairs(h, w, C)
    return dict(
        grid=(B, -(-h // 2 // pairs)),
        scratch_shapes=[
            pltpu.VMEM((pairs * w, C), jnp.int32),
            pltpu.VMEM((pairs * w // 2, 4 * C), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )


def _blocks(x: jax.Array) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """For x [B,h,w,C]: of its rows, of what they become, and of a vector."""
    _, h, w, C = x.shape
    pairs = _pairs(h, w, C)
    return (
        pl.BlockSpec((1, pairs * 2 * w, C), lambda b, i: (b, i, 0)),
        pl.BlockSpec((1, pairs * w // 2, 4 * C), lambda b, i: (b, i, 0)),
        pl.BlockSpec((1, 4 * C), lambda b, i: (0, 0)),
    )


@traced_once(0)
def _forward(epsilon: float, x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    B, h, w, C = x.shape
    cells, merged, vector = _blocks(x)
    y = pl.pallas_call(
        functools.partial(_forward_kernel, epsilon, w),
        name="merge_norm",
        in_specs=[cells, vector, vector],
        out_specs=merged,
        out_shape=jax.ShapeDtypeStruct((B, h * w // 4, 4 * C), x.dtype),
        cost_estimate=_cost(x, 8, 2),
        **_about(x),
    )(x.reshape(B, h * w, C), *(v.astype(jnp.float32)[None] for v in (scale, bias)))
    return y.reshape(B, h // 2, w // 2, 4 * C)


@traced_once(0)
def _backward(epsilon: float, x: jax.Array, cotangent: jax.Array, scale: jax.Array) -> Any:
    """The gradient of x, and those of scale and bias, float32 [B,1,4C], for each sample."""
    B, h, w, C = x.shape
    cells, merged, vector = _blocks(x)
    total = pl.BlockSpec((1, 1, 4 * C), lambda b, i: (b, 0, 0))
    like_total = jax.ShapeDtypeStruct((B, 1, 4 * C), jnp.float32)
    of_x, *sums = pl.pallas_call(
        functools.partial(_backward_kernel, epsilon, w, h * w // 4),
        name="merge_norm_backward",
        in_specs=[cells, merged, vector],
        out_specs=(cells, total, total),
        out_shape=(jax.ShapeDtypeStruct((B, h * w, C), x.dtype), like_total, like_total),
        cost_estimate=_cost(x, 16, 3),
        **_about(x),
    )(
        x.reshape(B, h * w, C),
        cotangent.reshape(B, h * w // 4, 4 * C),
        scale.astype(jnp.float32)[None],
    )
    return of_x.reshape(x.shape), *sums


def _cost(x: jax.Array, operations: int, passes: int) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=operations * x.size,
        bytes_accessed=passes * x.size * x.dtype.itemsize,
        transcendentals=x.size // (4 * x.shape[-1]),
    )


def _places(w: int, pairs: int, C: int) -> Iterator[tuple[slice, slice, slice, slice]]:
    """(rows of pairs of neighbours in a row of the map, rows of merged cells, channels of the
    first and of the second of the neighbours there)."""
    for i in range(pairs):
        for below in range(2):
            row, channel = (2 * i + below) * w // 2, below * C
            yield (
                slice(row, row + w // 2),
                slice(i * w // 2, (i + 1) * w // 2),
                *(slice(c, c + C) for c in (channel, 2 * C + channel)),
            )


def _merged(w: int, x, bits, merged) -> jax.Array:
    """What `x` has in it, float32 [rows of merged cells, 4C]; `bits` and `merged` are scratch."""
    bits[...] = pltpu.bitcast(x[0], jnp.int32)  # Two neighbours, the first in the lower half.
    for row, cells, first, second in _places(w, len(bits) // w, bits.shape[1]):
        pair = bits[row]
        merged[cells, first] = pltpu.bitcast(pair << 16, jnp.float32)
        merged[cells, second] = pltpu.bitcast(pair & -(1 << 16), jnp.float32)
    return merged[...]


def _forward_kernel(epsilon: float, w: int, x, scale, bias, y, bits, merged):
    standard, _ = standardize(_merged(w, x, bits, merged), epsilon)
    y[0] = (standard * scale[...] + bias[...]).astype(y.dtype)


def _backward_kernel(
    epsilon: float,
    w: int,
    end: int,
    x,
    cotangent,
    scale,
    of_x,
    of_scale,
    of_bias,
    bits,
    merged,
):
    @pl.when(pl.program_id(1) == 0)
    def _():
        of_scale[...] = jnp.zeros_like(of_scale)
        of_bias[...] = jnp.zeros_like(of_bias)

    standard, factor = standardize(_merged(w, x, bits, merged), epsilon)
    of_y = cotangent[0].astype(jnp.float32)
    if end % len(of_y):  # Beyond the last row there is anything, which must not be added up.
        row = jax.lax.broadcasted_iota(jnp.int32, of_y.shape, 0) + pl.program_id(1) * len(of_y)
        standard, of_y = (jnp.where(row < end, a, 0.0) for a in (standard, of_y))
    of_scale[0] += (of_y * standard).sum(0, keepdims=True)
    of_bias[0] += of_y.sum(0, keepdims=True)
    merged[...] = gradient(standard, factor, of_y * scale[...])
    for row, cells, first, second in _places(w, len(bits) // w, bits.shape[1]):
        even, odd = (
            pltpu.bitcast(merged[cells, of].astype(of_x.dtype).astype(jnp.float32), jnp.int32)
            for of in (first, second)
        )
        bits[row] = jax.lax.shift_right_logical(even, 16) | odd
    of_x[0] = pltpu.bitcast(bits[...], of_x.dtype)
