"""One self-contained HTML file about a run: scores, learning curves, pictures, config."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from refseg_jax import page, pictures
from refseg_jax.details import Strip
from refseg_jax.evaluate import CASES, HEADLINES, Example, Result, columns, percent, table_rows

PICTURE_SIDE = 256  # px; two per example
CURVE_POINTS = 400  # a longer curve is averaged down to this many
HEADINGS = {"best": "Best", "worst": "Worst", "middle": "From the middle, at random"}


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    config_text: str,
    results: Mapping[str, Result],
    curves: Iterable[Mapping[str, Any]] = (),
    explained: Iterable[tuple[Example, Iterable[Strip]]] = (),
) -> None:
    """Writes the report: one HTML file with its style, curves and pictures inside it.

    Args:
      path: where to write it.
      title: the heading, as plain text. All text is escaped.
      config_text: the run's config, shown folded at the end.
      results: split name -> result. Pictures come from each result's `examples`.
      curves: rows of the run's metrics file: training rows with `step` and `loss`, evaluation
        rows with `step` and `val/mIoU` (or `val/gIoU`).
      explained: examples with what the model saw in them.
    """
    sections = [
        _protocol(results),
        _tiles(results),
        "<h2>Scores in percent</h2>",
        _table(results),
        "<h2>Learning curves</h2>",
        _curves(list(curves)),
        *(_gallery(split, result) for split, result in results.items() if result.examples),
        _explanations(list(explained)),
        "<h2>Config</h2>",
        '<details class="card"><summary>Show</summary>'
        f"<pre>{page.text(config_text)}</pre></details>",
    ]
    page.write(path, title, sections)


def _protocol(results: Mapping[str, Result]) -> str:
    where = {
        "original": "at each image's original size",
        "input": "at the model's input size (truth resized by nearest neighbour)",
    }
    settings = sorted({(r.protocol, r.threshold, r.no_target_area) for r in results.values()})
    text = "; ".join(
        f"protocol <b>{page.text(name)}</b>: masks compared {where[name]}, threshold {threshold:g}"
        + (f", predictions of fewer than {area} pixels taken as empty" if area else "")
        for name, threshold, area in settings
    )
    if any(r.generalized for r in results.values()):
        text += (
            ". Some expressions fit nothing: there an empty prediction has IoU 1, any other 0. "
            "N-acc is the share of them whose prediction is empty, T-acc the share of the others "
            "whose prediction is not; P@X is over these others"
        )
    cut = sum(r.truncated for r in results.values() if not r.shuffled)
    note = f" {cut} expressions were longer than the model reads and were cut." if cut else ""
    return f'<p class="soft">{text}. Every sentence of every referred object counts.{note}</p>'


def _tiles(results: Mapping[str, Result]) -> str:
    """The score of each split; by the shuffled control, how many times the real one exceeds it."""
    tiles = []
    for split, result in results.items():
        label, score = "", result.score
        if result.shuffled:
            label = " with expressions shuffled among images"
            real = [
                r.score
                for r in results.values()
                if not r.shuffled and (r.name, r.split) == (result.name, result.split)
            ]
            if real and score > 0:
                label += f": the real ones score {real[0] / score:.1f} times as high"
        name = f"{result.split}{label}" if result.shuffled else split
        tiles.append(
            f'<div class="tile card"><b>{percent(score)}</b>'
            f"<span>{result.score_name}, {page.text(name)}</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(results: Mapping[str, Result]) -> str:
    names = columns(results)
    rows = []
    for split, kind, count, scores in table_rows(results):
        cells = (kind or split, count, *(percent(scores.get(name)) for name in names))
        rows.append(("kind" if kind else "split", cells))
    return page.table(("split", "sentences", *names), rows)


def _curves(rows: list[Mapping[str, Any]]) -> str:
    loss = _thin(_series(rows, "loss"))
    shown = tuple(f"/{name}" for names in HEADLINES.values() for name in names[:2])
    names = {name for row in rows for name in row if name.endswith(shown)}
    plots = []
    if len(loss):
        lines = [("raw c0", loss)] if len(loss) < 8 else [("raw c0", loss), ("c0", _smooth(loss))]
        plots.append(_plot("Training loss", "loss", lines, dots=False))
    if names:
        lines = [(f"c{i}", _series(rows, name)) for i, name in enumerate(sorted(names))]
        key = "".join(
            f'<i class="c{i}"></i>{page.text(name)}' for i, name in enumerate(sorted(names))
        )
        plots.append(_plot(f'Validation <span class="key">{key}</span>', "IoU", lines, dots=True))
    if not plots:
        return '<p class="soft">No curve was recorded.</p>'
    return f'<div class="curves">{"".join(plots)}</div>'


def _series(rows: Iterable[Mapping[str, Any]], name: str) -> np.ndarray:
    """float64 [n, 2] of (step, value): the rows that have a finite one."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return np.asarray(points, np.float64).reshape(-1, 2)


def _thin(points: np.ndarray) -> np.ndarray:
    """Averages neighbours until at most CURVE_POINTS are left."""
    parts = np.array_split(points, min(len(points), CURVE_POINTS) or 1)
    return np.array([part.mean(0) for part in parts if len(part)]).reshape(-1, 2)


def _smooth(points: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twentieth of the curve."""
    half = max(1, len(points) // 40)
    total = np.concatenate([[0.0], np.cumsum(points[:, 1])])
    at = np.arange(len(points))
    reach = np.minimum(half, np.minimum(at, at[::-1]))  # symmetric: no lag at either end
    mean = (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)
    return np.stack([points[:, 0], mean], 1)


def _ticks(low: float, high: float, number: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that lie in [low, high]."""
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _plot(caption: str, y_label: str, lines: list[tuple[str, np.ndarray]], dots: bool) -> str:
    """An SVG line chart of (step, value) curves; both axes start at 0 (y below, if values are).

    `lines` pairs a CSS class with points; `dots` marks every point.
    """
    width, height, left, right, top, bottom = 560, 300, 52, 14, 12, 44
    everything = np.concatenate([points for _, points in lines])
    (x0, y0), (x1, y1) = everything.min(0), everything.max(0)
    x0, y0 = 0.0, min(y0, 0.0)
    x1, y1 = max(x1, 1.0), (y1 if y1 > y0 else y0 + 1)

    def x_at(x):
        return left + (x - x0) / (x1 - x0) * (width - left - right)

    def y_at(y):
        return height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    parts = []
    for y in _ticks(y0, y1, 5):
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y_at(y):.1f}" '
            f'y2="{y_at(y):.1f}"/><text x="{left - 8}" y="{y_at(y) + 4:.1f}" '
            f'text-anchor="end">{y:g}</text>'
        )
    for x in _ticks(x0, x1, 5):
        parts.append(
            f'<text x="{x_at(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>'
        )
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">step</text>'
        f'<text x="12" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 12 {middle})">{page.text(y_label)}</text>'
    )
    for style, points in lines:
        at = [(x_at(x), y_at(y)) for x, y in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in at)
        parts.append(f'<path class="{style}" d="M{path}"/>')
        if dots:
            parts += [
                f'<circle class="dot {style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at
            ]
    return (
        f'<figure class="card"><figcaption>{caption}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{page.text(y_label)} by step">'
        f"{''.join(parts)}</svg></figure>"
    )


def _gallery(split: str, result: Result) -> str:
    parts = [f"<h2>{page.text(split)}: examples</h2>", _legend()]
    for case in CASES:
        figures = [_example(e) for e in result.examples if e.case == case]
        if figures:
            parts.append(f'<h3>{HEADINGS[case]}</h3><div class="examples">{"".join(figures)}</div>')
    return "".join(parts)


def _legend() -> str:
    def swatch(color):
        return f'<b style="color: rgb{color}">&#9632;</b>'

    return (
        f'<p class="soft">Left {swatch(pictures.TRUTH_COLOR)} the object that was meant, right '
        f"{swatch(pictures.PREDICTION_COLOR)} the prediction.</p>"
    )


def _example(example: Example) -> str:
    image = pictures.fit(example.image, PICTURE_SIDE)
    truth, prediction = (pictures.fit(m, PICTURE_SIDE) for m in (example.truth, example.prediction))
    images = "".join(
        f'<img alt="{name}" src="{page.data_uri(picture)}">'
        for name, picture in (
            ("truth", pictures.outline(image, truth, pictures.TRUTH_COLOR)),
            ("prediction", pictures.overlay(image, prediction)),
        )
    )
    notes = (example.kind, "" if example.truth.any() else "no target")
    kind = "".join(f"<br>{page.text(note)}" for note in notes if note)
    return (
        f'<figure class="example card"><div class="pair">{images}</div><figcaption>'
        f"<q>{page.text(example.text)}</q>"
        f'<span class="score">IoU <b>{percent(example.iou)}</b>{kind}</span></figcaption></figure>'
    )


def _explanations(explained: list[tuple[Example, Iterable[Strip]]]) -> str:
    if not explained:
        return ""
    cards = []
    for example, strips in explained:
        rows = [f"<q>{page.text(example.text)}</q> IoU <b>{percent(example.iou)}</b>"]
        for strip in strips:
            figures = "".join(
                f'<figure><img alt="{page.text(caption)}" src="{page.data_uri(picture)}">'
                f"<figcaption>{page.text(caption)}</figcaption></figure>"
                for caption, picture in strip.pictures
            )
            rows.append(f'<h3>{page.text(strip.heading)}</h3><div class="strip">{figures}</div>')
        cards.append(f'<div class="card explained">{"".join(rows)}</div>')
    return f"<h2>On the way to a mask</h2>{''.join(cards)}"
