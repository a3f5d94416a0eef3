"""What dropout's hash keeps is random, and the same for any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.errors import UserError
from refseg_jax.models.cris import CRISConfig
from refseg_jax.models.layers import dropout
from refseg_jax.models.layers.dropout import Dropout, kept, words_of
from refseg_jax.sharding import batch_sharding, make_mesh

RATE = 0.3


def dropped(x, seed=0, train=True):
    return Dropout(RATE).apply({}, x, train, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("shape", [(2, 64), (2, 5, 64), (3, 4, 6, 64)])
def test_dropout(shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.bfloat16)
    y, pull_back = jax.vjp(dropped, x)
    left = np.asarray(y != 0)
    np.testing.assert_array_equal(y, jnp.where(left, x / (1 - RATE), 0))
    assert y.dtype == x.dtype
    (of_x,) = pull_back(jnp.ones_like(x))
    np.testing.assert_array_equal(of_x, jnp.where(left, jnp.ones_like(x) / (1 - RATE), 0))
    assert abs(left.mean() - (1 - RATE)) < 4 * np.sqrt(RATE * (1 - RATE) / x.size)
    assert (dropped(x, 1) != y).any()
    np.testing.assert_array_equal(dropped(x, train=False), x)
    rows = left.reshape(-1, 64)
    assert len(np.unique(rows, axis=0)) == len(rows)  # No two samples or rows are alike.


@pytest.mark.parametrize("train", [True, False])
def test_rectified(train):
    """As of a ReLU; and what is no number stays that."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 64)), jnp.bfloat16)

    def ours(x):
        layer = Dropout(RATE, rectified=True)
        return layer.apply({}, x, train, rngs={"dropout": jax.random.key(0)})

    def theirs(x):
        return dropped(jax.nn.relu(x), train=train)

    (y, pull_back), (expected, expected_back) = jax.vjp(ours, x), jax.vjp(theirs, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(pull_back(y)[0], expected_back(y)[0])
    assert jnp.isnan(ours(jnp.full_like(x, jnp.nan))).any()


def test_dropout_is_the_same_on_any_devices():
    x = jnp.ones((4, 8, 16))
    divided = jax.device_put(x, batch_sharding(make_mesh(4, 1)))
    np.testing.assert_array_equal(jax.jit(dropped)(divided), dropped(x))


def test_rows_are_those_of_the_hash(monkeypatch):
    words = jnp.asarray([[3, 4], [5, 6]], jnp.int32)
    monkeypatch.setattr(dropout, "words_of", lambda key, shape: words)
    mask = np.asarray(dropped(jnp.ones((2, 3, 5, 8))) != 0)
    for b, (first, second) in enumerate(np.asarray(words)):
        for i in range(3):
            for j in range(5):
                row = kept(RATE, first, second, np.int32(5 * i + j), np.arange(8, dtype=np.int32))
                np.testing.assert_array_equal(mask[b, i, j], row)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_what_is_no_rate(rate):
    with pytest.raises(UserError, match=f"config.model.dropout={rate} is not a rate"):
        CRISConfig(dropout=rate)


def test_a_rate_of_0_needs_no_random_stream():
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, True), x)


def mask_of(words, rate, cells):
    """Which weights are kept, bool [B, heads, cells, cells]."""
    first, second = jnp.moveaxis(jnp.asarray(words), 2, 0)[..., None, None]
    cell = jnp.arange(cells, dtype=jnp.int32)
    return np.asarray(kept(rate, first, second, cell[:, None], cell))


def dependence(mask, rate):
    """How far those of any two places along an axis agree more than by chance.

    In standard deviations: the worst of all pairs, and of the sum of all pairs' squares.
    """
    z = (mask - (1 - rate)) / np.sqrt(rate * (1 - rate))
    worst = []
    for axis in range(z.ndim):
        rows = np.moveaxis(z, axis, 0).reshape(z.shape[axis], -1)
        pairs = (rows @ rows.T / np.sqrt(rows.shape[1]))[np.triu_indices(len(rows), 1)]
        worst += [np.abs(pairs).max(), abs((pairs**2 - 1).sum()) / np.sqrt(2 * len(pairs))]
    return max(worst)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_mask_is_random(rate):
    mask = mask_of(words_of(jax.random.key(2), (4, 8)), rate, 128)
    share = mask.mean((2, 3))  # Of each head and sample.
    assert abs(mask.mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / mask.size)
    assert np.abs(share - (1 - rate)).max() < 5 * np.sqrt(rate * (1 - rate) / 128**2)
    assert dependence(mask, rate) < 6
    for head in mask[0]:
        assert dependence(head, rate) < 10  # Of 128 weights only: not quite normal.
    # It would be found out.
    for axis in range(4):
        twice = np.concatenate([mask, np.take(mask, [0], axis)], axis)
        assert dependence(twice, rate) > 50
    grid = mask[0, 0, :1] ^ mask[0, 0, :, :1]
    assert dependence(grid, rate) > 50


def test_words_that_are_close_to_each_other():
    words = np.array([[[7, 1], [8, 1], [8, 2], [8, -1000]]], np.int32)
    here, same, *others = np.where(mask_of(words, 0.5, 128)[0], 1, -1)
    assert (here[1:] == same[:-1]).all()
    for other in others:
        for shift in range(8):
            there = other[: len(other) - shift]
            assert abs((here[shift:] * there).sum()) < 5 * np.sqrt(there.size)
