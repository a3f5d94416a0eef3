"""Self-contained HTML pages: their style, tables and pictures. Shared by report and inspect."""

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from refseg_jax.data.files import write_whole

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
.example > img { display: block; width: 100%; max-height: 340px; object-fit: contain;
  background: #0b0e13; }
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


def write(path: str | os.PathLike, title: str, sections: Iterable[str]) -> None:
    """Writes one HTML file with its style inside it.

    Args:
      path: where to write it.
      title: the heading, as plain text.
      sections: HTML. Whatever is text in it went through `text`.
    """
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{text(title)}</h1>{''.join(sections)}</body></html>\n"
    )
    # Text of damaged files may be no Unicode.
    write_whole(path, page.encode("utf-8", "xmlcharrefreplace"))


def text(value: Any) -> str:
    """Anything as text, escaped."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[Any]]]) -> str:
    """A table of plain cells. A row's CSS class is "split" (in bold) or "kind" (beneath one)."""
    names = "".join(f"<th>{text(name)}</th>" for name in head)
    body = "".join(
        f'<tr class="{style}">{"".join(f"<td>{text(cell)}</td>" for cell in cells)}</tr>'
        for style, cells in rows
    )
    return (
        '<div class="card scroll"><table><thead><tr>'
        f"{names}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def data_uri(picture: np.ndarray) -> str:
    """uint8 [H, W, 3] -> the address of a JPEG that is inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=80, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
