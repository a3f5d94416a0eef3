"""Convolution of each channel by itself: its forms against PyTorch, and the kernel for TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.models.layers.depthwise import (
    DepthwiseConv,
    convolve_in_kernel,
    fits_kernel,
    grouped_conv,
    shifted_conv,
)
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh, replicated

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(0)


def by_torch(x, kernel, bias, cotangent):
    """y and the gradients of x, the kernel and the bias."""
    size, _, C = kernel.shape
    x, weight = (
        torch.from_numpy(a).permute(order).double().requires_grad_()
        for a, order in ((x, (0, 3, 1, 2)), (kernel[None], (3, 0, 1, 2)))
    )
    bias = torch.from_numpy(bias).double().requires_grad_()
    y = torch.nn.functional.conv2d(x, weight, bias, padding=size // 2, groups=C)
    y.backward(torch.from_numpy(cotangent).permute(0, 3, 1, 2))
    maps = (a.detach().permute(0, 2, 3, 1) for a in (y, x.grad))
    return *maps, weight.grad[:, 0].permute(1, 2, 0), bias.grad


@pytest.mark.parametrize(
    ("form", "devices"),
    [(shifted_conv, 1), (grouped_conv, 1), (convolve_in_kernel, 1), (convolve_in_kernel, 2)],
)
@pytest.mark.parametrize(("size", "h", "w"), [(5, 6, 3), (3, 5, 40)])
def test_forms_equal_torch(size, h, w, form, devices, interpreted):
    shape = (16, h, w, 128)
    x, cotangent = RNG.normal(size=(2, *shape)).astype(np.float32)
    kernel, bias = (RNG.normal(size=n).astype(np.float32) for n in ((size, size, 128), 128))
    mesh = make_mesh(devices, 1)

    def function(cotangent, *arrays):
        y, pull_back = jax.vjp(form, *arrays)
        return y, *pull_back(cotangent)

    samples, whole = batch_sharding(mesh), replicated(mesh)
    arrays = map(jax.device_put, (cotangent, x, kernel, bias), (samples, samples, whole, whole))
    ours = jax.jit(on_mesh(mesh, function))(*arrays)
    for a, b in zip(ours, by_torch(x, kernel, bias, cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((16, 52, 52, 1792), jnp.bfloat16, True),
        ((16, 52, 52, 1792), jnp.float32, False),  # Two maps of it are too large.
        ((16, 52, 52, 96), jnp.bfloat16, False),
        ((8, 52, 52, 128), jnp.bfloat16, False),  # Four samples for each of two devices.
        ((16, 60, 60, 128), jnp.bfloat16, False),
    ],
)
def test_what_fits_the_kernel(shape, dtype, fits):
    array = jax.ShapeDtypeStruct(shape, dtype)
    assert on_mesh(make_mesh(2, 1), fits_kernel)(array) == fits
    assert not fits_kernel(array)  # It is not known where the samples are.


def test_a_tpu_takes_the_kernel(like_a_tpu):
    conv = DepthwiseConv(7, jnp.bfloat16)
    x = jnp.ones((16, 4, 4, 128), jnp.bfloat16)
    variables = jax.eval_shape(lambda: conv.init(jax.random.key(0), x))

    def jaxpr():
        return str(jax.make_jaxpr(on_mesh(make_mesh(2, 1), conv.apply))(variables, x))

    assert "pallas_call" in jaxpr() and "platform_index" in jaxpr()
    like_a_tpu()
    assert "pallas_call" in jaxpr() and "platform_index" not in jaxpr()
