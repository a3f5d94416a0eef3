"""Norms of 1x1 convolutions by what goes into these, against norms by what comes out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from refseg_jax.models.layers import conv
from refseg_jax.models.layers.conv import ConvNorm
from refseg_jax.models.layers.pointwise import norm_by_inputs
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)
SHAPE = 4, 6, 5, 8
DIM = 32


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def examples(B=SHAPE[0], h=SHAPE[1], w=SHAPE[2]):
    """Variables, a map whose channels depend on each other and have means, and a cotangent."""
    x = normal(B, h, w, 8) @ normal(8, 8) + 2 * normal(8)
    variables = ConvNorm(DIM, 1).init(jax.random.key(0), x, False)
    variables = jax.tree.map(lambda a: a + 0.3 * np.abs(normal(*a.shape)), variables)
    return variables, x, normal(B, h, w, DIM)


def trained(variables, x, cotangent, dtype=jnp.float32, pixels=1):
    """The map, what is recorded of the batch, and the gradients."""
    layer = ConvNorm(DIM, 1, activation=jax.nn.relu, dtype=dtype)

    def apply(params, x):
        B, h, w, C = x.shape
        x = x.reshape(B, h // pixels, w, pixels * C)
        how = {"squares": (pixels, 1)} if pixels > 1 else {}
        y, updated = layer.apply(
            {**variables, "params": params}, x, True, **how, mutable="batch_stats"
        )
        return y.reshape(B, h, w, DIM), updated

    y, pull_back, updated = jax.vjp(apply, variables["params"], x, has_aux=True)
    return y, updated, pull_back(cotangent.astype(y.dtype))


@pytest.fixture
def by_inputs(monkeypatch):
    """Call it, and norms are by inputs from then on."""
    return lambda: monkeypatch.setattr(conv, "norm_by_inputs", lambda *a: True)


@pytest.mark.parametrize("pixels", [1, 2])
@pytest.mark.parametrize("devices", [(1, 1), (2, 1), (2, 2)])
def test_norm_by_inputs(devices, pixels, by_inputs):
    variables, *maps = examples()
    theirs = jax.jit(functools.partial(trained, pixels=pixels))(variables, *maps)
    by_inputs()
    mesh = make_mesh(*devices)
    variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
    maps = jax.device_put(maps, batch_sharding(mesh))
    ours = jax.jit(on_mesh(mesh, functools.partial(trained, pixels=pixels)))(variables, *maps)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_the_wide_map_is_not_kept(by_inputs):
    """For the gradients there is the ReLU's, and no other."""
    variables, x, cotangent = examples()

    def kept():
        def apply(params):
            y, _ = ConvNorm(DIM, 1, activation=jax.nn.relu).apply(
                {**variables, "params": params}, x, True, mutable="batch_stats"
            )
            return y

        both = on_mesh(make_mesh(1, 1), functools.partial(jax.vjp, apply))
        _, pull_back = jax.eval_shape(both, variables["params"])
        return [a.shape for a in jax.tree.leaves(pull_back)].count(cotangent.shape)

    with_norm = kept()
    by_inputs()
    assert kept() < with_norm


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_rounding_is_that_of_bfloat16(mean, by_inputs):
    """In bfloat16 it is no farther from float32 than a norm of the rounded map is.

    Also where all pixels have gradients in common, which the norm takes away: the kernel's is the
    difference of two that grow with the pixels then.
    """
    variables, x, cotangent = examples(2, 32, 32)
    cotangent += mean * normal(DIM)
    x = jnp.asarray(x, jnp.bfloat16)
    variables["params"]["conv"]["kernel"] = np.float32(
        jnp.asarray(variables["params"]["conv"]["kernel"], jnp.bfloat16)
    )
    cotangent = np.float32(jnp.asarray(cotangent, jnp.bfloat16))
    exact = jax.jit(trained)(variables, np.float32(x), cotangent)

    def errors():
        step = on_mesh(make_mesh(1, 1), functools.partial(trained, dtype=jnp.bfloat16))
        results = jax.jit(step)(variables, x, cotangent)
        pairs = zip(jax.tree.leaves(results), jax.tree.leaves(exact), strict=True)
        return [np.sqrt(np.square(np.float32(a) - b).mean()) for a, b in pairs]

    theirs = errors()
    by_inputs()
    for ours, others in zip(errors(), theirs, strict=True):
        assert ours <= 1.2 * others


def test_channels_without_variance(by_inputs):
    """Neither negative variances nor what divides by them."""
    variables, _, cotangent = examples()
    by_inputs()
    step = on_mesh(make_mesh(1, 1), trained)
    results = jax.jit(step)(variables, 100 * np.ones(SHAPE, np.float32), cotangent)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(results))


@pytest.mark.parametrize(
    ("shape", "dim", "pixels", "dtype", "fits"),
    [
        ((16, 26, 26, 256), 1024, 1, jnp.bfloat16, True),
        ((16, 104, 52, 128), 256, 2, jnp.bfloat16, True),
        ((16, 26, 26, 256), 1024, 1, jnp.float32, False),
        ((16, 26, 26, 512), 1024, 1, jnp.bfloat16, False),  # Many channels go in.
        ((16, 13, 13, 512), 2048, 1, jnp.bfloat16, False),  # Few pixels.
        ((15, 26, 26, 256), 1024, 1, jnp.bfloat16, False),  # No whole samples.
    ],
)
def test_where(shape, dim, pixels, dtype, fits, monkeypatch):
    x = jax.ShapeDtypeStruct(shape, dtype)
    mesh = make_mesh(2, 1)
    assert not on_mesh(mesh, norm_by_inputs)(x, dim, pixels)  # A CPU.
    monkeypatch.setattr("refseg_jax.models.layers.pointwise.on_tpus", lambda: True)
    assert on_mesh(mesh, norm_by_inputs)(x, dim, pixels) == fits
