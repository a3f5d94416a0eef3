"""The kernel for TPUs, interpreted, against XLA's operations; those the released CRIS checks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.models.cris import Attention
from refseg_jax.models.layers import attention_kernel
from refseg_jax.models.layers.attention_kernel import attend, attend_in_kernel, fits_kernel
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("cells", "C", "heads", "logits", "devices"),
    [
        (16, 128, 1, 1 << 19, 1),
        (37, 256, 4, 1 << 19, 2),  # Rows and lanes that nothing fills.
        (50, 128, 4, 1000, 1),  # Several blocks of queries, the last not whole.
    ],
)
def test_kernel(cells, C, heads, logits, devices, interpreted, monkeypatch):
    monkeypatch.setattr(attention_kernel, "LOGITS", logits)
    q, k, v, cotangent = RNG.normal(size=(4, 2, cells, C)).astype(np.float32)
    q[0, 0] *= 100  # Logits whose exponential is infinite.
    mesh = make_mesh(devices, 1)

    def results(attention):
        def function(q, k, v, cotangent):
            y, pull_back = jax.vjp(functools.partial(attention, heads=heads), q, k, v)
            return y, *pull_back(cotangent)

        arrays = (jax.device_put(x, batch_sharding(mesh)) for x in (q, k, v, cotangent))
        return jax.jit(on_mesh(mesh, function))(*arrays)

    for ours, theirs in zip(results(attend_in_kernel), results(attend), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_which_arrays_fit():
    def fits(shape, heads=8, dtype=jnp.bfloat16, devices=2):
        function = on_mesh(make_mesh(devices, 1), lambda: jnp.array(fits_kernel(x, heads)))
        x = jax.ShapeDtypeStruct(shape, dtype)
        return bool(jax.jit(function)())

    assert fits((8, 676, 512))
    assert not fits((8, 676, 512), dtype=jnp.float32)
    assert not fits((7, 676, 512))  # Two devices.
    assert not fits((8, 676, 512), heads=2)  # A head of 256 channels.
    assert not fits((8, 676, 320), heads=10)  # Two registers and a half.
    assert not fits((8, 10_000, 512))
    assert not fits_kernel(jax.ShapeDtypeStruct((8, 676, 512), jnp.bfloat16), 8)  # No mesh.


@pytest.mark.parametrize(("train", "dropout", "kernels"), [(False, 0.1, 1), (True, 0.1, 0)])
def test_dropout_has_no_kernel(train, dropout, kernels):
    module = Attention(4, dropout, jnp.bfloat16)
    x = jnp.zeros((2, 16, 128), jnp.bfloat16)
    variables = module.init(jax.random.key(0), x, x, x)

    def function(x):
        return module.apply(variables, x, x, x, train=train, rngs={"dropout": jax.random.key(0)})

    text = str(jax.make_jaxpr(on_mesh(make_mesh(1, 1), function))(x))
    assert text.count("name=self_attention") == kernels
