"""Products with a matrix of each sample's own: the gradients that a TPU takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.models.layers import sample_products as module
from refseg_jax.models.layers.sample_products import sample_products, with_gradients_by_all
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)


def with_gradients(function):
    def results(x, matrices, cotangent):
        y, pull_back = jax.vjp(function, x, matrices)
        return y, *pull_back(cotangent)

    return results


@pytest.mark.parametrize("devices", [(1, 1), (2, 1), (2, 2)])
def test_gradients(devices):
    shapes = (4, 3, 5, 16), (4, 16, 9), (4, 9, 3, 5)
    arrays = [RNG.normal(size=shape).astype(np.float32) for shape in shapes]
    mesh = make_mesh(*devices)
    divided = jax.device_put(arrays, batch_sharding(mesh))
    ours = jax.jit(on_mesh(mesh, with_gradients(with_gradients_by_all)))(*divided)
    theirs = with_gradients(sample_products)(*arrays)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("rows", "dtype", "fits"),
    [(16, jnp.bfloat16, True), (16, jnp.float32, False), (15, jnp.bfloat16, False)]
    + [(32, jnp.bfloat16, False)],  # 144 numbers of 16 samples on each of two devices.
)
def test_where(rows, dtype, fits, monkeypatch):
    x, matrices = jnp.ones((rows, 2, 2, 8), dtype), jnp.ones((rows, 8, 9), dtype)
    own = []
    monkeypatch.setattr(module, "with_gradients_by_all", lambda *a: own.append(a))
    on_mesh(make_mesh(2, 1), sample_products)(x, matrices)
    assert not own  # A CPU.
    monkeypatch.setattr(module, "on_tpus", lambda: True)
    on_mesh(make_mesh(2, 1), sample_products)(x, matrices)
    assert bool(own) == fits
