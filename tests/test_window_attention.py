"""The kernel for TPUs, interpreted, against XLA's operations; these are held to Swin elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from refseg_jax.models.encoders.swin import WindowAttention
from refseg_jax.models.layers.window_attention import attend, attend_in_kernel, fits_kernel
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)
REGIONS = RNG.integers(0, 3, (2, 144))  # Two windows a sample.


def results(attention, regions, mesh, arrays):
    """y and the gradients of q, k, v and the bias, with the windows divided among `mesh`."""

    def function(cotangent, *arrays):
        y, pull_back = jax.vjp(lambda *arrays: attention(*arrays, regions), *arrays)
        return y, *pull_back(cotangent)

    windows, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    places = [whole if x.shape[0] != arrays[0].shape[0] else windows for x in arrays]
    return jax.jit(on_mesh(mesh, function))(*map(jax.device_put, arrays, places))


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("regions", [None, REGIONS], ids=["whole", "regions"])
@pytest.mark.parametrize("heads", [2, 8])  # Of 128 and of 32 channels.
@pytest.mark.parametrize("cells", [16, 128, 144])  # A part of a register's lanes, all, and more.
def test_kernel(cells, heads, regions, devices, interpreted):
    windows, channels = 4, 256
    regions = None if regions is None else regions[:, :cells]
    q, k, v, cotangent = RNG.normal(size=(4, windows, cells, channels)).astype(np.float32)
    arrays = cotangent, q / 8, k, v, RNG.normal(size=(heads, cells, cells)).astype(np.float32)
    mesh = make_mesh(devices, 1)
    ours = results(attend_in_kernel, regions, mesh, arrays)
    theirs = results(attend, regions, mesh, arrays)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "heads", "windows", "dtype", "fits"),
    [
        ((8, 144, 128), 4, 4, jnp.bfloat16, True),
        ((8, 144, 128), 4, 4, jnp.float32, False),  # Rounded to bfloat16 by a TPU's products.
        ((8, 49, 128), 4, 4, jnp.bfloat16, False),
        ((8, 144, 96), 3, 4, jnp.bfloat16, False),
        ((8, 144, 384), 8, 4, jnp.bfloat16, False),  # 48 channels a head.
        ((8, 256, 128), 8, 4, jnp.bfloat16, True),
        ((8, 256, 128), 16, 4, jnp.bfloat16, False),  # 4 MiB of logits in a window.
        ((8, 144, 128), 4, 8, jnp.bfloat16, False),  # One sample for two devices.
    ],
)
def test_what_fits_the_kernel(shape, heads, windows, dtype, fits):
    array = jax.ShapeDtypeStruct(shape, dtype)
    assert on_mesh(make_mesh(2, 1), fits_kernel)(array, heads, windows) == fits
    assert not fits_kernel(array, heads, windows)  # It is not known where the windows are.


def test_a_tpu_takes_the_kernel(like_a_tpu):
    attention = WindowAttention(4, 12, jnp.bfloat16)
    x = jnp.ones((2, 600, 128), jnp.bfloat16)
    variables = jax.eval_shape(lambda: attention.init(jax.random.key(0), x, (30, 20)))

    def jaxpr():
        function = on_mesh(make_mesh(2, 1), lambda v, x: attention.apply(v, x, (30, 20), 6))
        return str(jax.make_jaxpr(function)(variables, x))

    assert "pallas_call" in jaxpr() and "platform_index" in jaxpr()
    like_a_tpu()
    assert "pallas_call" in jaxpr() and "platform_index" not in jaxpr()
