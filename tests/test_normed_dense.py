"""Linear layers of a normalised map: the kernel for TPUs against XLA's operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from refseg_jax.models.layers import feed_forward
from refseg_jax.models.layers.normed_dense import dense_in_kernel, dense_of_norm, fits_kernel
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)
C = 128
FACTORS = 0.25, 1.0, 1.0


def examples(*shape):
    """Cotangents, x, and the parameters of norm and layers."""
    parameters = [RNG.normal(size=s) for s in [(C,), (C,), (C, 3 * C), (3 * C,)]]
    cotangents = list(RNG.normal(size=(4, *shape)).astype(np.float32))
    x = 3 * RNG.normal(size=shape) + 1
    return cotangents, *(a.astype(np.float32) for a in (x, *parameters))


def with_gradients(function):
    """Of functions like `normed_dense`, all in one list."""

    def results(cotangents, *operands):
        (x, parts), pull_back = jax.vjp(functools.partial(function, factors=FACTORS), *operands)
        cotangents = [c.astype(x.dtype) for c in cotangents]
        return x, *parts, *pull_back((cotangents[0], tuple(cotangents[1:])))

    return results


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("shape", [(4, 64, C), (2, 25, C)])  # Two blocks of a sample, or one.
def test_kernel(shape, devices, interpreted, monkeypatch):
    monkeypatch.setattr(feed_forward, "MOST_NUMBERS", 32 * feed_forward.WIDTH)
    mesh = make_mesh(devices, 1)
    samples, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    cotangents, x, *parameters = examples(*shape)
    divided, common = jax.device_put((cotangents, x), samples), jax.device_put(parameters, whole)
    jax.clear_caches()  # Of blocks of another size.
    ours = jax.jit(on_mesh(mesh, with_gradients(dense_in_kernel)))(*divided, *common)
    theirs = with_gradients(dense_of_norm)(cotangents, x, *parameters)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_rounding_is_that_of_bfloat16(interpreted):
    """The kernel, in bfloat16, is no farther from float32 than XLA's operations are."""
    cotangents, x, *parameters = examples(2, 32, C)
    x = jnp.asarray(x, jnp.bfloat16)
    exact = with_gradients(dense_of_norm)(cotangents, np.float32(x), *parameters)

    def errors(function):
        function = on_mesh(make_mesh(1, 1), with_gradients(function))
        results = jax.jit(function)(cotangents, x, *parameters)
        pairs = zip(results, exact, strict=True)
        return [np.abs(np.float32(a) - b).mean() for a, b in pairs]

    for ours, xla in zip(errors(dense_in_kernel), errors(dense_of_norm), strict=True):
        assert ours <= 1.1 * xla


@pytest.mark.parametrize(
    ("shape", "dtype", "features", "fits"),
    [
        ((4, 14400, 128), jnp.bfloat16, 128, True),
        ((4, 3136, 256), jnp.bfloat16, 256, True),
        ((4, 14400, 128), jnp.float32, 128, False),
        ((4, 784, 512), jnp.bfloat16, 512, False),  # Many channels.
        ((4, 14400, 96), jnp.bfloat16, 96, False),
        ((4, 11025, 128), jnp.bfloat16, 128, False),  # 105 x 105: no whole tiles.
        ((3, 14400, 128), jnp.bfloat16, 128, False),  # Three samples for two devices.
    ],
)
def test_what_fits_the_kernel(shape, dtype, features, fits):
    array = jax.ShapeDtypeStruct(shape, dtype)
    assert on_mesh(make_mesh(2, 1), lambda x: fits_kernel(x, features))(array) == fits
    assert not fits_kernel(array, features)  # It is not known where the samples are.
