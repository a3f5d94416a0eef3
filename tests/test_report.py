"""The report is one sound HTML file that needs nothing but itself."""

import dataclasses
import html.parser
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.details import explain, strips
from refseg_jax.evaluate import CASES, Example, Result
from refseg_jax.metrics import Counts
from refseg_jax.report import write_report

VOID = {"meta", "img", "br"}


class Checker(html.parser.HTMLParser):
    """Fails on a tag that is closed in the wrong place; keeps text and pictures."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags, self.sources = [], "", [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def make_result(split="val", shuffled=False, text="left <b>&", generalized=False):
    rng = np.random.default_rng(0)
    examples = tuple(
        Example(
            case, i, text, "place", 0.5, rng.integers(0, 255, (h, w, 3), np.uint8),
            rng.random((h, w)) > 0.5, rng.random((h, w)) > 0.5,
        )
        for i, (case, h, w) in enumerate(zip(CASES, (48, 700, 1), (64, 40, 9), strict=True))
    )  # fmt: skip
    counts = Counts.from_rows(
        [
            (0, 1, 4 if shuffled else 2, 1, 1),
            (1, 0, 0, 0, 0) if generalized else (1, 1, 4 if shuffled else 1, 1, 1),
        ]
    )
    kinds = ("place", "a<b")
    return Result(
        "set",
        split,
        "original",
        0.35,
        shuffled,
        1,
        2.0,
        counts,
        kinds,
        () if shuffled else examples,
        generalized,
        50 if generalized else 0,
    )


def render(tmp_path, **kwargs):
    arguments = {"title": "run <1>", "config_text": "a = '</pre>'", "results": {}} | kwargs
    write_report(tmp_path / "r.html", **arguments)
    page = (tmp_path / "r.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    return page, checker


def test_report_is_complete_and_self_contained(tmp_path):
    curves = [{"step": s, "loss": 3 / s, "lr": 1e-4} for s in range(1, 3000)]
    curves += [{"step": s, "val/mIoU": 0.5, "val/oIoU": 0.4} for s in (1000, 2000)]
    results = {"val": make_result(), "val, shuffled": make_result(shuffled=True)}
    page, checker = render(tmp_path, results=results, curves=curves)
    assert checker.sources and all(s.startswith("data:image/jpeg;base64,") for s in checker.sources)
    assert checker.tags.count("img") == 6 and checker.tags.count("svg") == 2
    assert "script" not in checker.tags and "b>&" in checker.text and "run <1>" in checker.text
    for words in ("original", "threshold 0.35", "75.00", "3.0 times", "Best", "Worst", "a<b"):
        assert words in checker.text
    assert len(page) < 300_000


def test_generalized_scores_are_named(tmp_path):
    result = make_result(generalized=True)
    example = dataclasses.replace(result.examples[0], truth=np.zeros((48, 64), bool))
    result = dataclasses.replace(result, examples=(example, *result.examples[1:]))
    curves = [{"step": 1, "val/gIoU": 0.5, "val/cIoU": 0.4, "val/N-acc": 1.0}]
    _, checker = render(tmp_path, results={"val": result, "plain": make_result()}, curves=curves)
    for words in ("gIoU, val", "mIoU, plain", "N-acc", "T-acc", "fewer than 50 pixels", "fit noth"):
        assert words in checker.text
    assert checker.text.count("no target") == 1 and "val/gIoU" in checker.text


def test_what_the_model_saw_is_drawn(tmp_path):
    result, rng = make_result(), np.random.default_rng(1)
    details = {
        "word_attention": [rng.random((5, 6, 8)), rng.random((5, 3, 4))],
        "proposals": rng.normal(size=(6, 6, 8)),
        "proposal_weights": np.array([0.05, 0.2, 0.1, 0.4, 0.01, 0.24]),
        "stage_logits": [rng.normal(size=(3, 4))] * 2,
    }
    example = result.examples[0]
    drawn = strips(details, ["red", "<b>"], example.image)
    captions = [[caption for caption, _ in strip.pictures] for strip in drawn]
    assert captions == [
        *[["red", "<b>"]] * 2, ["0.4000", "0.2400", "0.2000", "0.0100"], ["stage 1", "stage 2"],
    ]  # fmt: skip
    _, checker = render(tmp_path, results={"val": result}, explained=[(example, drawn)])
    assert checker.tags.count("img") == 6 + 10 and "<b>" in checker.text


def test_a_word_is_drawn_where_it_attends():
    attention = np.full((3, 4, 4), 0.01)
    attention[1, 0, 3] = 0.85  # The first piece follows the mark.
    image = np.full((40, 40, 3), 100, np.uint8)
    ((_, picture), _), *_ = (
        s.pictures for s in strips({"word_attention": [attention]}, "ab", image)
    )
    hottest = np.unravel_index(picture.sum(2).argmax(), picture.shape[:2])
    assert hottest[0] < 32 and hottest[1] > 96 and picture.shape == (128, 128, 3)


class Shows(nn.Module):
    """Each token attends to its own row of the image's first channel."""

    has_details = True

    def __call__(self, image, tokens, token_mask, train=False, details=False):
        rows = jnp.arange(image.shape[1]) == tokens[..., None]
        attention = image[:, None, ..., 0] * rows[..., None]
        return {"details": {"word_attention": [attention]}} if details else {}


def test_only_a_model_that_shows_details_is_explained():
    tokenizer = Tokenizer.from_words(["left"])
    examples = make_result(text="left").examples[:2]
    arguments = ({}, tokenizer, examples, 64, 5)
    assert explain(nn.Dense(1), *arguments) == []
    explained = explain(Shows(), *arguments)
    assert [example for example, _ in explained] == list(examples)
    for _, (strip,) in explained:
        ((word, picture),) = strip.pictures
        assert word == "left" and picture.dtype == np.uint8 and max(picture.shape) == 128


def test_report_without_curves_or_examples(tmp_path):
    _, checker = render(tmp_path, results={"val": make_result(shuffled=True)})
    assert "No curve" in checker.text and not checker.sources


def test_odd_curves(tmp_path):
    for rows in (
        [{"step": 5, "loss": 1.0}],
        [{"step": 0, "loss": 0.0}, {"step": 0, "val/mIoU": 0.0}],
        [{"step": s, "loss": -2.0 * s} for s in range(20)],
        [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1e-9}, {"step": 3, "loss": 1e9}],
    ):
        page, checker = render(tmp_path, curves=rows)
        assert "svg" in checker.tags and "nan" not in page and "inf" not in page
