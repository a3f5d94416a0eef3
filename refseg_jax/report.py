"""One self-contained HTML file about a run: scores, learning curves, pictures, config."""

import base64
import html
import io
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from refseg_jax import metrics, pictures
from refseg_jax.details import Strip
from refseg_jax.evaluate import CASES, Example, Result, percent, table_rows

PICTURE_SIDE = 256  # px; two per example
CURVE_POINTS = 400  # a longer curve is averaged down to this many
HEADINGS = {"best": "Best", "worst": "Worst", "middle": "From the middle, at random"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5d6778; --line: #dfe3ea;
  --page: #f6f7f9; --card: #ffffff; --first: #2563c9; --second: #d9730d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --line: #313947;
  --page: #14181f; --card: #1c222c; --first: #6aa5ff; --second: #ffa657; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px 20px 60px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 12px; }
h3 { font-size: 14px; margin: 20px 0 8px; color: var(--soft); font-weight: 600; }
p { margin: 6px 0 12px; max-width: 78ch; }
.soft { color: var(--soft); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tiles { display: grid; gap: 12px; margin-top: 18px;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 28px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px; text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tr.split td { font-weight: 600; border-top: 1px solid var(--line); }
tr.kind td { color: var(--soft); padding-top: 2px; padding-bottom: 2px; }
tr.kind td:first-child { padding-left: 30px; }
@media (max-width: 600px) { th, td { padding: 6px 8px; }
  td:first-child { white-space: normal; } tr.kind td:first-child { padding-left: 16px; } }
.curves { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
figure { margin: 0; padding: 12px; }
figcaption { font-size: 13px; color: var(--soft); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg path { fill: none; stroke-width: 2; }
svg .c0 { stroke: var(--first); } svg .c1 { stroke: var(--second); }
svg .raw { stroke-width: 1; opacity: .35; } svg .dot { fill: var(--card); stroke-width: 2; }
.key i { display: inline-block; width: 18px; height: 3px; margin: 0 6px 3px 14px;
  border-radius: 2px; }
.key i.c0 { background: var(--first); } .key i.c1 { background: var(--second); }
.examples { display: grid; gap: 14px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.example { overflow: hidden; padding: 0; display: flex; flex-direction: column; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; align-items: center;
  background: #0b0e13; flex: 1; }
.pair img { display: block; width: 100%; max-height: 260px; object-fit: contain; }
.example figcaption { padding: 9px 12px; display: flex; gap: 10px; justify-content: space-between;
  color: var(--ink); } .example q { overflow-wrap: anywhere; }
.example .score { text-align: right; white-space: nowrap; color: var(--soft); }
.example .score b { color: var(--ink); }
.explained { padding: 6px 16px 14px; margin-bottom: 14px; }
.strip { display: flex; flex-wrap: wrap; gap: 8px; }
.strip figure { padding: 0; } .strip img { display: block; } .strip figcaption { max-width: 128px; }
details { padding: 10px 16px; } summary { cursor: pointer; }
pre { overflow-x: auto; font: 12.5px/1.45 ui-monospace, Menlo, Consolas, monospace; }
"""


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
        rows with `step` and `val/mIoU`.
      explained: examples with what the model saw in them.
    """
    sections = [
        f"<h1>{_text(title)}</h1>",
        _protocol(results),
        _tiles(results),
        "<h2>Scores in percent</h2>",
        _table(results),
        "<h2>Learning curves</h2>",
        _curves(list(curves)),
        *(_gallery(split, result) for split, result in results.items() if result.examples),
        _explanations(list(explained)),
        "<h2>Config</h2>",
        f'<details class="card"><summary>Show</summary><pre>{_text(config_text)}</pre></details>',
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(sections)}</body></html>\n"
    )
    pathlib.Path(path).write_text(page, encoding="utf-8")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _protocol(results: Mapping[str, Result]) -> str:
    where = {
        "original": "at each image's original size",
        "input": "at the model's input size (truth resized by nearest neighbour)",
    }
    settings = sorted({(r.protocol, r.threshold) for r in results.values()})
    text = "; ".join(
        f"protocol <b>{_text(name)}</b>: masks compared {where[name]}, threshold {threshold:g}"
        for name, threshold in settings
    )
    cut = sum(r.truncated for r in results.values() if not r.shuffled)
    note = f" {cut} expressions were longer than the model reads and were cut." if cut else ""
    return f'<p class="soft">{text}. Every sentence of every referred object counts.{note}</p>'


def _tiles(results: Mapping[str, Result]) -> str:
    """mIoU of each split; beside the shuffled control, how many times the real score exceeds it."""
    tiles = []
    for split, result in results.items():
        label, score = "", result.metrics["mIoU"]
        if result.shuffled:
            label = " with expressions shuffled among images"
            real = [
                r.metrics["mIoU"]
                for r in results.values()
                if not r.shuffled and (r.name, r.split) == (result.name, result.split)
            ]
            if real and score > 0:
                label += f": the real ones score {real[0] / score:.1f} times as high"
        name = f"{result.split}{label}" if result.shuffled else split
        tiles.append(
            f'<div class="tile card"><b>{percent(score)}</b><span>mIoU, {_text(name)}</span></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(results: Mapping[str, Result]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("split", "sentences", *metrics.NAMES))
    body = []
    for split, kind, count, scores in table_rows(results):
        cells = (kind or split, count, *(percent(scores[name]) for name in metrics.NAMES))
        row = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        body.append(f'<tr class="{"kind" if kind else "split"}">{row}</tr>')
    return (
        '<div class="card scroll"><table><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _curves(rows: list[Mapping[str, Any]]) -> str:
    loss = _thin(_series(rows, "loss"))
    names = {name for row in rows for name in row if name.endswith(("/mIoU", "/oIoU"))}
    plots = []
    if len(loss):
        lines = [("raw c0", loss)] if len(loss) < 8 else [("raw c0", loss), ("c0", _smooth(loss))]
        plots.append(_plot("Training loss", "loss", lines, dots=False))
    if names:
        lines = [(f"c{i}", _series(rows, name)) for i, name in enumerate(sorted(names))]
        key = "".join(f'<i class="c{i}"></i>{_text(name)}' for i, name in enumerate(sorted(names)))
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
        f'transform="rotate(-90 12 {middle})">{_text(y_label)}</text>'
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
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(y_label)} by step">'
        f"{''.join(parts)}</svg></figure>"
    )


def _gallery(split: str, result: Result) -> str:
    parts = [f"<h2>{_text(split)}: examples</h2>", _legend()]
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
        f'<img alt="{name}" src="{_data_uri(picture)}">'
        for name, picture in (
            ("truth", pictures.outline(image, truth, pictures.TRUTH_COLOR)),
            ("prediction", pictures.overlay(image, prediction)),
        )
    )
    kind = f"<br>{_text(example.kind)}" if example.kind else ""
    return (
        f'<figure class="example card"><div class="pair">{images}</div><figcaption>'
        f"<q>{_text(example.text)}</q>"
        f'<span class="score">IoU <b>{percent(example.iou)}</b>{kind}</span></figcaption></figure>'
    )


def _explanations(explained: list[tuple[Example, Iterable[Strip]]]) -> str:
    if not explained:
        return ""
    cards = []
    for example, strips in explained:
        rows = [f"<q>{_text(example.text)}</q> IoU <b>{percent(example.iou)}</b>"]
        for strip in strips:
            figures = "".join(
                f'<figure><img alt="{_text(caption)}" src="{_data_uri(picture)}">'
                f"<figcaption>{_text(caption)}</figcaption></figure>"
                for caption, picture in strip.pictures
            )
            rows.append(f'<h3>{_text(strip.heading)}</h3><div class="strip">{figures}</div>')
        cards.append(f'<div class="card explained">{"".join(rows)}</div>')
    return f"<h2>On the way to a mask</h2>{''.join(cards)}"


def _data_uri(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
