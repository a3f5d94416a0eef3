"""Prepares a dataset: pictures, masks and expressions into a few large files (see `shards.py`).

python -m refseg_jax.data.prepare refer --root /data/refer --dataset refcoco --split_by unc --out D
python -m refseg_jax.data.prepare merged --root /data/refer --out D
python -m refseg_jax.data.prepare tfds --root tensorflow_datasets/ref_coco/refcoco_unc/1.1.0 --out D
python -m refseg_jax.data.prepare coco --images I --expressions E.jsonl [--instances J] --out D
python -m refseg_jax.data.prepare coco --images I --instances J --out D
python -m refseg_jax.data.prepare folder --root MY_PHOTOS --out D

The same command again goes on where a killed one stopped, and verifies what is there.
"""

import argparse
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from refseg_jax.data import custom, expressions, refer, sets
from refseg_jax.data.files import sha256
from refseg_jax.data.records import FileSource
from refseg_jax.data.shards import MANIFEST
from refseg_jax.data.writer import Plan, missing_splits, write
from refseg_jax.errors import UserError, command, say

_COCO_LICENCE = (
    "annotations of COCO: CC BY 4.0 (cocodataset.org); photographs: each under its own Flickr "
    "licence; expressions: see github.com/lichengunc/refer"
)
_LICENCES = {
    "refclef": "photographs and regions of SAIAPR TC-12 (imageclef.org/SIAPRdata); expressions: "
    "see github.com/lichengunc/refer",
    "grefcoco": "annotations of COCO: CC BY 4.0 (cocodataset.org); photographs: each under its own "
    "Flickr licence; expressions: see github.com/henghuiding/gRefCOCO",
}
_OWN_LICENCE = "not stated (--licence)"
_SKIPPED_SHOWN = 20
MERGED_SETS = ("refcoco_unc", "refcoco+_unc", "refcocog_umd")


def open_refer(args: argparse.Namespace) -> Plan:
    """A dataset in the `refer` layout."""
    files = refer.ReferFiles(args.root, args.dataset, args.split_by)
    if files.unspoken:
        say(files.report())
    sources = {
        split: refer.ReferSource(
            args.root, args.dataset, args.split_by, split,
            text_field=args.text_field, partial=args.partial, files=files,
        )
        for split in args.splits or files.splits
    }  # fmt: skip
    about = {
        "source": {
            "kind": "refer",
            "files": {path.name: sha256(path) for path in files.annotation_files},
            **({"without_sentences": files.unspoken} if files.unspoken else {}),
        },
        "licence": args.licence or _LICENCES.get(args.dataset, _COCO_LICENCE),
        "text_field": args.text_field,
    }
    return _plan(args, args.dataset, args.split_by, sources, about)


def built_splits(args: argparse.Namespace, partial: bool) -> tuple[str, str, dict[str, Any], tuple]:
    """(dataset, split_by, sources of the splits, files) of `args` as `open_tfds` takes them.

    Raises:
      UserError: there is no such split, or see `tfds.open_built`.
    """
    from refseg_jax.data import tfds

    dataset, split_by, sources, files = tfds.open_built(args.root, partial)
    sources = {split: sources[split] for split in args.splits or sources if split in sources}
    missing = set(args.splits or ()) - sources.keys()
    if missing:
        raise UserError(f"{args.root} has no split {', '.join(sorted(missing))}")
    return dataset, split_by, sources, files


def open_tfds(args: argparse.Namespace) -> Plan:
    """TensorFlow Datasets' `ref_coco`, as it was built."""
    dataset, split_by, sources, files = built_splits(args, args.partial)
    about = {
        "source": {"kind": "tfds ref_coco", "files": {path.name: sha256(path) for path in files}},
        "licence": args.licence or _COCO_LICENCE,
        "text_field": "raw",  # It keeps no other.
    }
    return _plan(args, dataset, split_by, sources, about)


def coco_sources(args: argparse.Namespace, partial: bool) -> dict[str, custom.CustomSource]:
    """The splits of someone's own photos, by `args` as `open_coco` takes them.

    Raises:
      UserError: what is needed is not given, or see `custom.read_lines`.
    """
    if args.expressions:
        return custom.read_lines(
            args.expressions, args.images, args.instances,
            name=args.name, val_share=args.val_share, partial=partial,
        )  # fmt: skip
    if not args.instances:
        raise UserError("give --expressions, or --instances to have some generated")
    generator = expressions.Generator(args.instances)
    lines = generator.entries(args.val_share)
    say(f"expressions generated: {json.dumps(generator.report())}")
    return custom.read_entries(lines, args.images, args.instances, name=args.name, partial=partial)


def open_coco(args: argparse.Namespace) -> Plan:
    """Someone's own photos with a JSON-lines file of expressions, or with generated ones."""
    sources = coco_sources(args, args.partial)
    files = [pathlib.Path(path) for path in (args.expressions, args.instances) if path]
    about = {
        "source": {
            "kind": "coco",
            "files": {path.name: sha256(path) for path in files},
            "regions": _fingerprints(sources),
            **({} if args.expressions else {"expressions": "generated"}),
        },
        "licence": args.licence or _OWN_LICENCE,
    }
    return _plan(args, args.name, "", sources, about)


def folder_splits(args: argparse.Namespace, partial: bool) -> dict[str, custom.CustomSource]:
    """The splits of `args` as `open_folder` takes them; says which images no region is of.

    Raises:
      UserError: see `custom.read_folder`.
    """
    sources = custom.read_folder(
        args.root, name=args.name, val_share=args.val_share, partial=partial
    )
    if alone := custom.images_alone(args.root, sources):
        more = ", ..." * (len(alone) > _SKIPPED_SHOWN)
        shown = ", ".join(alone[:_SKIPPED_SHOWN])
        say(f"images left out, without a usable region: {len(alone)} ({shown}{more})")
    return sources


def open_folder(args: argparse.Namespace) -> Plan:
    """A plain folder of someone's own images, masks and expressions."""
    sources = folder_splits(args, args.partial)
    about = {
        "source": {"kind": "folder", "regions": _fingerprints(sources)},
        "licence": args.licence or _OWN_LICENCE,
    }
    return _plan(args, args.name, "", sources, about)


def open_merged(args: argparse.Namespace) -> Plan:
    """The merged training set of several sets, and the other splits of each of them."""
    each = {
        name: sets.open_set(args.root, name, text_field=args.text_field, partial=args.partial)
        for name in args.sets
    }
    sources = sets.merged_splits(each)
    merged = sources[sets.TRAIN]
    say(merged.report())
    differences = {}
    for name, splits in each.items():
        for split, source in splits.items():
            if lines := refer.count_differences(source, name.rpartition("_")[2]):
                differences[f"{name}/{split}"] = lines
                say(f"{name} is not what is published: {split} has {', '.join(lines)}")
    dropped = {
        name: dict(zip(("images", "refs", "sentences"), lost, strict=True))
        for name, lost in merged.dropped.items()
    }
    about = {
        "source": {
            "kind": "merged",
            "sets": list(args.sets),
            "dropped": dropped,
            "differences": differences,
            "absent": merged.absent,
            "files": {name: splits[sets.TRAIN].fingerprint() for name, splits in each.items()},
        },
        "licence": args.licence or f"{_COCO_LICENCE}; of other sets: their own",
        "text_field": args.text_field,
    }
    return _plan(args, sets.MERGED, "", sources, about)


def _plan(
    args: argparse.Namespace,
    dataset: str,
    split_by: str,
    sources: Mapping[str, FileSource],
    about: Mapping[str, Any],
) -> Plan:
    return Plan(dataset, split_by, sources, about, args.images_per_shard, args.partial)


def _fingerprints(sources: Mapping[str, custom.CustomSource]) -> dict[str, str]:
    return {split: source.fingerprint() for split, source in sources.items()}


def check_counts(plan: Plan) -> None:
    """Compares the splits with what is published of them; says what a part of them lacks.

    Raises:
      UserError: a split has all its refs, and yet differs, and the plan is not `partial`.
    """
    known = refer.KNOWN_COUNTS.get((plan.dataset, plan.split_by), {})
    parts, wrong = [], []
    for split, source in plan.sources.items():
        if lines := refer.count_differences(source, plan.split_by):
            whole = len(source) >= known[split][0]
            (wrong if whole else parts).append(f"{split} has {', '.join(lines)}")
    parts += [f"{split} is missing" for split in missing_splits(plan)]
    name = f"{plan.dataset} ({plan.split_by})"
    if parts:
        say(f"a part of {name} as it is published: {'; '.join(parts)}")
    if wrong:
        text = f"{name} is not what is published: {'; '.join(wrong)}"
        if not plan.partial:
            raise UserError(f"{text} (fetch it again, or take it as it is with --partial)")
        say(text)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Prepares what the command line asks for; returns what to print.

    Raises:
      UserError: the data is missing, damaged, or not what is published, or cannot be written.
    """
    plan = args.open(args)
    check_counts(plan)
    manifest = write(plan, args.out, args.workers)
    skipped = [line for lines in manifest["skipped"].values() for line in lines]
    for line in skipped[:_SKIPPED_SHOWN]:
        say(f"left out: {line}")
    if len(skipped) > _SKIPPED_SHOWN:
        say(f"left out: {len(skipped)} in all, see {args.out / MANIFEST}")
    blank = [ref for refs in manifest["blank"].values() for ref in refs]
    if blank:
        more = ", ..." * (len(blank) > _SKIPPED_SHOWN)
        say(f"kept, though their masks have no pixel: {', '.join(blank[:_SKIPPED_SHOWN])}{more}")
    return {
        "out": str(args.out),
        "dataset": manifest["dataset"],
        "images": manifest["images"],
        "splits": manifest["splits"],
        "skipped": len(skipped),
        "shards": len(manifest["shards"]),
        "bytes": sum(state["bytes"] for state in (*manifest["shards"], manifest["index"])),
    }


def names(text: str) -> tuple[str, ...]:
    """For argparse: names with commas between."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _local(text: str) -> str:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text} is not on this machine, as it has to be: copy from there, or there afterwards"
        )
    return text


def _out(text: str) -> pathlib.Path:
    return pathlib.Path(_local(text))


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _share(text: str) -> float:
    if not 0 < (share := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share


def add_kinds(
    kind: Callable,
    open_refer: Callable,
    open_merged: Callable,
    open_tfds: Callable,
    open_coco: Callable,
    open_folder: Callable,
) -> None:
    """Adds the options of the kinds of data; `kind(name, function)` makes a parser of one."""
    local = dict(type=_local)
    sub = kind("refer", open_refer)
    sub.add_argument(
        "--root", required=True, help="folder with images/ and the dataset's own", **local
    )
    sub.add_argument("--dataset", default="refcoco", help="its folder, e.g. refcoco+ or refclef")
    sub.add_argument("--split_by", default="unc", help="unc, umd, google or berkeley")
    sub.add_argument("--splits", type=names, help="e.g. train,val (default: all)")
    _add_text_field(sub)
    sub = kind("merged", open_merged)
    sub.add_argument("--root", required=True, help="folder with the sets, raw or prepared")
    sub.add_argument("--sets", type=names, default=MERGED_SETS, help="e.g. refcoco_unc,photos")
    _add_text_field(sub)
    sub = kind("tfds", open_tfds)
    sub.add_argument("--root", required=True, help="the built version's folder, .../1.1.0", **local)
    sub.add_argument("--splits", type=names, help="e.g. train,val (default: all)")
    sub = kind("coco", open_coco)
    sub.add_argument("--images", required=True, help="folder with the images", **local)
    sub.add_argument(
        "--expressions", help="JSON lines, see docs/data.md (default: generated ones)", **local
    )
    sub.add_argument("--instances", help="COCO file that ann_id refers to", **local)
    _add_own(sub)
    sub = kind("folder", open_folder)
    sub.add_argument("--root", required=True, help="has images/, masks/, expressions/", **local)
    _add_own(sub)


def _add_text_field(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--text_field", choices=("raw", "sent"), default="raw", help="as typed, or cleaned"
    )


def _add_own(sub: argparse.ArgumentParser) -> None:
    """What both kinds of someone's own photos take."""
    sub.add_argument("--name", default="custom", help="what to call the dataset")
    sub.add_argument(
        "--val_share", type=_share, default=custom.VAL_SHARE,
        help="of the images, where no split is named",
    )  # fmt: skip


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m refseg_jax.data.prepare", description=__doc__.split("\n", 1)[0]
    )
    kinds = parser.add_subparsers(required=True, metavar="refer|merged|tfds|coco|folder")

    def kind(name, function):
        sub = kinds.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(open=function)
        sub.add_argument("--out", required=True, type=_out, help="folder to write to")
        sub.add_argument(
            "--workers", type=_positive, default=os.cpu_count(), help="processes (default: cores)"
        )
        sub.add_argument(
            "--partial",
            action="store_true",
            help="take a part: leave out what cannot be used, list it, and go on",
        )
        sub.add_argument("--licence", help="what the manifest says of it")
        sub.add_argument("--images_per_shard", type=_positive, default=256)
        return sub

    add_kinds(kind, open_refer, open_merged, open_tfds, open_coco, open_folder)
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> int:
    """The command line; prints one JSON object and returns the exit status, 2 for bad input."""
    logging.basicConfig(level=logging.ERROR)  # What the sources warn of, this reports itself.
    args = _arguments(argv)
    print(json.dumps(run(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
