"""Losses against PyTorch and against slow loops written straight from the paper's equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.losses.contrastive import cmic_loss, draw_samples
from refseg_jax.losses.segmentation import (
    majority_downsample,
    masked_mean,
    nearest_downsample,
    sigmoid_bce,
)

RNG = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# Masks.


def test_bce_equals_torch():
    torch = pytest.importorskip("torch")
    logits = RNG.normal(scale=5, size=(2, 3, 4)).astype(np.float32)
    target, weight = RNG.random((2, 3, 4)) < 0.5, RNG.random((2, 3, 4)).astype(np.float32)
    theirs = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(logits), torch.tensor(target, dtype=torch.float32), reduction="none"
    ).numpy()
    np.testing.assert_allclose(sigmoid_bce(logits, target), theirs.mean((1, 2)), rtol=1e-5)
    weighted = (theirs * weight).sum((1, 2)) / weight.sum((1, 2))
    np.testing.assert_allclose(sigmoid_bce(logits, target, weight), weighted, rtol=1e-5)


def test_bce_is_stable():
    logits, target = (
        jnp.array([[1e4, -1e4], [1e4, -1e4]]),
        jnp.array([[True, False], [False, True]]),
    )
    np.testing.assert_allclose(sigmoid_bce(logits, target), [0, 1e4])
    gradient = jax.grad(lambda x: sigmoid_bce(x, target).sum())(logits)
    np.testing.assert_allclose(gradient, [[0, 0], [0.5, -0.5]])
    assert sigmoid_bce(logits.astype(jnp.bfloat16), target).dtype == jnp.float32
    np.testing.assert_array_equal(sigmoid_bce(logits, target, jnp.zeros((2, 2))), 0)


def test_majority_downsample():
    mask = np.zeros((1, 6, 8), bool)
    mask[0, :4, :2] = True  # 8 of 16: a tie goes to the foreground.
    mask[0, 0, 4:8] = mask[0, 1, 4:7] = True  # 7 of 16.
    mask[0, 4:, :2] = True  # 4 of the 8 pixels that the block has.
    mask[0, 4, 4:7] = True  # 3 of 8.
    labels = majority_downsample(jnp.asarray(mask), 4)
    assert labels.dtype == bool
    np.testing.assert_array_equal(labels, [[[True, False], [True, False]]])
    for side in (1, 5, 6, 7, 8):  # The border is what it is, whatever the size.
        assert majority_downsample(jnp.ones((1, side, side), bool), 4).all()
    for factor in (2, 4):
        expected = np.random.default_rng(factor).random((2, 11, 9)) < 0.5
        found = majority_downsample(jnp.asarray(expected), factor)
        for b, i, j in np.ndindex(found.shape):
            block = expected[b, factor * i : factor * (i + 1), factor * j : factor * (j + 1)]
            assert found[b, i, j] == (2 * block.sum() >= block.size)
    assert majority_downsample(jnp.zeros((2, 9, 5), bool)).shape == (2, 3, 2)


@pytest.mark.parametrize("size", [(3, 5), (5, 7), (11, 13), (12, 20), (1, 1), (24, 30)])
def test_nearest_downsample(size):
    mask = np.random.default_rng(1).random((2, 12, 20)) < 0.5
    rows, columns = (np.arange(n) * m // n for n, m in zip(size, (12, 20), strict=True))
    labels = nearest_downsample(jnp.asarray(mask), size)
    np.testing.assert_array_equal(labels, mask[:, rows][:, :, columns])


def test_masked_mean_ignores_padding_rows():
    per_sample = jnp.array([1.0, 3.0, jnp.nan])
    assert masked_mean(per_sample, jnp.array([True, True, False])) == 2
    assert masked_mean(per_sample, jnp.zeros(3, bool)) == 0


# Contrast. Three images: both kinds of mistakes and plenty to draw from; fewer than M samples of
# one class; nothing misclassified.

B, S, C, M = 3, 14, 3, 4


@pytest.fixture(scope="module")
def scene():
    pixels = RNG.normal(size=(B, S, C))
    center = RNG.normal(size=(B, C))
    predicted = np.einsum("bsc,bc->bs", pixels, center) > 0
    labels = predicted ^ (RNG.random((B, S)) < 0.35)
    keep = np.flatnonzero(predicted[1])[:2]
    labels[1] = ~predicted[1]  # No true pixel of either class ...
    labels[1, keep] = True  # ... but two true positives.
    labels[2] = predicted[2]
    return pixels, center, labels


def products(pixels, center):
    return jnp.einsum("bsc,bc->bs", jnp.asarray(pixels), jnp.asarray(center))


def drawn(key, image, members, positive):
    """What `cmic_loss` draws for one class of one image, as a list."""
    key = jax.random.split(jax.random.split(key, B)[image])[int(positive)]
    indices, taken = draw_samples(key, jnp.asarray(members), M)
    return [int(j) for j, is_taken in zip(indices, taken, strict=True) if is_taken]


def slow_cmic(pixels, center, labels, key, at=None):
    """Eq. 10-12 in loops; predictions and lambda are those of `at`, for constant weights."""
    at_pixels, at_center = at or (pixels, center)
    losses = []
    for b in range(B):
        probability = [sigmoid(at_center[b] @ v) for v in at_pixels[b]]
        predicted = np.array([p > 0.5 for p in probability])
        loss = 0.0
        for positive in (False, True):
            wrong = np.flatnonzero((predicted != positive) & (labels[b] == positive))
            samples = drawn(key, b, (predicted == positive) & (labels[b] == positive), positive)
            for i in wrong:
                for j in samples:
                    weight = probability[j] if positive else 1 - probability[j]
                    loss -= weight * np.log(sigmoid(pixels[b, i] @ pixels[b, j])) / len(wrong)
        losses.append(loss)
    return np.array(losses)


def test_pixel_text_loss_is_eq_8_and_9(scene):
    pixels, center, labels = scene
    expected = [
        np.mean(
            [
                -np.log(sigmoid(center[b] @ v)) if y else -np.log(1 - sigmoid(center[b] @ v))
                for v, y in zip(pixels[b], labels[b], strict=True)
            ]
        )
        for b in range(B)
    ]
    np.testing.assert_allclose(sigmoid_bce(products(pixels, center), labels), expected, rtol=1e-5)


def test_cmic_loss_is_eq_10_to_12(scene):
    pixels, center, labels = scene
    key = jax.random.key(3)
    ours = cmic_loss(pixels, products(pixels, center), labels, key, M)
    expected = slow_cmic(pixels, center, labels, key)
    assert ours.dtype == jnp.float32 and expected[0] > 0 and expected[1] > 0
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert ours[2] == 0


def test_cmic_gradient(scene):
    pixels, center, labels = scene
    key = jax.random.key(3)
    by_pixels, by_center = jax.grad(
        lambda v, e: cmic_loss(v, products(v, e), labels, key, M).sum(), argnums=(0, 1)
    )(jnp.asarray(pixels), jnp.asarray(center))
    np.testing.assert_array_equal(by_center, 0)

    step = 1e-5
    expected = np.zeros_like(pixels)
    for place in np.ndindex(*pixels.shape[1:]):
        nudge = np.zeros_like(pixels)
        nudge[:, *place] = step
        up, down = (
            slow_cmic(pixels + sign * nudge, center, labels, key, at=(pixels, center))
            for sign in (1, -1)
        )
        expected[:, *place] = (up - down) / (2 * step)
    np.testing.assert_allclose(by_pixels, expected, atol=1e-5)
    np.testing.assert_array_equal(by_pixels[2], 0)


def test_cmic_stays_finite_for_large_products():
    pixels, center = jnp.full((1, 4, 2), 300.0).at[0, 1].mul(-1), jnp.full((1, 2), 300.0)
    labels = jnp.array([[True, True, False, False]])
    loss, gradient = jax.value_and_grad(
        lambda p: cmic_loss(p, products(p, center), labels, jax.random.key(0)).sum()
    )(pixels)
    # The one false negative times the one true positive; there is no true negative to draw.
    np.testing.assert_allclose(loss, 2 * 300.0**2)
    assert np.isfinite(gradient).all()


def test_draw_samples():
    member = np.zeros(50, bool)
    member[10:22] = True
    keys = jax.random.split(jax.random.key(0), 2000)
    indices, taken = jax.vmap(lambda key: draw_samples(key, jnp.asarray(member), 5))(keys)
    assert taken.all() and member[indices].all()
    assert all(len(set(row)) == 5 for row in np.asarray(indices))
    counts = np.bincount(np.asarray(indices).ravel(), minlength=50)[10:22]
    # Each of 12 is drawn with probability 5/12: 833 of 2000, standard deviation 22.
    assert np.abs(counts - 2000 * 5 / 12).max() < 5 * 22


def test_draw_samples_takes_what_there_is():
    member = jnp.zeros(6, bool).at[jnp.array([1, 4])].set(True)
    indices, taken = draw_samples(jax.random.key(0), member, 5)
    assert indices.shape == taken.shape == (5,) and taken.sum() == 2
    assert set(np.asarray(indices[taken])) == {1, 4}
    assert not draw_samples(jax.random.key(0), jnp.zeros(6, bool), 5)[1].any()
    assert draw_samples(jax.random.key(0), member, 20)[0].shape == (6,)
