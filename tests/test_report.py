"""The report is one sound HTML file that needs nothing but itself."""

import html.parser
import math

import numpy as np

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


def make_result(split="val", shuffled=False, text="left <b>&"):
    rng = np.random.default_rng(0)
    examples = tuple(
        Example(
            case, i, text, "place", 0.5, rng.integers(0, 255, (h, w, 3), np.uint8),
            rng.random((h, w)) > 0.5, rng.random((h, w)) > 0.5,
        )
        for i, (case, h, w) in enumerate(zip(CASES, (48, 700, 1), (64, 40, 9), strict=True))
    )  # fmt: skip
    counts = Counts.from_rows([(0, 1, 4 if shuffled else 2), (1, 1, 4 if shuffled else 1)])
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
