"""Interpolation to twice the size: the kernel for TPUs against XLA's operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.models.layers.doubling import double_in_kernel, fits_kernel
from refseg_jax.models.layers.resize import resize_bilinear, resized_conv, upsample, upsampled_conv
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def doubled(x):
    return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]))


def with_gradient(function):
    def results(x, cotangent):
        y, pull_back = jax.vjp(function, x)
        return y, *pull_back(cotangent.astype(y.dtype))

    return results


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
def test_kernel(shape, devices, interpreted):
    """Some rows at a time, or one; and at the borders the outermost cells go on."""
    B, h, w, C = shape
    mesh = make_mesh(*devices)
    arrays = normal(*shape), normal(B, 2 * h, 2 * w, C)
    divided = jax.device_put(arrays, batch_sharding(mesh))
    ours = jax.jit(on_mesh(mesh, with_gradient(double_in_kernel)))(*divided)
    for a, b in zip(ours, with_gradient(doubled)(*arrays), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


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

    def both(x, kernel):
        return upsample(x, (4, 6)), upsampled_conv(x, kernel, (4, 6))

    def has_kernel(x, kernel):
        return "doubling" in str(jax.make_jaxpr(on_mesh(mesh, both))(x, kernel))

    theirs = doubled(x), resized_conv(x, kernel, (4, 6))
    assert not has_kernel(x[..., :64], kernel[:, :, :64])
    like_a_tpu()
    assert has_kernel(x, kernel)
    for a, b in zip(jax.jit(on_mesh(mesh, both))(x, kernel), theirs, strict=True):
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
