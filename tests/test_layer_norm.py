"""Layer normalisation: XLA's operations against Flax's, and the kernel for TPUs against those."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from refseg_jax.models.layers import layer_norm as module
from refseg_jax.models.layers.layer_norm import LayerNorm, fits_kernel, normalize
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)
EPSILON = 1e-5


def with_gradients(function, cotangent, *arrays, keep=False):
    y, pull_back = jax.vjp(lambda *arrays: function(*arrays, EPSILON, keep), *arrays)
    cotangent = (jnp.sin(cotangent), cotangent) if keep else cotangent
    return *jax.tree.leaves(y), *pull_back(cotangent)


def examples(*shape):
    """A cotangent, x with rows of all kinds of means and deviations, scale, bias."""
    mean, deviation = RNG.normal(size=(2, *shape[:-1], 1))
    x = RNG.normal(size=shape) * np.exp(deviation) + mean
    arrays = RNG.normal(size=shape), x, *RNG.normal(size=(2, shape[-1]))
    return [a.astype(np.float32) for a in arrays]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_is_that_of_flax(dtype):
    cotangent, x, scale, bias = examples(2, 3, 16)
    variables = {"params": {"scale": scale, "bias": bias}}

    def results(layer):
        def function(variables, x):
            return layer(EPSILON, dtype=dtype).apply(variables, x)

        y, pull_back = jax.vjp(function, variables, jnp.asarray(x, dtype))
        return y, *jax.tree.leaves(pull_back(jnp.asarray(cotangent, dtype)))

    ours = results(LayerNorm)
    # `use_fast_variance` would take the square of the mean from the mean of the squares.
    theirs = results(lambda *a, **b: nn.LayerNorm(*a, **b, use_fast_variance=False))
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2  # Of what is rounded to 8 bits.
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            *(np.asarray(v, np.float32) for v in (a, b)), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    "shape",
    [
        (4, 6, 5, 128),  # Some sets of rows in a block, and more than one of those.
        (2, 64, 128),  # A set in equal parts.
        (2, 50, 128),  # Parts of which the last ends beyond the last row.
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_kernel(keep, shape, devices, interpreted, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2048)
    arrays = examples(*shape)
    mesh = make_mesh(devices, 1)
    samples, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    placed = [jax.device_put(a, samples if a.ndim > 1 else whole) for a in arrays]
    results = functools.partial(with_gradients, keep=keep)
    ours = jax.jit(on_mesh(mesh, functools.partial(results, module.normalize_in_kernel)))(*placed)
    for a, b in zip(ours, results(normalize, *arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((4, 9, 128), jnp.bfloat16, True),
        ((4, 9, 128), jnp.float32, False),
        ((4, 9, 96), jnp.bfloat16, False),
        ((3, 9, 128), jnp.bfloat16, False),  # Three samples for two devices.
        ((4, 128), jnp.bfloat16, False),
    ],
)
def test_what_fits_the_kernel(shape, dtype, fits):
    array = jax.ShapeDtypeStruct(shape, dtype)
    assert on_mesh(make_mesh(2, 1), fits_kernel)(array) == fits
    assert not fits_kernel(array)  # It is not known where the samples are.


def test_a_tpu_takes_the_kernel(like_a_tpu):
    layer = LayerNorm(dtype=jnp.bfloat16)
    x = jnp.ones((2, 9, 128), jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)

    def jaxpr():
        return str(jax.make_jaxpr(on_mesh(make_mesh(2, 1), layer.apply))(variables, x))

    assert "pallas_call" in jaxpr() and "platform_index" in jaxpr()
    like_a_tpu()
    assert "pallas_call" in jaxpr() and "platform_index" not in jaxpr()


def test_layers_of_one_size_share_a_kernel(monkeypatch):
    """To trace a kernel takes its time, and a model has a hundred of them."""
    kernels = []
    pallas_call = pl.pallas_call

    def traced(*arguments, name, **how):
        kernels.append(name)
        return pallas_call(*arguments, name=name, **how)

    monkeypatch.setattr("jax.experimental.pallas.pallas_call", traced)
    x, vector = jnp.ones((2, 11, 128), jnp.bfloat16), jnp.ones(128)

    def three(x):
        for _ in range(3):
            x = module.normalize_in_kernel(x, vector, vector, 1e-5)
        return x.astype(jnp.float32).sum()

    jax.clear_caches()
    jax.make_jaxpr(on_mesh(make_mesh(2, 1), jax.grad(three)))(x)
    assert sorted(kernels) == ["layer_norm", "layer_norm_backward"]
