"""Interpolation to twice the size: the kernel for TPUs against XLA's operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.models.layers import doubling
from refseg_jax.models.layers.doubling import double_in_kernel, fits_kernel
from refseg_jax.models.layers.norms import normalize_by
from refseg_jax.models.layers.resize import resize_bilinear, resized_conv, upsample, upsampled_conv
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh, replicated

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def doubled(x):
    return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))


def normed_and_doubled(x, vectors):
    if vectors is not None:
        x = jax.nn.relu(normalize_by(x, vectors)).astype(x.dtype)
    return doubled(x)


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


@pytest.mark.parametrize("normed", [False, True])
def test_rounding_is_that_of_bfloat16(normed, interpreted):
    """The kernel, in bfloat16, is no farther from float32 than XLA's operations are."""
    vectors = tuple(normal(3, 128)) if normed else None
    x = jnp.asarray(normal(8, 4, 5, 128), jnp.bfloat16)
    cotangent = jnp.asarray(normal(8, 8, 10, 128), jnp.bfloat16)
    exact = with_gradient(normed_and_doubled)(np.float32(x), cotangent, vectors)

    def errors(function):
        function = on_mesh(make_mesh(1, 1), with_gradient(function))
        results = jax.jit(function)(x, cotangent, vectors)
        return [np.abs(np.float32(a) - b).mean() for a, b in zip(results, exact, strict=True)]

    for ours, xla in zip(errors(double_in_kernel), errors(normed_and_doubled), strict=True):
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


def test_a_map_may_fit_without_its_norm(interpreted, like_a_tpu, monkeypatch):
    x, kernel = jnp.asarray(normal(8, 2, 5, 128), jnp.bfloat16), normal(3, 3, 128, 4)
    kernel, vectors, size = jnp.asarray(kernel, jnp.bfloat16), tuple(normal(3, 128)), (4, 10)
    theirs = upsampled_conv(x, kernel, size, vectors)
    monkeypatch.setattr(doubling, "BLOCK", 11 * 5 * 8 * 128 * 2)  # 10 rows, but no 12.
    like_a_tpu()
    function = on_mesh(make_mesh(1, 1), lambda x: upsampled_conv(x, kernel, size, vectors))
    assert "name=doubling" in str(jax.make_jaxpr(function)(x))
    ours = jax.jit(function)(x)
    np.testing.assert_allclose(*np.float32((ours, theirs)), atol=2e-2 * float(abs(theirs).max()))


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
