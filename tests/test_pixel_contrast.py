"""CoupAlign's pixel contrast: against its equations in loops and all pairs in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from benchmarks.pixel_contrast import all_pairs_loss
from refseg_jax.losses import pixel_contrast
from refseg_jax.losses.pixel_contrast import opposite_logsumexp, pixel_contrast_loss
from refseg_jax.sharding import batch_sharding, make_mesh

RNG = np.random.default_rng(0)

# More background, more foreground, as much of both, one pixel, none, nothing else.
S, C, TAU = 11, 3, 0.2
LABELS = np.stack(
    [np.arange(S) % 3 == 1, np.arange(S) % 4 != 2, np.arange(S) < 6, np.arange(S) == 7]
    + [np.zeros(S, bool), np.ones(S, bool)]
)
PIXELS = RNG.normal(size=(len(LABELS), S, C))


def slow_loss(pixels, labels, normalize):
    """Eq. 14-16 of one image, pair by pair."""
    if normalize:
        pixels = np.array([y / np.sqrt(y @ y) for y in pixels])
    positives, negatives = pixels[labels], pixels[~labels]
    if not len(positives) or not len(negatives):
        return 0.0
    loss = 0.0
    for own, others in ((positives, negatives), (negatives, positives)):
        prototype = sum(own) / len(own)
        for y in own:
            attracted = np.exp(y @ prototype / TAU)
            repelled = sum(np.exp(y @ other / TAU) for other in others)
            loss -= np.log(attracted / (attracted + repelled)) / len(own)
    return loss


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("block", [2, 128])
def test_loss_is_eq_14_to_16(block, normalize):
    ours = pixel_contrast_loss(jnp.asarray(PIXELS), LABELS, TAU, normalize, block)
    slow = [slow_loss(y, m, normalize) for y, m in zip(PIXELS, LABELS, strict=True)]
    assert ours.dtype == jnp.float32 and min(slow[:4]) > 0.5
    np.testing.assert_allclose(ours, slow, rtol=1e-5)
    np.testing.assert_array_equal(ours[4:], 0)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_is_that_of_finite_differences(normalize):
    def loss(pixels):
        return pixel_contrast_loss(pixels, LABELS, TAU, normalize, 2).sum()

    ours = jax.jit(jax.grad(loss))(jnp.asarray(PIXELS, jnp.float32))
    np.testing.assert_array_equal(ours[4:], 0)
    step = 1e-5
    for image in range(4):
        expected = np.zeros((S, C))
        for place in np.ndindex(S, C):
            nudge = np.zeros((S, C))
            nudge[place] = step
            up, down = (
                slow_loss(PIXELS[image] + sign * nudge, LABELS[image], normalize)
                for sign in (1, -1)
            )
            expected[place] = (up - down) / (2 * step)
        np.testing.assert_allclose(ours[image], expected, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(scope="module")
def maps():
    """Maps of 20 x 20: a fifth of the pixels, four fifths, one, none."""
    share = np.array([[0.2], [0.8], [0.0], [0.0]])
    labels = RNG.random((4, 400)) < share
    labels[2, 17] = True
    return RNG.normal(size=(4, 400, 8)).astype(np.float32), labels


def test_value_and_gradient_are_those_of_all_pairs_in_float64(maps, monkeypatch):
    pixels, labels = maps

    def value_and_gradient(function):
        return jax.jit(jax.value_and_grad(lambda x: function(x, labels).sum()))

    ours = value_and_gradient(functools.partial(pixel_contrast_loss, block=32))(pixels)
    with jax.enable_x64(True):
        # Undo the cast to float32, so that all of it is float64.
        monkeypatch.setattr(
            "benchmarks.pixel_contrast.unit_length",
            lambda x: x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)),
        )
        naive = value_and_gradient(all_pairs_loss)(pixels.astype(np.float64))
        assert naive[1].dtype == jnp.float64
    np.testing.assert_allclose(ours[0], naive[0], rtol=1e-6)
    for gradient, expected in zip(ours[1], np.asarray(naive[1]), strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


def test_products_of_any_size_stay_finite():
    vectors = jnp.asarray([[[200.0, 0], [0, 1], [-200, 0], [3, 4], [200, 200]]])
    labels = jnp.asarray([[True, False, False, True, False]])
    sums, pull_back = jax.vjp(jax.jit(lambda v: opposite_logsumexp(v, labels, 1)), vectors)
    products = np.asarray(vectors[0] @ vectors[0].T, np.float64)
    expected = [
        np.logaddexp.reduce(products[i][np.asarray(labels[0]) != bool(labels[0, i])])
        for i in range(5)
    ]
    np.testing.assert_allclose(sums[0], expected, rtol=1e-6)
    (gradient,) = pull_back(jnp.ones_like(sums))
    assert np.isfinite(gradient).all()
    # Pixels 0 and 4 are each other's nearest by far; 1 has 0 and 3 to choose from, at 0 and 4.
    expected = 2 * vectors[0, 4] + vectors[0, 1] / (1 + np.exp(4))
    np.testing.assert_allclose(gradient[0, 0], expected, rtol=1e-6)


def test_bfloat16_and_zero_vectors():
    pixels = jnp.asarray(PIXELS, jnp.bfloat16).at[:, 0].set(0)
    step = jax.jit(jax.value_and_grad(lambda x: pixel_contrast_loss(x, LABELS).sum()))
    loss, gradient = step(pixels)
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert np.isfinite(loss) and np.isfinite(np.asarray(gradient, np.float32)).all()


def test_wider_numbers_stay_wide():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        pixels = jnp.asarray(rng.normal(size=(2, 12, 3)))
        labels = jnp.asarray(rng.random((2, 12)) < 0.4)
        assert pixel_contrast_loss(pixels, labels).dtype == jnp.float64
        loss = jax.jit(lambda x: pixel_contrast_loss(x, labels).sum())
        check_grads(loss, (pixels,), 1, modes=["rev"])
        as_numbers = pixel_contrast_loss(pixels, labels.astype(jnp.int32))
        np.testing.assert_array_equal(as_numbers, pixel_contrast_loss(pixels, labels))


def test_batch_split_over_devices(maps):
    pixels, labels = maps
    rows = batch_sharding(make_mesh(4, 1))
    step = jax.value_and_grad(lambda x, m: pixel_contrast_loss(x, m, block=32).sum())
    loss, gradient = jax.jit(step, in_shardings=(rows, rows))(pixels, labels)
    alone = jax.jit(step)(pixels, labels)
    assert gradient.sharding.is_equivalent_to(rows, 3)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-6)
    np.testing.assert_allclose(gradient, alone[1], atol=1e-6)


def test_memory_grows_with_the_pixels_not_with_their_pairs():
    def temporary(function, pixels):
        arguments = (
            jax.ShapeDtypeStruct((1, pixels, 16), jnp.float32),
            jax.ShapeDtypeStruct((1, pixels), jnp.bool_),
        )
        step = jax.jit(jax.grad(lambda *arguments: function(*arguments).sum()))
        return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    ours = [temporary(pixel_contrast_loss, n) for n in (56**2, 112**2)]
    assert ours[1] < 5 * ours[0]
    assert ours[1] < 4 * 112**4 / 20  # A twentieth of the matrix of all pairs.
    assert temporary(all_pairs_loss, 56**2) > 4 * 56**4


def test_only_blocks_with_pairs_are_computed():
    """The rarer class makes the rows: its blocks are counted, in the worst image of the batch."""
    for labels, steps in ((LABELS[:2], 2), (LABELS[3:4], 1), (LABELS, 3), (LABELS[4:], 0)):
        *_, rows, taken = pixel_contrast._rarer_first(jnp.asarray(labels), 2)
        assert (rows, int(taken)) == (2, steps)
