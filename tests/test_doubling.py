"""Interpolation to twice the size: the kernel for TPUs against XLA's operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from refseg_jax.models.layers.doubling import (
    double_in_kernel,
    fits_kernel,
    pool,
    pool_with_kernel,
)
from refseg_jax.models.layers.norms import normalize_by
from refseg_jax.models.layers.resize import resize_bilinear, resized_conv, upsample, upsampled_conv
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh, replicated

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def doubled(x):
    return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))


def normed_and_doubled(x, vectors):
    return doubled(x if vectors is None else jax.nn.relu(normalize_by(x, vectors)))


def with_gradient(function):
    def results(x, cotangent, *vectors):
        y, pull_back = jax.vjp(function, x, *vectors)
        return y, *jax.tree.leaves(pull_back(cotangent.astype(y.dtype)))

    return results


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("shape", "devices"),
    [
        ((16, 4, 6, 256), (1, 1)),
        ((16, 3, 5, 128), (2, 1)),
        ((32, 2, 2, 128), (2, 2)),
        ((8, 1, 1, 128), (1, 1)),
        ((8, 6, 1, 128), (1, 1)),
    ],
)
def test_kernel(shape, devices, normed, interpreted):
    """Some rows at a time, or one; and at the borders the outermost cells go on."""
    B, h, w, C = shape
    mesh = make_mesh(*devices)
    arrays = normal(*shape), normal(B, 2 * h, 2 * w, C)
    vectors = tuple(normal(3, C)) if normed else None
    divided = jax.device_put(arrays, batch_sharding(mesh))
    whole = jax.device_put(vectors, replicated(mesh))
    ours = jax.jit(on_mesh(mesh, with_gradient(double_in_kernel)))(*divided, whole)
    theirs = with_gradient(normed_and_doubled)(*arrays, vectors)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("shape", "devices"), [((16, 4, 6, 256), (1, 1)), ((32, 2, 2, 128), (2, 2))]
)
def test_pool(shape, devices, interpreted):
    B, h, w, C = shape
    mesh = make_mesh(*devices)
    arrays = normal(*shape), normal(B, h // 2, w // 2, C)
    divided = jax.device_put(arrays, batch_sharding(mesh))
    ours = jax.jit(on_mesh(mesh, with_gradient(pool_with_kernel)))(*divided)
    for a, b in zip(ours, with_gradient(pool)(*arrays), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [((8, 4, 6, 128), 1), ((8, 4, 7, 128), 0), ((8, 5, 6, 128), 0), ((8, 4, 6, 64), 0)],
)
def test_which_pool_has_a_kernel(shape, kernels, like_a_tpu):
    """Of whole cells and registers."""
    x = jnp.asarray(normal(*shape), jnp.bfloat16)
    y = nn.avg_pool(x, (2, 2), (2, 2))
    np.testing.assert_array_equal(np.float32(pool(x)), np.float32(y))
    like_a_tpu()
    text = str(jax.make_jaxpr(on_mesh(make_mesh(1, 1), with_gradient(pool)))(x, y))
    assert text.count("name=spread\n") == kernels


def test_rounding_is_that_of_bfloat16(interpreted):
    """The kernel, in bfloat16, is no farther from float32 than XLA's operations are."""
    x = jnp.asarray(normal(8, 4, 5, 128), jnp.bfloat16)
    cotangent = jnp.asarray(normal(8, 8, 10, 128), jnp.bfloat16)
    exact = with_gradient(doubled)(np.float32(x), cotangent)

    def errors(function):
        results = jax.jit(on_mesh(make_mesh(1, 1), with_gradient(function)))(x, cotangent)
        return [np.abs(np.float32(a) - b).mean() for a, b in zip(results, exact, strict=True)]

    for ours, xla in zip(errors(double_in_kernel), errors(doubled), strict=True):
        assert ours <= xla


def test_where_there_is_a_kernel(interpreted, like_a_tpu):
    """Of maps that fit it; else what XLA does, which is what other devices do."""
    x, kernel = jnp.asarray(normal(8, 2, 3, 128), jnp.bfloat16), normal(3, 3, 128, 4)
    kernel = jnp.asarray(kernel, jnp.bfloat16)
    mesh = make_mesh(1, 1)

    vectors = tuple(normal(3, 128))

    def all_three(x, kernel, vectors):
        size = 4, 6
        normed = upsampled_conv(x, kernel, size, vectors)
        return upsample(x, size), upsampled_conv(x, kernel, size), normed

    def kernels(*arrays):
        return str(jax.make_jaxpr(on_mesh(mesh, all_three))(*arrays)).count("name=doubling")

    normed = jax.nn.relu(normalize_by(x, vectors)).astype(x.dtype)
    theirs = doubled(x), *(resized_conv(a, kernel, (4, 6)) for a in (x, normed))
    assert kernels(x[..., :64], kernel[:, :, :64], tuple(v[:64] for v in vectors)) == 0
    like_a_tpu()
    assert kernels(x, kernel, vectors) == 2  # Two of the three are alike.
    ours = jax.jit(on_mesh(mesh, all_three))(x, kernel, vectors)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=2e-2 * float(abs(b).max()))


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((16, 52, 52, 512), jnp.bfloat16, True),
        ((16, 56, 56, 512), jnp.bfloat16, True),
        ((16, 52, 52, 512), jnp.float32, False),
        ((16, 52, 52, 96), jnp.bfloat16, False),  # They do not fill registers.
        ((16, 104, 104, 256), jnp.bfloat16, False),  # Large maps.
        ((8, 52, 52, 512), jnp.bfloat16, False),  # Four samples on each of two devices.
    ],
)
def test_fits_kernel(shape, dtype, fits):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert on_mesh(make_mesh(2, 1), fits_kernel)(x) == fits
    assert not fits_kernel(x)  # Without a mesh.
