"""Average pools: those whose gradient is a kernel for TPUs against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from refseg_jax.models.layers.average_pool import average_pool, fits_kernel, pool_with_kernel
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh
from tests.test_doubling import normal, with_gradient


@pytest.mark.parametrize(
    ("shape", "devices"), [((16, 4, 6, 256), (1, 1)), ((32, 2, 2, 128), (2, 2))]
)
def test_kernel(shape, devices, interpreted):
    B, h, w, C = shape
    mesh = make_mesh(*devices)
    arrays = normal(*shape), normal(B, h // 2, w // 2, C)
    divided = jax.device_put(arrays, batch_sharding(mesh))
    ours = jax.jit(on_mesh(mesh, with_gradient(pool_with_kernel)))(*divided)
    for a, b in zip(ours, with_gradient(average_pool)(*arrays), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [((8, 4, 6, 128), 1), ((8, 4, 7, 128), 0), ((8, 5, 6, 128), 0), ((8, 4, 6, 64), 0)],
)
def test_which_pool_has_a_kernel(shape, kernels, like_a_tpu):
    """Of whole cells and registers."""
    x = jnp.asarray(normal(*shape), jnp.bfloat16)
    y = nn.avg_pool(x, (2, 2), (2, 2))
    np.testing.assert_array_equal(np.float32(average_pool(x)), np.float32(y))
    like_a_tpu()
    text = str(jax.make_jaxpr(on_mesh(make_mesh(1, 1), with_gradient(average_pool)))(x, y))
    assert text.count("name=spread\n") == kernels


def test_long_rows_have_no_kernel():
    def fits(w):
        x = jax.ShapeDtypeStruct((8, 4, w, 128), jnp.bfloat16)
        return on_mesh(make_mesh(1, 1), fits_kernel)(x)

    assert fits(740) and not fits(760)
