"""Looks a dataset over: statistics, a page of samples, and every fault that can be found.

python -m refseg_jax.data.inspect refer --root /data/refer --dataset refcoco --split_by unc
python -m refseg_jax.data.inspect merged --root /data/refer [--sets refcoco_unc,photos]
python -m refseg_jax.data.inspect tfds --root tensorflow_datasets/ref_coco/refcoco_unc/1.1.0
python -m refseg_jax.data.inspect coco --images I --expressions E.jsonl [--instances J]
python -m refseg_jax.data.inspect coco --images I --instances J
python -m refseg_jax.data.inspect folder --root MY_PHOTOS
python -m refseg_jax.data.inspect prepared --root /data/shards/refcoco_unc
python -m refseg_jax.data.inspect shapes [--scenes 100]
"""

import argparse
import collections
import functools
import json
import logging
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from refseg_jax import page, pictures
from refseg_jax.data import checks, load_tokenizer, sets, shapes
from refseg_jax.data.checks import Report
from refseg_jax.data.prepare import add_kinds, built_splits, coco_sources, folder_splits, names
from refseg_jax.data.records import Ref, Source
from refseg_jax.data.refer import ReferFiles, ReferSource
from refseg_jax.errors import UserError, command

PICTURE_SIDE = 340  # px
SHOWN = 5  # Faults of each sort on the terminal; the page has all.
SPREADS = {  # Of the statistics: what the page calls it, its unit's factor and digits.
    "words": ("words per sentence", 1, 1),
    "tokens": ("tokens per sentence", 1, 1),
    "sentences_per_ref": ("sentences per ref", 1, 1),
    "objects_per_image": ("objects referred to, per image", 1, 1),
    "mask_share": ("mask, % of the image", 100, 2),
}
COUNTS = {
    "refs": "refs",
    "images": "images",
    "sentences": "sentences",
    "without_target": "refs without a target",
    "vocabulary": "different words",
}


def open_refer(args: argparse.Namespace, report: Report) -> dict[str, Source]:
    """A dataset in the `refer` layout."""
    repeated = functools.partial(report, checks.IDS)
    files = ReferFiles(args.root, args.dataset, args.split_by, repeated)
    sources = {}
    for split in args.splits or files.splits:
        checks.drop_blank(files.entries(split), args.text_field, split, report)
        try:
            sources[split] = ReferSource(
                args.root, args.dataset, args.split_by, split,
                text_field=args.text_field, partial=True, files=files,
            )  # fmt: skip
        except UserError as error:  # Nothing of this split can be used.
            report(checks.UNUSABLE, f"{split}: {error}")
            continue
        checks.check_edges(sources[split], files, report)
    return sources


def open_merged(args: argparse.Namespace, report: Report) -> dict[str, Source]:
    """The merged training set of several sets, and the other splits of each of them."""
    each = {
        name: sets.open_set(args.root, name, text_field=args.text_field, partial=True)
        for name in args.sets
    }
    return sets.merged_splits(each)


def open_tfds(args: argparse.Namespace, report: Report) -> dict[str, Source]:
    """TensorFlow Datasets' `ref_coco`, as it was built."""
    return built_splits(args, partial=True)[2]


def open_coco(args: argparse.Namespace, report: Report) -> dict[str, Source]:
    """Someone's own photos with a JSON-lines file of expressions, or with generated ones."""
    return coco_sources(args, partial=True)


def open_folder(args: argparse.Namespace, report: Report) -> dict[str, Source]:
    """A plain folder of someone's own images, masks and expressions."""
    return folder_splits(args, partial=True)


def open_prepared(args: argparse.Namespace, report: Report) -> dict[str, Source]:
    """What `python -m refseg_jax.data.prepare` wrote: a folder, or a gs:// address."""
    return sets.open_set(args.root, sets.ANY, args.splits, text_field=None)


def open_shapes(args: argparse.Namespace, report: Report) -> dict[str, Source]:
    """The embedded dataset."""
    return {s: shapes.ShapesSource(s, num_scenes=args.scenes) for s in shapes.NUM_SCENES}


def _check_place(out: str) -> None:
    """Raises a UserError where a page could not be written; of a bucket nothing is asked."""
    path = pathlib.Path(out)
    usable = not path.is_dir() and path.parent.is_dir()
    if "://" not in out and not (
        usable and os.access(path if path.exists() else path.parent, os.W_OK)
    ):
        raise UserError(f"cannot write the page {out}: name a file in a folder of yours")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Looks at what the command line names, writes the page, and returns what to print.

    Raises:
      UserError: nothing of it can be read, or the page cannot be written.
    """
    _check_place(args.out)  # Not only after all of the data was read.
    found: dict[str, dict[str, None]] = collections.defaultdict(dict)  # Each line once, in order.

    def report(sort: str, line: str) -> None:
        found[sort][" ".join(line.split())] = None

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    sources, statistics = args.open(args, report), {}
    if not sources:
        raise UserError("; ".join(line for lines in found.values() for line in lines))
    total = sum(map(len, sources.values()))
    with tqdm(total=total, unit="ref", disable=not sys.stderr.isatty()) as bar:
        for split, source in sources.items():
            bar.set_description(split)
            for fault in getattr(source, "faults", ()):
                report(checks.UNUSABLE, f"{split}: {fault}")
            statistics[split] = checks.look(
                split, source, report, tokenizer, args.max_tokens, bar.update
            )
    checks.check_ids(sources, report)
    checks.check_leaks(sources, report)
    problems = {sort: list(lines) for sort, lines in found.items()}
    title = f"Data: {next(iter(sources.values())).name}"
    try:
        page.write(args.out, title, _sections(sources, statistics, problems, args.samples))
    except OSError as error:
        raise UserError(f"cannot write the page {args.out}: {error.strerror}") from error
    return {"page": str(args.out), "splits": statistics, "problems": problems}


def _sections(
    sources: Mapping[str, Source],
    statistics: Mapping[str, Mapping[str, Any]],
    problems: Mapping[str, list[str]],
    samples: int,
) -> Iterator[str]:
    """What the page has, top to bottom, as HTML."""
    head = ("split", *COUNTS.values())
    yield page.table(head, [("split", (s, *(n[c] for c in COUNTS))) for s, n in statistics.items()])
    yield f"<h2>Problems: {sum(map(len, problems.values()))}</h2>"
    for sort, lines in problems.items():
        shown = "\n".join(map(page.text, lines))
        yield (
            f'<details class="card"><summary>{page.text(sort)}: {len(lines)}</summary>'
            f"<pre>{shown}</pre></details>"
        )
    yield "<h2>Spread</h2>"
    rows = []
    for split, numbers in statistics.items():
        rows.append(("split", (split, *[""] * len(checks.SPREAD))))
        for field, (label, factor, digits) in SPREADS.items():
            if field in numbers:
                cells = (f"{factor * value:.{digits}f}" for value in numbers[field].values())
                rows.append(("kind", (label, *cells)))
    yield page.table(("", *checks.SPREAD), rows)
    for split, source in sources.items():
        yield f"<h2>{page.text(split)}: samples</h2>"
        yield f'<div class="examples">{"".join(_figures(source, samples))}</div>'


def _figures(source: Source, samples: int) -> Iterator[str]:
    """So many refs of different images, evenly spread, that can be drawn."""
    of_image = collections.defaultdict(list)
    for ref in checks.refs(source):
        of_image[ref.image_id].append(ref)
    groups = list(of_image.values())
    spread = np.linspace(0, len(groups) - 1, min(samples, len(groups))).astype(int)
    for k, i in enumerate(spread):
        ref = groups[i][k % len(groups[i])]  # Not the first of each: they may be of one sort.
        try:
            yield _figure(ref, source.image(ref), source.mask(ref))
        except UserError:
            continue  # It is among the problems.


def _figure(ref: Ref, image: np.ndarray, mask: np.ndarray) -> str:
    drawn = pictures.overlay(
        pictures.fit(image, PICTURE_SIDE), pictures.fit(mask, PICTURE_SIDE), pictures.TRUTH_COLOR
    )
    said = "<br>".join(f"<q>{page.text(sentence.text)}</q>" for sentence in ref.sentences)
    notes = f"ref {ref.ref_id}", ref.category, "" if ref.ann_ids else "no target"
    return (
        f'<figure class="example card"><img alt="" src="{page.data_uri(drawn)}"><figcaption>'
        f'<span>{said}</span><span class="score">'
        f"{'<br>'.join(page.text(note) for note in notes if note)}</span></figcaption></figure>"
    )


def describe(result: Mapping[str, Any]) -> str:
    """The result of `run` for people: counts, and the first few problems of each sort."""
    lines = [
        f"{split}: {', '.join(f'{numbers[c]} {label}' for c, label in COUNTS.items())}"
        for split, numbers in result["splits"].items()
    ]
    for sort, found in result["problems"].items():
        lines += [f"{sort}: {len(found)}", *(f"  {line}" for line in found[:SHOWN])]
        lines += [f"  ... and {len(found) - SHOWN} more"] * (len(found) > SHOWN)
    total = sum(map(len, result["problems"].values()))
    return "\n".join([*lines, f"{total} problems; samples and details: {result['page']}"])


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m refseg_jax.data.inspect", description=__doc__.split("\n", 1)[0]
    )
    kinds = parser.add_subparsers(required=True, metavar="refer|merged|tfds|coco|folder|...")

    def kind(name, function):
        sub = kinds.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(open=function)
        sub.add_argument("--out", default="inspect.html", help="page to write (default: here)")
        sub.add_argument("--samples", type=int, default=12, help="pictures per split")
        sub.add_argument("--tokenizer", help="shapes, a tokenizer file or folder, or a hub name")
        sub.add_argument("--max_tokens", type=int, default=20, help="what the model reads")
        sub.add_argument("--json", action="store_true", help="print one JSON object instead")
        return sub

    add_kinds(kind, open_refer, open_merged, open_tfds, open_coco, open_folder)
    sub = kind("prepared", open_prepared)
    sub.add_argument("--root", required=True, help="the prepared folder")
    sub.add_argument("--splits", type=names, help="e.g. train,val (default: all)")
    sub = kind("shapes", open_shapes)
    sub.add_argument("--scenes", type=int, default=100, help="per split")
    args = parser.parse_args(argv)
    if args.samples < 0:
        parser.error(f"--samples={args.samples} is negative")
    return args


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 with whatever problems, 2 if nothing is read."""
    logging.basicConfig(level=logging.ERROR)  # What the sources warn of, this counts itself.
    args = _arguments(argv)
    result = run(args)
    print(json.dumps(result) if args.json else _safe(describe(result)))
    return 0


def _safe(text: str) -> str:
    """Text from damaged files, so that a terminal can show it."""
    return text.encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    sys.exit(main())
