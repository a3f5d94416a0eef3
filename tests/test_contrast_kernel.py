"""Pixel contrast: the kernel for TPUs against XLA's operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.losses import contrast_kernel as module
from refseg_jax.losses.pixel_contrast import contrast, pixel_contrast_loss
from refseg_jax.sharding import batch_sharding, make_mesh, on_mesh

RNG = np.random.default_rng(0)
C = 128


def examples(S, *shares):
    """Labels of which such shares are foreground, and pixels, of which some are zeros."""
    labels = np.stack([RNG.permutation(S) < share * S for share in shares])
    pixels = RNG.normal(size=(len(shares), S, C)).astype(np.float32)
    pixels[:, ::50] = 0
    return pixels, labels


def with_gradient(function, temperature=0.1, **options):
    def results(pixels, labels):
        def of_pixels(x):
            return function(x, labels, temperature=temperature, **options)

        loss, pull_back = jax.vjp(of_pixels, pixels)
        return loss, *pull_back(jnp.arange(1, len(loss) + 1, dtype=jnp.float32))

    return jax.jit(results)


plain = functools.partial(with_gradient, contrast, normalize=True, block=128)
kernel = functools.partial(with_gradient, module.contrast_in_kernel)


@pytest.mark.parametrize(("devices", "temperature"), [(2, 0.1), (1, module.LEAST_TEMPERATURE)])
@pytest.mark.parametrize(
    ("S", "shares"),
    [
        (1280, (0.2, 0.9, 0.5, 1 / 1280, 0, 1)),  # Blocks of 256; 640 rows, three of theirs.
        (384, (0.5, 0.4)),  # Of 128: one and a half of 256.
        (512, (256 / 512, 1 / 512, 255 / 512, 1 - 241 / 512)),  # A block of rows, and less.
        (128, (0.5, 0.3)),  # A single block of the map.
    ],
)
def test_kernel(S, shares, devices, temperature, interpreted):
    pixels, labels = examples(S, *shares)
    mesh = make_mesh(devices, 1)
    placed = jax.device_put((pixels, labels), batch_sharding(mesh))
    loss, of_pixels = on_mesh(mesh, kernel(temperature))(*placed)
    expected, of_expected = plain(temperature)(pixels, labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert of_pixels.sharding.is_equivalent_to(batch_sharding(mesh), 3)
    # Of zeros a gradient is 1e12 times as long, and not one of a direction.
    zeros = np.arange(S) % 50 == 0
    for ours, theirs in zip(np.asarray(of_pixels), np.asarray(of_expected), strict=True):
        for some in (zeros, ~zeros):
            largest = np.abs(theirs[some]).max()
            np.testing.assert_allclose(ours[some], theirs[some], atol=1e-5 * largest)


def test_neighbours_of_one_class(interpreted):
    """Blocks of the map without rows, and without columns."""
    pixels, _ = examples(1280, 0.3)
    labels = np.arange(1280)[None] // 256 == 2
    loss, of_pixels = on_mesh(make_mesh(1, 1), kernel())(pixels + 1, labels)
    expected, of_expected = plain()(pixels + 1, labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(of_pixels, of_expected, atol=1e-5 * np.abs(of_expected).max())


def test_rounding_is_that_of_bfloat16(interpreted, monkeypatch):
    """The kernel, in bfloat16, is no farther from float32 than XLA's products of bfloat16 are."""
    pixels, labels = examples(512, 0.2, 0.5)
    pixels = jnp.asarray(pixels + 0.5, jnp.bfloat16)
    exact = plain()(pixels.astype(jnp.float32), labels)
    ours = on_mesh(make_mesh(1, 1), kernel())(pixels, labels)
    assert ours[0].dtype == jnp.float32 and ours[1].dtype == jnp.bfloat16
    einsum = jnp.einsum

    def of_bfloat16(subscripts, *operands):
        operands = (x.astype(jnp.bfloat16) for x in operands)
        return einsum(subscripts, *operands, preferred_element_type=jnp.float32)

    monkeypatch.setattr("jax.numpy.einsum", of_bfloat16)
    jax.clear_caches()  # Of the loop over float32.
    xla = plain()(pixels, labels)

    def errors(results):
        return [
            np.square(np.asarray(a, np.float32) - b).mean()
            for a, b in zip(results, exact, strict=True)
        ]

    assert all(a < 1.1 * b for a, b in zip(errors(ours), errors(xla), strict=True)), (ours, xla)
    jax.clear_caches()


@pytest.mark.parametrize(
    ("shape", "dtype", "temperature", "fits"),
    [
        ((4, 1280, 128), jnp.bfloat16, 0.1, True),
        ((4, 1280, 128), jnp.float32, 0.1, False),
        ((4, 1280, 128), jnp.bfloat16, 0.02, False),
        ((4, 1280, 96), jnp.bfloat16, 0.1, False),
        ((4, 900, 128), jnp.bfloat16, 0.1, False),
        ((4, 12544, 512), jnp.bfloat16, 0.1, False),  # For a v4; see test_tpu_compile.
        ((3, 1280, 128), jnp.bfloat16, 0.1, False),  # Three samples for two devices.
    ],
)
def test_what_fits_the_kernel(shape, dtype, temperature, fits):
    array = jax.ShapeDtypeStruct(shape, dtype)
    fit = functools.partial(module.fits_kernel, temperature=temperature)
    assert on_mesh(make_mesh(2, 1), fit)(array) == fits
    assert not fit(array)  # It is not known where the samples are.


def test_the_loss_takes_the_kernel_on_a_tpu(like_a_tpu):
    pixels, labels = jnp.ones((2, 256, C), jnp.bfloat16), jnp.arange(512).reshape(2, 256) < 7

    def jaxpr(normalize):
        loss = functools.partial(pixel_contrast_loss, normalize=normalize)
        return str(jax.make_jaxpr(on_mesh(make_mesh(2, 1), loss))(pixels, labels))

    assert "name=pixel_contrast" in jaxpr(True) and "while" in jaxpr(True)
    like_a_tpu()
    assert "name=pixel_contrast" in jaxpr(True) and " sort" not in jaxpr(True)
    assert "name=pixel_contrast" not in jaxpr(False)
