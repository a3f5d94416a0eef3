"""The kernel for TPUs, interpreted, against XLA's operations; those the released CRIS checks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.models.cris import Attention
from refseg_jax.models.layers import attention_kernel
from refseg_jax.models.layers.attention_kernel import (
    attend,
    attend_in_kernel,
    fits_kernel,
    self_attention,
)
from refseg_jax.models.layers.dropout import words_of
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh
from tests.test_dropout import mask_of

RNG = np.random.default_rng(0)


def on_devices(devices, function, *arrays):
    mesh = make_mesh(devices, 1)
    arrays = (jax.device_put(x, batch_sharding(mesh)) for x in arrays)
    return jax.jit(on_mesh(mesh, function))(*arrays)


@pytest.mark.parametrize(("dropout", "causal"), [(0.0, False), (0.3, False), (0.0, True)])
@pytest.mark.parametrize(
    ("cells", "C", "heads", "logits", "devices"),
    [
        (16, 128, 1, 1 << 19, 1),
        (37, 256, 4, 1 << 19, 2),  # Rows and lanes that nothing fills.
        (50, 128, 4, 1000, 1),  # Several blocks of queries, the last not whole,
        (300, 128, 4, 1000, 2),  # in the backward pass too.
    ],
)
def test_kernel(cells, C, heads, logits, devices, dropout, causal, interpreted, monkeypatch):
    monkeypatch.setattr(attention_kernel, "LOGITS", logits)
    q, k, v, cotangent = RNG.normal(size=(4, 4, cells, C)).astype(np.float32)
    q *= (C / heads) ** -0.5
    q[0, 0] *= 64  # Logits whose exponential is infinite.

    def results(attention):
        def function(q, k, v, cotangent):
            words = words_of(jax.random.key(0), (len(q), heads))

            def attend(q, k, v):
                return attention(q, k, v, words, heads, dropout, causal)

            y, pull_back = jax.vjp(attend, q, k, v)
            return y, *pull_back(cotangent)

        return on_devices(devices, function, q, k, v, cotangent)

    # What a logit of 150 is rounded by, 1e-5 and more, its weight and the gradients are off by.
    for ours, theirs in zip(results(attend_in_kernel), results(attend), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(("dropout", "causal"), [(0.0, False), (0.3, False), (0.0, True)])
def test_form_for_gpus(dropout, causal, monkeypatch):
    """In float32 it is equal; in bfloat16 its errors are not twice the other's."""
    rng, heads = np.random.default_rng(0), 4
    q, cotangent = rng.normal(size=(2, 2, 37, 64)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 37 if causal else 21, 64)).astype(np.float32)

    def results(dtype):
        def attend(q, k, v):
            return self_attention(q, k, v, heads, dropout, jax.random.key(0), causal)

        *arrays, of_y = (x.astype(dtype) for x in (q / 4, k, v, cotangent))
        y, pull_back = jax.vjp(attend, *arrays)
        assert y.dtype == dtype
        return [np.float32(x) for x in (y, *pull_back(of_y))]

    exact, theirs = results(jnp.float32), results(jnp.bfloat16)
    monkeypatch.setattr(attention_kernel, "on_gpus", lambda: True)
    ours = results(jnp.float32)
    assert not all(map(np.array_equal, ours, exact))
    for a, b in zip(ours, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())
    for a, b, c in zip(results(jnp.bfloat16), theirs, exact, strict=True):
        assert np.abs(a - c).mean() < 2 * np.abs(b - c).mean()


def test_dropout_is_that_of_flax():
    B, N, heads, rate = 2, 16, 4, 0.3
    q, k, v = RNG.normal(size=(3, B, N, heads, 8)).astype(np.float32)
    weights = jax.nn.softmax(jnp.einsum("bnhd,bthd->bhnt", q, k))
    words = words_of(jax.random.key(0), (B, heads))
    kept = mask_of(words, rate, N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax.random.bernoulli", lambda key, p, shape: kept)
        weights = nn.Dropout(rate, deterministic=False).apply(
            {}, weights, rngs={"dropout": jax.random.key(0)}
        )
    expected = jnp.einsum("bhnt,bthd->bnhd", weights, v).reshape(B, N, -1)
    q, k, v = (x.reshape(B, N, -1) for x in (q, k, v))
    np.testing.assert_allclose(attend(q, k, v, words, heads, rate), expected, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 2])
def test_mask_is_the_same_on_any_devices(devices, interpreted, monkeypatch):
    monkeypatch.setattr(attention_kernel, "LOGITS", 1000)  # Four blocks of queries.
    B, heads, cells = 4, 2, 64
    alike = np.zeros((B, cells, 128), np.float32)
    # All weights are the same, and each key's value is 1 in a channel of its own.
    own = np.broadcast_to(np.tile(np.eye(cells, dtype=np.float32), heads), alike.shape)

    def function(q, v):
        words = words_of(jax.random.key(1), (B, heads))
        return attend_in_kernel(q, q, v, words, heads, 0.3)

    y = on_devices(devices, function, alike, own).reshape(B, cells, heads, cells)
    expected = mask_of(words_of(jax.random.key(1), (B, heads)), 0.3, cells)
    np.testing.assert_array_equal(y.transpose(0, 2, 1, 3) > 0, expected)


def test_which_arrays_fit():
    def fits(shape, heads=8, dtype=jnp.bfloat16, devices=2):
        function = on_mesh(make_mesh(devices, 1), lambda: jnp.array(fits_kernel(x, heads)))
        x = jax.ShapeDtypeStruct(shape, dtype)
        return bool(jax.jit(function)())

    assert fits((8, 676, 512))
    assert not fits((8, 676, 512), dtype=jnp.float32)
    assert fits((8, 2, 512)) and not fits((8, 1, 512))
    assert not fits((7, 676, 512))  # Two devices.
    assert not fits((8, 676, 512), heads=2)  # A head of 256 channels.
    assert not fits((8, 676, 320), heads=10)  # Two registers and a half.
    assert fits((8, 2560, 512)) and not fits((8, 2561, 512))
    assert not fits_kernel(jax.ShapeDtypeStruct((8, 676, 512), jnp.bfloat16), 8)  # No mesh.


@pytest.mark.parametrize("train", [False, True])
def test_which_attention_has_the_kernel(train):
    module = Attention(4, 0.1, jnp.bfloat16)
    x = jnp.zeros((2, 16, 128), jnp.bfloat16)
    variables = module.init(jax.random.key(0), x, x, x)

    def kernels(*mask):
        def function(x):
            def attend(x):
                return module.apply(
                    variables, x, x, x, *mask, train=train, rngs={"dropout": jax.random.key(0)}
                )

            y, pull_back = jax.vjp(attend, x)
            return pull_back(y)

        text = str(jax.make_jaxpr(on_mesh(make_mesh(1, 1), function))(x))
        names = "self_attention", "self_attention_backward"
        return [text.count(f"name={name}\n") for name in names]

    assert kernels() == [1, 1]
    assert kernels(jnp.ones((2, 16), bool)) == [0, 0]


def test_dropout_in_training():
    module = Attention(4, 0.5)
    x = jnp.asarray(RNG.normal(size=(2, 16, 32)), jnp.float32)
    variables = module.init(jax.random.key(0), x, x, x)

    def attend(seed, train=True):
        rngs = {"dropout": jax.random.key(seed)}
        return module.apply(variables, x, x, x, train=train, rngs=rngs)

    np.testing.assert_array_equal(attend(0), attend(0))
    assert np.abs(attend(0) - attend(1)).max() > 0.1
    mean = jnp.mean(jax.vmap(attend)(jnp.arange(400)), 0)
    np.testing.assert_allclose(mean, attend(0, train=False), atol=0.15)
