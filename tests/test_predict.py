"""One image, one expression: any kind of file in, a mask at its own size out."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from refseg_jax import pictures, predict
from refseg_jax.data import transforms
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.errors import UserError
from refseg_jax.sharding import divides_samples, make_mesh

SIZE = 16


class Red(nn.Module):
    """Points at what is red, at half the image's size."""

    @nn.compact
    def __call__(self, image, tokens, token_mask, train):
        scale = self.param("scale", nn.initializers.constant(4.0), ())
        difference = image[..., 0] - image[..., 2]
        return {"logits": scale * (difference - 1)[:, ::2, ::2]}


@pytest.fixture(scope="module")
def predictor():
    tokenizer = Tokenizer.from_words(["the", "red", "half"])
    variables = {"params": {"scale": jnp.float32(4)}}
    return predict.Predictor(Red(), variables, tokenizer, SIZE, max_tokens=6)


@pytest.fixture
def photo():
    """Blue, its left 20 of 50 columns red; uint8 [32, 50, 3]."""
    image = np.zeros((32, 50, 3), np.uint8)
    image[:, :20, 0] = image[:, 20:, 2] = 255
    return image


def test_prediction_at_the_image_s_own_size(predictor, photo):
    found = predictor(photo, "the red half")
    assert found.mask.shape == found.probability.shape == (32, 50)
    assert found.mask.dtype == bool and found.probability.dtype == np.float32
    x0, y0, x1, y1 = found.box
    assert (x0, y0, y1) == (0, 0, 32) and abs(x1 - 20) <= 3
    assert found.area == 32 * x1 and found.area_fraction == pytest.approx(x1 / 50)
    assert found.confidence == pytest.approx(found.probability[:, :x1].mean())
    assert not found.truncated
    assert predictor(photo, "the red red red half").truncated


def test_a_letterbox_and_back(predictor, photo):
    boxed = predict.Predictor(
        Red(), predictor.variables, predictor.tokenizer, SIZE, max_tokens=6, letterbox=True
    )
    found = boxed(photo, "the red half")
    assert found.mask.shape == (32, 50)
    x0, y0, x1, y1 = found.box  # The grey above and below is not red.
    assert x0 == 0 and abs(x1 - 20) <= 3 and y0 <= 3 and y1 >= 29
    assert not (predictor(photo, "red").probability == found.probability).all()


def test_arrays_of_jax(predictor, photo):
    found = [predictor(image, "red").mask for image in (photo, jnp.asarray(photo))]
    np.testing.assert_array_equal(*found)


def test_the_device_of_the_variables_is_known_to_the_model(predictor, photo):
    # Kernels for TPUs and forms for GPUs are chosen by the mesh.
    known = []

    class Curious(Red):
        @nn.compact
        def __call__(self, image, tokens, token_mask, train):
            device = jax.sharding.get_abstract_mesh().abstract_device
            known.append((device and device.platform, divides_samples(len(image))))
            return super().__call__(image, tokens, token_mask, train)

    device, other = jax.devices()[-1], jax.devices()[0]
    assert device != other  # See conftest.py.
    both = jax.sharding.NamedSharding(make_mesh(2, 1), jax.sharding.PartitionSpec())
    arrays = jax.tree.map(np.asarray, predictor.variables)
    for where, expected in ((None, "cpu"), (device, "cpu"), (both, None)):
        variables = arrays if where is None else jax.device_put(arrays, where)
        curious = predict.Predictor(Curious(), variables, predictor.tokenizer, SIZE, max_tokens=6)
        found = curious(photo, "red")
        np.testing.assert_array_equal(found.mask, predictor(photo, "red").mask)
        assert known.pop() == (expected, expected is not None) and not known


def test_nothing_found(predictor):
    found = predictor(np.zeros((9, 9, 3), np.uint8), "red")
    assert (found.area, found.confidence, found.box) == (0, 0.0, None)


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (1, 1), (700, 3)])
def test_thin_images(predictor, shape):
    image = np.zeros((*shape, 3), np.uint8)
    image[..., 0] = 255
    found = predictor(image, "red")
    assert found.mask.shape == shape and found.mask.all()
    assert pictures.overlay(image, found.mask).shape == image.shape


def test_exif_rotation(predictor, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: turn clockwise to see it upright
    Image.fromarray(np.rot90(photo)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = predictor(tmp_path / "a.jpg", "red")
    assert found.mask.shape == (32, 50)
    assert found.mask[:, :17].all() and not found.mask[:, 23:].any()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]
)
def test_every_colour_mode(predictor, photo, mode):
    image = Image.fromarray(photo)
    if mode in ("I;16", "I", "F"):
        image = image.convert("L")
    elif mode == "PA":
        image = image.convert("P")
    image = image.convert(mode)
    found = predictor(image, "red")
    assert found.mask.shape == (32, 50)
    assert found.mask[:, :17].all() == (mode in ("P", "PA", "RGBA", "CMYK", "YCbCr"))


def test_deep_grey_and_transparency_to_rgb():
    deep = Image.fromarray(np.array([[0, 0x80FF, 0xFFFF]], np.uint16))
    np.testing.assert_array_equal(transforms.to_rgb(deep)[0, :, 0], [0, 128, 255])
    wide = Image.fromarray(np.array([[0, 32896, 65535]], np.int32))
    np.testing.assert_array_equal(transforms.to_rgb(wide)[0, :, 0], [0, 128, 255])
    floats = Image.fromarray(np.array([[-1, 0, 1]], np.float32))
    np.testing.assert_array_equal(transforms.to_rgb(floats)[0, :, 0], [0, 128, 255])
    clear = Image.new("RGBA", (1, 1), (10, 20, 30, 0))
    np.testing.assert_array_equal(transforms.to_rgb(clear), np.full((1, 1, 3), 255))


def test_bad_input_is_a_user_error(predictor, photo, tmp_path):
    with pytest.raises(UserError, match="no image file"):
        predictor(tmp_path / "absent.jpg", "red")
    (tmp_path / "text.jpg").write_text("not an image")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        tmp_path / "whole.jpg"
    )
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    for name in ("text.jpg", "cut.jpg", ""):
        with pytest.raises(UserError, match="image"):
            predictor(tmp_path / name, "red")
    with pytest.raises(UserError, match="cannot read the image"):
        predictor(Image.open(tmp_path / "cut.jpg"), "red")
    for text in ("", "  "):
        with pytest.raises(UserError):
            predictor(photo, text)
    for array in (photo.astype(np.float64), photo[None], np.zeros((0, 5, 3), np.uint8)):
        with pytest.raises(UserError, match="image"):
            predictor(array, "red")


def test_drawing():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 15:30] = True
    grown = np.zeros_like(mask)
    grown[8:22, 13:32] = True
    np.testing.assert_array_equal(pictures.grow(mask, 2), grown)
    image = np.full((40, 60, 3), 100, np.uint8)
    drawn = pictures.overlay(image, mask)
    assert (drawn[0, 0] == 100).all() and (drawn[14, 22] != 100).any()
    assert (drawn[10, 20] == pictures.PREDICTION_COLOR).all() and (image == 100).all()
    short, long = (pictures.caption(image, text) for text in ("a", "a much longer text " * 6))
    assert (short[:40, :60] == image).all() and 40 < len(short) < len(long)
    assert pictures.caption(image, "w" * 300).shape[1] == long.shape[1]
    assert pictures.fit(image, 30).shape == (20, 30, 3) and pictures.fit(mask, 30).dtype == bool


@pytest.fixture
def workdir(predictor, monkeypatch):
    monkeypatch.setattr(predict.Predictor, "from_workdir", lambda workdir: predictor)
    return "somewhere"


def test_command_line(workdir, photo, tmp_path, capsys):
    Image.fromarray(photo).save(tmp_path / "a.b.png")
    arguments = ["--workdir", workdir, "--image", str(tmp_path / "a.b.png"), "--text", "the red"]
    arguments += ["--out", str(tmp_path / "new" / "out")]
    assert predict.main(arguments) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [
        "confidence", "area", "box", "mask", "overlay",
    ]  # fmt: skip
    assert err == ""
    mask = np.asarray(Image.open(tmp_path / "new" / "out" / "a.b_mask.png"))
    overlay = Image.open(tmp_path / "new" / "out" / "a.b_overlay.png")
    assert mask.shape == (32, 50) and overlay.height > 32
    assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}

    arguments[5] = "red " * 9
    assert predict.main([*arguments, "--json", "--threshold", "1"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["area"], result["box"], result["truncated"]) == (0, None, True)
    assert err.startswith("warning: ")


def test_what_is_no_prediction_is_not_overwritten(workdir, photo, tmp_path, capsys):
    """Such as the mask that somebody has drawn for the same photo."""
    for name in ("a.png", "a_mask.png"):
        Image.fromarray(photo).save(tmp_path / name)
    arguments = ["--workdir", workdir, "--image", str(tmp_path / "a.png"), "--text", "the red"]
    before = (tmp_path / "a_mask.png").read_bytes()
    assert predict.main([*arguments, "--out", str(tmp_path)]) == 2
    assert "a_mask.png is there, and does not say that it was" in capsys.readouterr().err
    assert (tmp_path / "a_mask.png").read_bytes() == before
    for _ in range(2):  # What is one, is.
        assert predict.main([*arguments, "--out", str(tmp_path / "out")]) == 0


def test_several_texts(workdir, photo, tmp_path, capsys):
    Image.fromarray(photo).save(tmp_path / "a.png")
    arguments = ["--workdir", workdir, "--image", str(tmp_path / "a.png"), "--out", str(tmp_path)]
    texts = ["the red half", "красный красный half red red red дом", "red"]
    arguments += [word for text in texts for word in ("--text", text)]
    assert predict.main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["text"] for result in results] == texts
    assert [result["unknown"] for result in results] == [[], ["красный"], []]
    assert err.count("\n") == 2 and "does not know 'красный': it" in err
    for number, result in enumerate(results, 1):
        assert result["mask"] == str(tmp_path / f"a_{number}_mask.png")
        assert Image.open(result["mask"]).size == (50, 32)
        assert Image.open(result["overlay"]).height > 32
    assert predict.main(arguments) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert [block.splitlines()[0] for block in blocks] == texts
    assert all("confidence  " in block and "_overlay.png" in block for block in blocks)
    # One that is none ends it before anything is written.
    arguments[arguments.index("--out") + 1] = str(tmp_path / "none")
    assert predict.main([*arguments, "--text", " "]) == 2
    assert "empty expression" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_a_bucket_without_its_library_is_one_line(photo, tmp_path, monkeypatch, capsys):
    def absent(workdir):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(predict.Predictor, "from_workdir", absent)
    Image.fromarray(photo).save(tmp_path / "a.png")
    arguments = ["--workdir", "gs://x/run", "--image", str(tmp_path / "a.png"), "--text", "red"]
    assert predict.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: gs:// needs a library") and err.count("\n") == 1


def test_command_line_errors_are_one_line(workdir, photo, tmp_path, capsys):
    Image.fromarray(photo).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    for name, text, out in (
        ("absent.png", "red", "."),
        ("b.png", "red", "."),
        ("a.png", " ", "."),
        ("a.png", "red", "b.png"),
    ):
        arguments = ["--image", str(tmp_path / name), "--text", text, "--out", str(tmp_path / out)]
        assert predict.main(["--workdir", workdir, *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1
    for option in (["--text", "red \udcff"], ["--text", "red", "--threshold", "7"]):
        arguments = ["--image", str(tmp_path / "a.png"), *option]
        assert predict.main(["--workdir", workdir, *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_probabilities_are_at_the_input_s_size():
    step = predict.make_predict_step(Red())
    batch = {
        "image": np.zeros((2, SIZE, SIZE, 3), np.uint8),
        "tokens": np.zeros((2, 4), np.int32),
        "token_mask": np.ones((2, 4), bool),
    }
    shape = jax.eval_shape(step, {"params": {"scale": jnp.float32(1)}}, batch)
    assert (shape.shape, shape.dtype) == ((2, SIZE, SIZE), jnp.float32)
