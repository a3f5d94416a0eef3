"""Average pools of 2x2 cells, whose gradient is a kernel for TPUs."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from refseg_jax.models.layers.depthwise import SAMPLES
from refseg_jax.models.layers.doubling import BLOCK, by_pixels, rows_at_a_time
from refseg_jax.registers import LANES, traced_once
from refseg_jax.sharding import divides_samples, kernel_places


def average_pool(x: jax.Array) -> jax.Array:
    """Mean of 2x2 cells: [B,h,w,C] -> [B, floor(h/2), floor(w/2), C].

    On a TPU a kernel spreads its gradient where it can: XLA takes three times as long as it takes
    to write that (docs/scale.md).
    """
    if not fits_kernel(x):
        return _pool(x)
    return jax.lax.platform_dependent(x, tpu=pool_with_kernel, default=_pool)


def fits_kernel(x: jax.Array) -> bool:
    """Whether a kernel spreads the gradient for arrays like `x` [B,h,w,C].

    They have whole squares and fill registers, some rows fit the kernel's memory, and every device
    has samples by the eight.
    """
    B, h, w, C = x.shape
    block = 5 * rows_at_a_time(h // 2) * (w // 2) * SAMPLES * LANES * x.dtype.itemsize
    return (
        (x.dtype == jnp.bfloat16 and C % LANES == h % 2 == w % 2 == 0)
        and 0 < block <= BLOCK
        and divides_samples(B, SAMPLES)
    )


def _pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (2, 2), (2, 2))


@jax.custom_vjp
def pool_with_kernel(x: jax.Array) -> jax.Array:
    """`average_pool`, whose gradient is a kernel."""
    return _pool(x)


def _pool_forward(x):
    return _pool(x), None


def _pool_backward(_, cotangent):
    samples, _ = kernel_places()
    places = dict(in_specs=samples, out_specs=samples, check_vma=False)
    return (jax.shard_map(_spread, **places)(cotangent),)


pool_with_kernel.defvjp(_pool_forward, _pool_backward)


@traced_once()
def _spread(x: jax.Array) -> jax.Array:
    """A quarter of each number in 2x2 places: [B,h,w,C] -> [B,2h,2w,C]."""
    B, h, w, C = x.shape
    rows = rows_at_a_time(h)
    block = (None, SAMPLES, LANES)
    y = pl.pallas_call(
        _spread_kernel,
        name="spread",
        grid=(B // SAMPLES, C // LANES, h // rows),
        in_specs=[pl.BlockSpec((rows, w, *block), lambda b, c, i: (i, 0, b, 0, c))],
        out_specs=pl.BlockSpec((rows, 2, w, 2, *block), lambda b, c, i: (i, 0, 0, 0, b, 0, c)),
        out_shape=jax.ShapeDtypeStruct((h, 2, w, 2, B // SAMPLES, SAMPLES, C), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=x.size, bytes_accessed=5 * x.size * x.dtype.itemsize, transcendentals=0
        ),
    )(by_pixels(x))
    return y.reshape(2 * h, 2 * w, B, C).transpose(2, 0, 1, 3)


def _spread_kernel(x, y):
    quarter = (0.25 * x[...].astype(jnp.float32)).astype(y.dtype)
    for row in (0, 1):
        for column in (0, 1):
            y[:, row, :, column] = quarter
