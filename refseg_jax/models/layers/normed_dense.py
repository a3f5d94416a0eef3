"""Linear layers of a normalised map: in XLA's operations, and as a kernel for TPUs."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.dense import split_dense
from refseg_jax.models.layers.feed_forward import (
    EPSILON,
    MEMORY,
    MOST_CHANNELS,
    room,
    rows_of_block,
    specs,
)
from refseg_jax.models.layers.layer_norm import layer_norm, normalize, standardize
from refseg_jax.registers import LANES, product, traced_once
from refseg_jax.sharding import divides_samples, kernel_places


def normed_dense(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    kernel: jax.Array,
    shift: jax.Array,
    factors: tuple[float, ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """x and parts of norm(x) kernel + shift, each times one of the `factors`.

    Args:
        x: [B, n, C].
        scale: of the layer norm, float32 [C], as all parameters.
        bias: [C].
        kernel: [C, parts·F], the parts side by side.
        shift: [parts·F].
        factors: for each part.

    Returns:
        (x, parts x [B, n, F]), in the dtype of `x`. The first is for a residual: the two gradients
        of x are added up in one pass on a TPU then.

    On a TPU, bfloat16 rows of few channels go through a kernel, in which the norm never leaves the
    chip: XLA needs twice as long as the products take the matrix units (docs/scale.md). The
    gradients are XLA's.
    """
    operands = x, scale, bias, kernel, shift
    if fits_kernel(x, kernel.shape[1] // len(factors)):
        return jax.lax.platform_dependent(
            *operands,
            tpu=functools.partial(dense_in_kernel, factors=factors),
            default=functools.partial(dense_of_norm, factors=factors, norm=normalize),
        )
    return dense_of_norm(*operands, factors)


def dense_of_norm(x, scale, bias, kernel, shift, factors, norm=layer_norm):
    """`normed_dense` in XLA's operations."""
    x, y = norm(x, scale, bias, EPSILON, True)
    parts = split_dense(y, kernel.astype(x.dtype), shift, len(factors))
    return x, tuple(y * f for y, f in zip(parts, factors, strict=True))


def fits_kernel(x: jax.Array, features: int) -> bool:
    """Whether `dense_in_kernel` takes arrays like `x` [B, n, C] for parts of so many features.

    Rows fill registers but have few channels, blocks of rows have no rest, and every device has
    whole samples.
    """
    B, n, C = x.shape
    fills = x.dtype == jnp.bfloat16 and C % LANES == features % LANES == 0
    few = max(C, features) <= MOST_CHANNELS * room()
    return fills and few and rows_of_block(n) >= min(n, LANES) and divides_samples(B)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def dense_in_kernel(x, scale, bias, kernel, shift, factors):
    """`normed_dense` as a kernel for TPUs of arrays that `fits_kernel`."""
    samples, whole = kernel_places()
    run = jax.shard_map(
        functools.partial(_run, factors),
        in_specs=(samples, *[whole] * 4),
        out_specs=samples,
        check_vma=False,
    )
    return x, tuple(run(x, scale, bias, kernel, shift))


def _in_kernel_forward(x, scale, bias, kernel, shift, factors):
    operands = x, scale, bias, kernel, shift
    return dense_in_kernel(*operands, factors), operands


def _in_kernel_backward(factors, operands, cotangents):
    # The norm, for the kernel's gradient, takes less to compute again than to keep.
    return jax.vjp(functools.partial(dense_of_norm, factors=factors), *operands)[1](cotangents)


dense_in_kernel.defvjp(_in_kernel_forward, _in_kernel_backward)


@traced_once(0)
def _run(factors: tuple[float, ...], x, scale, bias, kernel, shift) -> list[jax.Array]:
    """Of the samples of one device."""
    B, n, C = x.shape
    features = kernel.shape[1] // len(factors)
    grid, block, _, common, _ = specs(B, n)
    return pl.pallas_call(
        functools.partial(_kernel, factors),
        name="normed_dense",
        grid=grid,
        in_specs=[
            *(block(C), common(1, C), common(1, C)),
            *(common(*kernel.shape), common(1, shift.size)),
        ],
        out_specs=[block(features)] * len(factors),
        out_shape=[jax.ShapeDtypeStruct((B, n, features), x.dtype)] * len(factors),
        scratch_shapes=[pltpu.VMEM(kernel.shape, x.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=MEMORY if C > MOST_CHANNELS else None,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod(x.shape) * kernel.shape[1],
            bytes_accessed=(1 + len(factors)) * x.size * x.dtype.itemsize,
            transcendentals=0,
        ),
    )(x, scale[None], bias[None], kernel, shift[None])


def _kernel(factors: tuple[float, ...], x, scale, bias, kernel, shift, *refs: Any) -> None:
    *parts, weights = refs

    @pl.when(pl.program_id(1) == 0)
    def _():
        weights[...] = kernel[...].astype(weights.dtype)

    standard, _ = standardize(x[0].astype(jnp.float32), EPSILON)
    normed = (standard * scale[...] + bias[...]).astype(x.dtype)
    for i, (part, factor) in enumerate(zip(parts, factors, strict=True)):
        at = slice(i * part.shape[-1], (i + 1) * part.shape[-1])
        y = product(normed, weights[:, at], 1, 0) + shift[:, at]
        part[0] = (y * factor).astype(part.dtype)
