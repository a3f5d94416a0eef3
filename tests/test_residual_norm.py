"""The end of a layer and the beginning of the next: the kernel against XLA's operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.models.layers import layer_norm
from refseg_jax.models.layers.layer_norm import LayerNorm
from refseg_jax.models.layers.residual_norm import add_and_normalize, in_kernel, residual_norm
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh, replicated

RNG = np.random.default_rng(0)
EPSILON = 1e-5


def examples(*shape):
    """x, an update and two cotangents of that shape [B,n,C], words, and two scales and biases."""
    mean, deviation = RNG.normal(size=(2, 2, *shape[:-1], 1))
    arrays = RNG.normal(size=(2, *shape)) * np.exp(deviation) + mean
    arrays = *arrays, *RNG.normal(size=(2, *shape))
    words = RNG.integers(-(2**31), 2**31, (shape[0], 2), dtype=np.int32)
    vectors = RNG.normal(size=(4, shape[-1]))
    return [*(a.astype(np.float32) for a in arrays), words, *vectors.astype(np.float32)]


def with_gradients(function, rate, x, update, of_sum, of_y, words, *vectors):
    def run(x, update, *norms):
        return function(EPSILON, rate, x, update, words, *norms)

    results, pull_back = jax.vjp(run, x, update, vectors[:2], vectors[2:])
    return *results, *jax.tree.leaves(pull_back((of_sum, of_y)))


@pytest.mark.parametrize(
    ("n", "rate", "devices"),
    [
        (9, 0.3, 2),  # All rows of a sample at a time.
        (64, 0.0, 1),  # In equal parts.
        (50, 0.1, 1),  # Parts of which the last ends beyond the last row.
        (50, 0.0, 2),
    ],
)
def test_kernel(n, rate, devices, interpreted, monkeypatch):
    monkeypatch.setattr(layer_norm, "BLOCK", 2048)
    arrays = examples(4, n, 128)
    mesh = make_mesh(devices, 1)
    samples, whole = batch_sharding(mesh), replicated(mesh)
    placed = [jax.device_put(a, samples if a.ndim > 1 else whole) for a in arrays]
    kernel = functools.partial(with_gradients, in_kernel, rate)
    theirs = with_gradients(add_and_normalize, rate, *arrays)
    for a, b in zip(jax.jit(on_mesh(mesh, kernel))(*placed), theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_it_is_two_layer_norms_and_dropout():
    x, update, _, _, words, *vectors = examples(2, 7, 16)
    before, after = vectors[:2], vectors[2:]

    def norm(weights, x):
        params = dict(zip(("scale", "bias"), weights, strict=True))
        return LayerNorm(EPSILON).apply({"params": params}, x)

    rate = 0.25
    total, y = residual_norm(x, update, before, after, EPSILON, rate, words)
    dropped = total == x
    assert 0 < dropped.mean() < 2 * rate
    expected = x + np.where(dropped, 0, norm(before, update) / (1 - rate))
    np.testing.assert_allclose(total, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(y, norm(after, total))
    total, _ = residual_norm(x, update, before, after, EPSILON, 0.0, None)
    np.testing.assert_array_equal(total, x + norm(before, update))


def test_a_tpu_takes_the_kernel(like_a_tpu):
    x, update, _, _, words, *vectors = examples(2, 9, 128)

    def jaxpr(dtype):
        def function(x, update):
            return residual_norm(x, update, vectors[:2], vectors[2:], EPSILON, 0.1, words)

        arrays = x.astype(dtype), update.astype(dtype)
        return str(jax.make_jaxpr(on_mesh(make_mesh(2, 1), function))(*arrays))

    assert "pallas_call" in jaxpr(jnp.bfloat16) and "platform_index" in jaxpr(jnp.bfloat16)
    assert "pallas_call" not in jaxpr(jnp.float32)
    like_a_tpu()
    assert "pallas_call" in jaxpr(jnp.bfloat16) and "platform_index" not in jaxpr(jnp.bfloat16)
