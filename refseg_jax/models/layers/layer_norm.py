"""Layer normalisation: as XLA compiles it, and as a kernel of our own for TPUs."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.registers import LANES, traced_once
from refseg_jax.sharding import divides_samples, kernel_places


class LayerNorm(nn.Module):
    """Each row of C channels to mean 0 and variance 1, then scaled and moved: [..., C] -> same.

    Parameters `scale`, `bias` [C], as those of `nn.LayerNorm`. Computed in float32, and the
    variance of what is left without the mean: Flax's default, E[x²] - E[x]², cancels on the large
    activations of an encoder's late stages.

    With `keep` it returns (x, y), both in `dtype`, for a residual: the two gradients of x are added
    up in one pass on a TPU then.
    """

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, keep: bool = False) -> Any:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return layer_norm(x.astype(self.dtype), scale, bias, self.epsilon, keep)


class NormWeights(nn.Module):
    """The parameters of a `LayerNorm` of C channels, for a kernel in which it is hidden.

    `__call__(C) -> (scale [C], bias [C])`, float32.
    """

    @nn.compact
    def __call__(self, C: int) -> tuple[jax.Array, jax.Array]:
        scale = self.param("scale", nn.initializers.ones, (C,))
        return scale, self.param("bias", nn.initializers.zeros, (C,))


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, keep: bool = False
) -> Any:
    """`x` [..., C] normalised over its last axis, times `scale` [C], plus `bias` [C].

    In the dtype of `x`; computed in float32. With `keep` (x, y) are returned. On a TPU,
    bfloat16 rows that fill its registers go through a kernel: XLA takes four times as long, and
    five for the gradients (docs/scale.md).
    """
    if fits_kernel(x):
        return jax.lax.platform_dependent(
            *(x, scale, bias),
            tpu=functools.partial(normalize_in_kernel, epsilon=epsilon, keep=keep),
            default=functools.partial(normalize, epsilon=epsilon, keep=keep),
        )
    return normalize(x, scale, bias, epsilon, keep)


def normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, keep: bool = False
) -> Any:
    """`layer_norm` in XLA's operations."""
    y, _ = standardize(x.astype(jnp.promote_types(x.dtype, jnp.float32)), epsilon)
    y = (y * scale + bias).astype(x.dtype)
    return (x, y) if keep else y


def standardize(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Rows [..., C] with mean 0 and variance 1, and 1 / the deviation that they had."""
    x -= x.mean(-1, keepdims=True)
    factor = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + epsilon)
    return x * factor, factor


def gradient(standard: jax.Array, factor: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The rows' [..., C], of what `standardize` returns of them and the first's `cotangent`."""
    along = (cotangent * standard).mean(-1, keepdims=True)
    return (cotangent - cotangent.mean(-1, keepdims=True) - standard * along) * factor


# The kernel. It takes so many numbers at a time: few enough to compile soon, and enough that the
# rows' sums, each of which waits for its registers' lanes to be added up, do so side by side.
BLOCK = 1 << 17


def fits_kernel(x: jax.Array) -> bool:
    """Whether `normalize_in_kernel` takes arrays like `x` [B, ..., n, C].

    Rows fill registers, and every device has whole samples.
    """
    fills = x.dtype == jnp.bfloat16 and x.ndim > 2 and x.shape[-1] % LANES == 0
    return fills and divides_samples(x.shape[0])


def rows_at_a_time(n: int, C: int) -> int:
    """All of n rows, or equal parts of them: whole registers, but for the last."""
    if n * C <= BLOCK:
        return n
    rows = -(-n // -(-n * C // BLOCK))
    return rows + -rows % 16


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize_in_kernel(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, keep: bool = False
) -> Any:
    """`layer_norm` as a kernel for TPUs of arrays that `fits_kernel`."""
    samples, whole = kernel_places()
    run = jax.shard_map(
        functools.partial(_run, epsilon, False, False),
        in_specs=(samples, whole, whole),
        out_specs=samples,
        check_vma=False,
    )
    y = run(x, scale, bias)
    return (x, y) if keep else y


def _in_kernel_forward(x, scale, bias, epsilon, keep):
    return normalize_in_kernel(x, scale, bias, epsilon, keep), (x, scale, bias)


def _in_kernel_backward(epsilon, keep, saved, cotangents):
    x, scale, bias = saved
    samples, whole = kernel_places()
    cotangents = cotangents[::-1] if keep else (cotangents,)

    def run(scale, x, *cotangents):
        of_x, *sums = _run(epsilon, True, keep, x, *cotangents, scale)
        return of_x, *(jax.lax.psum(s.sum((0, 1)), *samples) for s in sums)

    of_x, of_scale, of_bias = jax.shard_map(
        run,
        in_specs=(whole, samples, *[samples] * len(cotangents)),
        out_specs=(samples, whole, whole),
        check_vma=False,
    )(scale, x, *cotangents)
    return of_x, of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


normalize_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


@traced_once(0, 1, 2)
def _run(epsilon: float, backward: bool, keep: bool, *operands: jax.Array) -> Any:
    """The kernel for blocks of rows of some arrays [..., n, C], with vectors [C] for all.

    Whole sets of n rows where they are small, else equal parts of each. The backward kernel, of
    which two or three are arrays, has sums of all rows of a block of sets besides, float32
    [blocks, 1, C].
    """
    shape, dtype = operands[0].shape, operands[0].dtype
    n, C = shape[-2:]
    sets = math.prod(shape[:-2])
    if n * C <= BLOCK:
        together = max(k for k in range(1, BLOCK // (n * C) + 1) if sets % k == 0)
        rows = n
    else:
        together, rows = 1, rows_at_a_time(n, C)
    arrays = [x.reshape(sets, n, C) for x in operands if x.shape == shape]
    vectors = [x.astype(jnp.float32)[None] for x in operands[len(arrays) :]]
    block = pl.BlockSpec((together, rows, C), lambda i, j: (i, j, 0))
    vector = pl.BlockSpec((1, C), lambda i, j: (0, 0))
    total = pl.BlockSpec((1, 1, C), lambda i, j: (i, 0, 0))
    like_x = jax.ShapeDtypeStruct((sets, n, C), dtype)
    like_total = jax.ShapeDtypeStruct((sets // together, 1, C), jnp.float32)
    if backward:
        end = n if n % rows else None
        kernel = functools.partial(_backward_kernel, epsilon, keep, end=end)
    else:
        kernel = functools.partial(_forward_kernel, epsilon)
    results = pl.pallas_call(
        kernel,
        name="layer_norm_backward" if backward else "layer_norm",
        grid=(sets // together, -(-n // rows)),
        in_specs=[block] * len(arrays) + [vector] * len(vectors),
        out_specs=(block, total, total) if backward else block,
        out_shape=(like_x, like_total, like_total) if backward else like_x,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=(16 if backward else 8) * like_x.size,
            bytes_accessed=(len(arrays) + 1) * like_x.size * dtype.itemsize,
            transcendentals=sets * n,
        ),
    )(*arrays, *vectors)
    if not backward:
        return results.reshape(shape)
    of_x, *sums = results
    return of_x.reshape(shape), *sums


def _forward_kernel(epsilon: float, x, scale, bias, y):
    standard, _ = standardize(x[...].astype(jnp.float32), epsilon)
    y[...] = (standard * scale[...] + bias[...]).astype(y.dtype)


def _backward_kernel(epsilon: float, keep: bool, x, cotangent, *refs, end: int | None = None):
    *residual, scale, of_x, of_scale, of_bias = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        of_scale[...] = jnp.zeros_like(of_scale)
        of_bias[...] = jnp.zeros_like(of_bias)

    standard, factor = standardize(x[...].astype(jnp.float32), epsilon)
    of_y = cotangent[...].astype(jnp.float32)
    if end is not None:  # Beyond the last row there is anything, which must not be added up.
        row = jax.lax.broadcasted_iota(jnp.int32, of_y.shape, 1) + pl.program_id(1) * len(x[0])
        standard, of_y = (jnp.where(row < end, a, 0.0) for a in (standard, of_y))
    total = gradient(standard, factor, of_y * scale[...])
    if keep:
        total += residual[0][...].astype(jnp.float32)
    of_x[...] = total.astype(of_x.dtype)
    of_scale[0] += (of_y * standard).sum((0, 1), keepdims=True)[0]
    of_bias[0] += of_y.sum((0, 1), keepdims=True)[0]
