"""Sampling of deformable attention: the kernel for TPUs, interpreted, against gathered pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.models.layers import deformable
from refseg_jax.models.layers.deformable import ms_deform_attn
from refseg_jax.models.layers.deformable_kernel import fits_kernel, sample_in_kernel
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)
SHAPES = ((11, 9), (5, 20))


def arrays_of(shapes, samples=2, queries=150, heads=2, dim=16, points=3, reach=0.2):
    """Values, locations, of which some are far outside and some on pixels' centres, and weights."""
    pixels = sum(h * w for h, w in shapes)
    value = RNG.normal(size=(samples, pixels, heads, dim))
    grid = samples, queries, heads, len(shapes), points
    locations = RNG.uniform(-reach, 1 + reach, size=(*grid, 2))
    size = np.array(shapes)[:, None, ::-1]
    locations[:, ::3] = (np.round(locations[:, ::3] * size) + 0.5) / size
    weights = RNG.normal(size=grid)
    return [x.astype(np.float32) for x in (value, locations, weights)]


def with_gradients(sample, arrays, mesh):
    """What it reads, and the gradients of all three, for some cotangent."""

    def function(value, locations, weights):
        y, pull_back = jax.vjp(sample, value, locations, weights)
        cotangent = jnp.sin(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)
        return y, *pull_back(cotangent)

    arrays = [jax.device_put(x, batch_sharding(mesh)) for x in arrays]
    return jax.jit(on_mesh(mesh, function))(*arrays)


def gathered(shapes):
    return lambda v, *rest: ms_deform_attn(v, shapes, *rest, form="gather")


def test_form_for_gpus(monkeypatch):
    """In float32 it is equal; what values in bfloat16 get from many queries adds up in float32."""
    mesh, (value, *rest) = make_mesh(1, 1), arrays_of(SHAPES)
    rounded = jnp.asarray(value, jnp.bfloat16)
    exact = with_gradients(gathered(SHAPES), (rounded.astype(jnp.float32), *rest), mesh)
    theirs = with_gradients(gathered(SHAPES), (rounded, *rest), mesh)
    monkeypatch.setattr(deformable, "on_gpus", lambda: True)
    ours = with_gradients(gathered(SHAPES), (rounded.astype(jnp.float32), *rest), mesh)
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    ours = with_gradients(gathered(SHAPES), (rounded, *rest), mesh)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        a, b = np.float32(a), np.float32(b)
        assert np.abs(a - c).mean() < 0.9 * np.abs(b - c).mean()


@pytest.mark.parametrize(
    ("shapes", "devices"), [(SHAPES, 1), (SHAPES, 2), (((3, 70), (2, 9)), 1), (((1, 1),), 1)]
)
def test_kernel(shapes, devices, interpreted):
    mesh, arrays = make_mesh(devices, 1), arrays_of(shapes)
    ours = with_gradients(functools.partial(sample_in_kernel, shapes), arrays, mesh)
    for a, b in zip(ours, with_gradients(gathered(shapes), arrays, mesh), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_queries_that_read_nothing(interpreted):
    """The first block's points are all above the map, the second's all below."""
    value, locations, weights = arrays_of(SHAPES, queries=256)
    locations[:, :128, ..., 1] = -3
    locations[:, 128:, ..., 1] = 7
    ours = with_gradients(
        functools.partial(sample_in_kernel, SHAPES), (value, locations, weights), make_mesh(1, 1)
    )
    for x in ours:
        assert not np.any(x)


def test_queries_that_look_one_way(interpreted):
    """A block reads a few tiles only, and other blocks others; bfloat16, as on a TPU."""
    shapes = ((64, 32),)
    value, locations, weights = arrays_of(shapes, queries=512, reach=0.0)
    locations[..., 1] = locations[..., 1] / 8 + np.arange(512)[:, None, None, None] // 128 / 4
    arrays = value.astype(jnp.bfloat16), locations, weights
    mesh = make_mesh(1, 1)
    ours = with_gradients(functools.partial(sample_in_kernel, shapes), arrays, mesh)
    for a, b in zip(ours, with_gradients(gathered(shapes), arrays, mesh), strict=True):
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("samples", "dim", "dtype", "shapes", "fits"),
    [
        (2, 32, jnp.bfloat16, ((60, 60), (30, 30), (15, 15)), True),
        (2, 32, jnp.float32, SHAPES, False),
        (2, 24, jnp.bfloat16, SHAPES, False),
        (3, 32, jnp.bfloat16, SHAPES, False),
        (2, 32, jnp.bfloat16, ((256, 256),), False),
    ],
)
def test_what_fits(samples, dim, dtype, shapes, fits):
    pixels = sum(h * w for h, w in shapes)
    value = jax.ShapeDtypeStruct((samples, pixels, 8, dim), dtype)
    assert not fits_kernel(value, shapes)  # Nothing is known of the devices.
    assert on_mesh(make_mesh(2, 1), lambda: fits_kernel(value, shapes))() == fits
