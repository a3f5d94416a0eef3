"""Linear layers against Flax's, and on a TPU against themselves elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from refseg_jax.models.layers.dense import Dense, SplitDense, add_bias

RNG = np.random.default_rng(0)


def gradients(module, variables, x):
    """Output, and gradients of the sum of its squares in the parameters and in `x`."""

    def loss(variables, x):
        y = jnp.concatenate(jax.tree.leaves(module.apply(variables, x)), -1)
        return (y.astype(jnp.float32) ** 2).sum(), y

    (_, y), of_both = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables, x)
    return y, of_both


@pytest.mark.parametrize("fields", [{}, {"use_bias": False}, {"dtype": jnp.bfloat16}], ids=str)
def test_dense_equals_flax(fields):
    x = jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32)
    variables = Dense(7, **fields).init(jax.random.key(0), x)
    jax.tree.map(
        np.testing.assert_array_equal, variables, nn.Dense(7, **fields).init(jax.random.key(0), x)
    )
    variables = jax.tree.map(lambda a: a + 0.1, variables)  # No bias stays 0.
    ours, theirs = (gradients(kind(7, **fields), variables, x) for kind in (Dense, nn.Dense))
    # Flax adds the rows of a bfloat16 bias's gradient up in bfloat16.
    tolerance = 2e-2 if fields.get("dtype") else 1e-6
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance)


def test_split_dense_is_one_dense(like_a_tpu):
    x = jnp.asarray(RNG.normal(size=(2, 3, 5)), jnp.float32)
    split, whole = SplitDense(3, 4), Dense(12)
    variables = jax.tree.map(lambda a: a + 0.1, split.init(jax.random.key(0), x))
    here, theirs = (gradients(module, variables, x) for module in (split, whole))
    like_a_tpu()
    there = gradients(split, variables, x)
    for ours in (here, there):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, theirs)


@pytest.mark.parametrize("shape", [(9,), (3, 1000, 9), (2, 3, 4, 9)])
def test_gradient_of_a_bias_on_a_tpu(shape, like_a_tpu):
    x = jnp.asarray(RNG.normal(size=shape), jnp.bfloat16)
    like_a_tpu()
    _, pull_back = jax.vjp(add_bias, x, jnp.zeros(9))
    of_x, of_bias = pull_back(x)
    assert (of_x == x).all()
    assert of_bias.dtype == jnp.float32
    total = np.float64(x).reshape(-1, 9).sum(0)
    np.testing.assert_allclose(of_bias, total, rtol=1e-5, atol=1e-3)
