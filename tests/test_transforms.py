import io

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from refseg_jax.data import transforms
from refseg_jax.errors import UserError

ORIENTATION = 0x0112  # the EXIF tag; 6 = turn a quarter clockwise to be upright


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (480, 640), (427, 333)])
@pytest.mark.parametrize("size", [4, 64, 320, 480])
def test_resize_mask_is_pillow_nearest(shape, size):
    mask = np.random.default_rng(0).random(shape) < 0.5
    resized = transforms.resize_mask(mask, size)
    expected = Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST)
    assert resized.dtype == bool and resized.shape == (size, size)
    np.testing.assert_array_equal(resized, np.asarray(expected))


def test_a_resized_mask_stays_in_place():
    """Of a half plane each pixel decides for itself: those whose centres are in it."""
    for side, size in ((640, 480), (333, 480), (500, 64)):
        edge = 201
        mask = np.tile(np.arange(side) < edge, (4, 1))
        centres = (np.arange(size) + 0.5) * side / size
        np.testing.assert_array_equal(transforms.resize_mask(mask, size)[0], centres < edge)


@pytest.mark.parametrize("shape", [(90, 130), (17, 9)])
def test_resize_image_is_antialiased_bilinear(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    resized = transforms.resize_image(image, 32)
    expected = torch.nn.functional.interpolate(
        torch.tensor(image).permute(2, 0, 1)[None].float(), 32, mode="bilinear", antialias=True
    )
    assert resized.dtype == np.uint8 and resized.shape == (32, 32, 3)
    # Pillow rounds after each of its two passes.
    assert np.abs(resized - expected[0].permute(1, 2, 0).numpy()).max() <= 1.01


def test_resize_map_is_bilinear_with_half_pixel_centres():
    values = np.random.default_rng(0).normal(size=(7, 11)).astype(np.float32)
    resized = transforms.resize_map(values, 50, 43)
    expected = torch.nn.functional.interpolate(
        torch.tensor(values)[None, None], (50, 43), mode="bilinear"
    )
    assert resized.dtype == np.float32
    np.testing.assert_allclose(resized, expected[0, 0].numpy(), atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 40), (50, 21), (7, 7), (1, 300)])
def test_a_letterbox_keeps_the_shape_of_what_is_in_it(shape):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (*shape, 3), np.uint8), rng.random(shape) < 0.5
    left, top, right, bottom = transforms.place(*shape, 64, letterbox=True)
    w, h = right - left, bottom - top
    assert max(w, h) == 64 and abs(w * shape[0] - h * shape[1]) <= max(shape)
    assert abs(left - (64 - right)) <= 1 and abs(top - (64 - bottom)) <= 1
    inside = np.zeros((64, 64), bool)
    inside[top:bottom, left:right] = True
    pictures = transforms.resize_image(image, 64, True), transforms.resize_mask(mask, 64, True)
    assert (pictures[0][~inside] == transforms.GREY).all() and not pictures[1][~inside].any()
    for array, whole, resample in zip(
        pictures, (image, mask), ("BILINEAR", "NEAREST"), strict=True
    ):
        expected = Image.fromarray(whole).resize((w, h), Image.Resampling[resample])
        np.testing.assert_array_equal(array[top:bottom, left:right], np.asarray(expected))
    # What is seen of a map is what lies in it: all of the rest could be anything.
    values = np.where(inside, 1.0, np.nan)
    back = transforms.resize_map(values, *shape, letterbox=True, bicubic=True)
    assert back.shape == shape
    np.testing.assert_allclose(back, 1, rtol=1e-6)


def test_a_bicubic_map():
    x, y = np.meshgrid(np.arange(8), np.arange(8))
    # Of a parabola, away from the border, a cubic leaves nothing out; at half-pixel centres.
    found = transforms.resize_map(x**2 + y, 16, 16, bicubic=True)
    u, v = np.meshgrid(np.arange(16), np.arange(16))
    expected = ((u + 0.5) / 2 - 0.5) ** 2 + (v + 0.5) / 2 - 0.5
    np.testing.assert_allclose(found[5:11, 5:11], expected[5:11, 5:11], rtol=1e-5)


def test_normalize_takes_numpy_and_jax():
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    expected = (image / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    for array in (image, jnp.asarray(image)):
        normalized = transforms.normalize(array)
        assert normalized.dtype == np.float32 and isinstance(normalized, type(array))
        np.testing.assert_allclose(normalized, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "I;16"])
def test_read_image_gives_rgb(tmp_path, mode):
    path = tmp_path / "picture.tif"
    Image.new(mode, (6, 4)).save(path)
    image = transforms.read_image(path)
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8


def test_read_image_turns_upright_unless_annotations_say_otherwise(tmp_path):
    stored = np.zeros((4, 6, 3), np.uint8)
    stored[0, 0] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(stored).save(path, exif=exif)

    upright = transforms.read_image(path)
    assert upright.shape == (6, 4, 3) and upright[0, -1].all()
    np.testing.assert_array_equal(transforms.read_image(path, (6, 4)), upright)
    np.testing.assert_array_equal(transforms.read_image(path, (4, 6)), stored)
    with pytest.raises(UserError, match=r"turned.png is 4 x 6 .* drawn at 5 x 6"):
        transforms.read_image(path, (5, 6))


def test_read_image_refuses_what_is_no_picture(tmp_path):
    whole = tmp_path / "whole.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole)
    (tmp_path / "truncated.jpg").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    for name in ("truncated", "text", "empty", "folder"):
        with pytest.raises(UserError, match=f"{name}.jpg"):
            transforms.read_image(tmp_path / f"{name}.jpg")
    with pytest.raises(UserError, match="no image file .*absent.jpg"):
        transforms.read_image(tmp_path / "absent.jpg")


@pytest.mark.parametrize("letterbox", [False, True])
@pytest.mark.parametrize("side", [16, 90])
def test_the_short_way_from_file_to_square_is_the_same(side, letterbox):
    """Or is not taken: where more has to be done to a picture, or it is damaged."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    turned, upright = Image.Exif(), Image.Exif()
    turned[ORIENTATION], upright[ORIENTATION] = 6, 1

    def stored(mode="RGB", kind="JPEG", **options):
        file = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(file, kind, **options)
        return file.getvalue()

    for picture in (stored(), stored(kind="PNG"), stored(exif=upright), stored(quality=100)):
        whole = transforms.read_image(picture, (60, 80))
        expected = transforms.resize_image(whole, side, letterbox)
        found = transforms.read_resized(picture, (60, 80), side, letterbox)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.uint8
        assert transforms.read_resized(picture, (80, 60), side) is None
    for picture in (stored("L"), stored("CMYK"), stored("RGBA", "PNG"), stored("P", "PNG"),
                    stored(exif=turned), stored(kind="PNG", transparency=(1, 2, 3)),
                    stored()[:1000], b""):  # fmt: skip
        assert transforms.read_resized(picture, (60, 80), side) is None
