"""The web page's answers; the page itself where Gradio is installed."""

import sys

import numpy as np
import pytest
from PIL import Image

from refseg_jax import demo, pictures
from refseg_jax.data.shapes import ShapesSource
from refseg_jax.errors import UserError
from refseg_jax.predict import Prediction


def left_half(image, text):
    """Stands in for a Predictor."""
    if not text.strip():
        raise UserError("the expression is empty")
    probability = np.zeros(image.shape[:2], np.float32)
    probability[:, : image.shape[1] // 2] = 0.75
    return Prediction(probability > 0.5, probability, truncated=len(text) > 20)


@pytest.fixture
def photo(tmp_path):
    """A file of 600 x 400 px, stored lying on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 600), (10, 20, 30)).save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


def test_an_answer_is_at_the_image_s_own_size(photo):
    mask, heat, told = demo.answer(left_half, photo, "the left")
    assert mask.shape == heat.shape == (400, 600, 3) and mask.dtype == heat.dtype == np.uint8
    assert np.abs(mask[200, 450].astype(int) - [10, 20, 30]).max() < 3
    assert (mask[200, 299] == pictures.PREDICTION_COLOR).all()
    assert heat[200, 100, 0] > 150 > heat[200, 500, 0]
    assert told.splitlines()[0].split() == ["confidence", "0.750"]
    assert "x 0 to 300, y 0 to 400 px" in told and "too long" not in told
    assert "too long" in demo.answer(left_half, photo, "the left " * 9)[2]


def test_small_pictures_are_drawn_large(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "small.png")
    mask, heat, told = demo.answer(left_half, tmp_path / "small.png", "left")
    assert mask.shape == heat.shape == (240, 480, 3)
    assert "x 0 to 20, y 0 to 20 px" in told


def test_bad_questions_are_user_errors(photo):
    for image, text in ((None, "left"), (photo, " "), (photo.with_name("absent.png"), "left")):
        with pytest.raises(UserError):
            demo.answer(left_half, image, text)


def test_examples_are_of_the_split():
    source = ShapesSource("val", num_scenes=5, size=48)
    examples = demo.pick_examples(source, 4)
    assert len(examples) == 4
    for picked, ref in ((examples[0], source[0]), (examples[-1], source[len(source) - 1])):
        np.testing.assert_array_equal(picked[0], source.image(ref))
        assert picked[1] == ref.sentences[0].text
    assert len(demo.pick_examples(source, 10**6)) == len(source)


def test_what_is_missing_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main(["--workdir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and ".[demo]" in err and err.count("\n") == 1


def test_the_page_answers(photo):
    pytest.importorskip("gradio", reason="Gradio, of the extra `demo`, is not installed")
    client = pytest.importorskip("gradio_client")
    examples = [(np.zeros((8, 8, 3), np.uint8), "a")]
    page = demo.make_page(left_half, "A title", examples)
    _, url, _ = page.launch(quiet=True, prevent_thread_lock=True)
    try:
        ask = client.Client(url, verbose=False).predict
        mask, heat, told = ask(client.handle_file(photo), "the left", api_name="/ask")
        assert Image.open(mask).size == Image.open(heat).size == (600, 400)
        assert "x 0 to 300" in told
        with pytest.raises(client.exceptions.AppError, match="empty"):
            ask(client.handle_file(photo), " ", api_name="/ask")
    finally:
        page.close()
