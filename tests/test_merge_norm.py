"""The norm of merged cells: the kernel for TPUs, interpreted, against XLA's operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from refseg_jax.models.layers import merge_norm as module
from refseg_jax.models.layers.merge_norm import MergeNorm, fits_kernel, merge, merge_in_kernel
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh


def with_gradients(function, cotangent, *arrays):
    y, pull_back = jax.vjp(lambda *arrays: function(*arrays, 1e-5), *arrays)
    return y, *pull_back(cotangent)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 4, 8, 128),  # All in one block.
        (2, 16, 8, 128),  # Blocks of two pairs of rows.
        (2, 20, 12, 128),  # Of four; the last is of two.
        (2, 10, 30, 128),  # An odd number of merged cells in a row.
    ],
)
def test_kernel(shape, devices, interpreted, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 4096)
    B, h, w, C = shape
    rng = np.random.default_rng(0)
    mean, deviation = rng.normal(size=(2, B, h, w, 1))
    x = jnp.asarray(rng.normal(size=shape) * np.exp(deviation) + mean, jnp.bfloat16)
    cotangent = jnp.asarray(rng.normal(size=(B, h // 2, w // 2, 4 * C)), jnp.bfloat16)
    vectors = jnp.asarray(rng.normal(size=(2, 4 * C)), jnp.float32)
    mesh = make_mesh(devices, 1)
    samples, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    arrays = [jax.device_put(a, samples) for a in (cotangent, x)]
    arrays += [jax.device_put(a, whole) for a in vectors]
    ours = jax.jit(on_mesh(mesh, lambda *a: with_gradients(merge_in_kernel, *a)))(*arrays)
    theirs = with_gradients(merge, *arrays)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        # Both are computed in float32; y and the gradient of x are rounded to 8 bits.
        tolerance = 1e-2 if a.dtype == jnp.bfloat16 else 1e-4
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_neighbours_are_in_the_order_of_published_weights():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    order = jnp.asarray([3.0, 1, 2, 0])  # By the scale, so that the norm of it can be told.
    y = merge(x, order, jnp.zeros(4), 0.0)[0, 0, 0]
    cells = np.array([0, 4, 1, 5.0])
    np.testing.assert_allclose(y, (cells - 2.5) / cells.std() * order, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((8, 120, 120, 128), jnp.bfloat16, True),
        ((8, 30, 30, 512), jnp.bfloat16, True),
        ((8, 120, 120, 128), jnp.float32, False),
        ((8, 120, 120, 96), jnp.bfloat16, False),
        ((8, 30, 30, 1024), jnp.bfloat16, False),  # Eight pairs of rows are 2 MiB.
        ((7, 120, 120, 128), jnp.bfloat16, False),
    ],
)
def test_what_fits_the_kernel(shape, dtype, fits):
    array = jax.ShapeDtypeStruct(shape, dtype)
    assert on_mesh(make_mesh(2, 1), fits_kernel)(array) == fits
    assert not fits_kernel(array)  # It is not known where the samples are.


def test_a_tpu_takes_the_kernel(like_a_tpu):
    layer = MergeNorm(dtype=jnp.bfloat16)
    x = jnp.ones((2, 4, 4, 128), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)

    def jaxpr():
        return str(jax.make_jaxpr(on_mesh(make_mesh(2, 1), layer.apply))(variables, x))

    assert "pallas_call" in jaxpr() and "platform_index" in jaxpr()
    like_a_tpu()
    assert "pallas_call" in jaxpr() and "platform_index" not in jaxpr()
