"""Datasets on disk by name, such as "refcoco_unc": prepared or raw, one of them or several merged.

A set is looked for in this order: prepared in <root>/<name>, prepared in <root> itself, and in the
`refer` layout beneath <root>.
"""

import collections
import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refseg_jax.data.records import FileSource, ImageFile, Ref, RefList
from refseg_jax.data.refer import KNOWN_COUNTS, ReferFiles, ReferSource
from refseg_jax.data.shards import PreparedSource, is_prepared, merged_sets, read_header
from refseg_jax.errors import UserError

TRAIN = "train"
MERGED = "merged"
ANY = "prepared"  # Whatever set is prepared in the root.
_PUBLISHED = {f"{dataset}_{split_by}" for dataset, split_by in KNOWN_COUNTS} | {"grefcoco_unc"}

_COCO_NAME = re.compile(
    r"(?:.*/)?(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.(?:jpe?g|png|webp)", re.IGNORECASE
)


def set_name(dataset: str, split_by: str) -> str:
    """("refcoco", "unc") -> "refcoco_unc"."""
    return f"{dataset}_{split_by}" if split_by else dataset


def open_set(
    root: str,
    name: str,
    splits: Sequence[str] | None = None,
    *,
    text_field: str | None = "raw",
    partial: bool = False,
) -> dict[str, FileSource]:
    """The named splits of a set, or all that it has; `partial`: without what cannot be used.

    `text_field`: see `refer.ReferSource`; None takes what a set was prepared with.

    Raises:
      UserError: there is no such set or split, it was prepared with another field's texts, or its
        files are missing or damaged.
    """
    root = str(root).rstrip("/")
    for folder in (f"{root}/{name}", root):
        if not is_prepared(folder):
            continue
        header = read_header(folder)
        found = set_name(header.dataset, header.split_by)
        if folder == root and name not in (found, ANY):
            raise UserError(f"{root} holds the prepared set {found}, not {name}: give another root")
        if name != found and name in _PUBLISHED:
            raise UserError(f"{folder} holds the prepared set {found}: name the folder so")
        if header.text_field and text_field and header.text_field != text_field:
            raise UserError(
                f"{folder} was prepared with the texts {header.text_field!r} of its sentences, not "
                f"{text_field!r}: set config.data.text_field (or --text_field) to "
                f"{header.text_field!r}, or prepare it with --text_field {text_field}"
            )
        return {split: PreparedSource(folder, split) for split in splits or header.splits}
    dataset, _, split_by = name.rpartition("_")
    if "://" in root or not dataset:
        meant = " or ".join(sorted(other for other in _PUBLISHED if other.startswith(f"{name}_")))
        raise UserError(
            f"there is no prepared set at {root} or {root}/{name}: write one with "
            f"`python -m refseg_jax.data.prepare`{f', or is {meant} meant?' if meant else ''}"
        )
    files = ReferFiles(root, dataset, split_by)
    return {
        split: ReferSource(
            root, dataset, split_by, split,
            text_field=text_field or "raw", partial=partial, files=files,
        )
        for split in splits or files.splits
    }  # fmt: skip


def open_merged(root: str, names: Sequence[str], split: str, text_field: str = "raw") -> FileSource:
    """The merged training set ("train"), or a split of one of its sets ("refcoco_unc/val").

    Raises:
      UserError: see `open_set` and `MergedSource`.
    """
    root = str(root).rstrip("/")
    for folder in (f"{root}/{MERGED}", root):
        if not is_prepared(folder):
            continue
        held = merged_sets(folder) or names
        if set(held) != set(names):
            raise UserError(
                f"{folder} holds the merged set of {', '.join(held)}, not of {', '.join(names)}: "
                f"set config.data.merged to {tuple(held)}, or give another root"
            )
        return open_set(folder, MERGED, [split], text_field=text_field)[split]
    if split == TRAIN:
        return MergedSource({name: open_set(root, name, text_field=text_field) for name in names})
    name, _, part = split.rpartition("/")
    if name not in names:
        raise UserError(
            f"the merged set has no split {split!r}: its splits are {TRAIN!r} and "
            f"<set>/<split>, the sets being {', '.join(names)}"
        )
    return open_set(root, name, [part], text_field=text_field)[part]


def merged_splits(each: Mapping[str, Mapping[str, FileSource]]) -> dict[str, FileSource]:
    """All splits of the merged set of some sets, given all of theirs.

    Raises:
      UserError: see `MergedSource`.
    """
    merged: dict[str, FileSource] = {TRAIN: MergedSource(each)}
    for name, splits in each.items():
        merged |= {f"{name}/{split}": source for split, source in splits.items() if split != TRAIN}
    return merged


def image_key(file: ImageFile) -> Any:
    """Equal for two files of one photograph, in whichever of the sets they are.

    COCO's images go by their number, which is the same in all its editions and sizes; others by
    name and size.
    """
    number = _COCO_NAME.fullmatch(file.name)
    return int(number[1]) if number else file


class MergedSource(RefList):
    """The training splits of several sets, without any image that another split of one of them has.

    The google splits share images between training and validation, and the sets share COCO's:
    without this, a model is trained on images that it is tested on. Refs come set by set, numbered
    anew.

    Args:
      sets: the splits of each set by name, all of them.

    Attributes:
      dropped: for each set how many (images, refs, sentences) have been left out.
      absent: splits that a published set should have and has not: what they would hold out is not.

    Raises:
      UserError: a set has no training split, or nothing is left.
    """

    def __init__(self, sets: Mapping[str, Mapping[str, FileSource]]):
        without = [name for name, splits in sets.items() if TRAIN not in splits]
        if without or not sets:
            raise UserError(f"nothing to merge: no {TRAIN!r} split in {', '.join(without) or 'it'}")
        self.absent = [
            f"{name}/{split}"
            for name, splits in sets.items()
            for split in KNOWN_COUNTS.get((name.rpartition("_")[0], name.rpartition("_")[2]), ())
            if split not in splits
        ]
        held_out = {
            image_key(file)
            for splits in sets.values()
            for split, source in splits.items()
            if split != TRAIN
            for file in (*map(source.image_file, source), *source.other_images)
        }
        refs: list[Ref] = []
        faults: list[str] = []
        self._origins: list[tuple[FileSource, Ref]] = []
        self.dropped: dict[str, tuple[int, int, int]] = {}
        for name, splits in sets.items():
            source, lost = splits[TRAIN], collections.Counter()
            faults += (f"{name}: {fault}" for fault in source.faults)
            for ref in (source[i] for i in range(len(source))):
                key = image_key(source.image_file(ref))
                if key in held_out:
                    lost[key] += len(ref.sentences)
                    lost["refs"] += 1
                    continue
                refs.append(dataclasses.replace(ref, ref_id=len(refs)))
                self._origins.append((source, ref))
            count = lost.pop("refs", 0)
            self.dropped[name] = (len(lost), count, sum(lost.values()))
        if not refs:
            raise UserError(f"nothing is left of {', '.join(sets)}: every image is held out")
        super().__init__(MERGED, TRAIN, refs, faults)
        logging.warning("merged training set: %s", self.report())

    def report(self) -> str:
        """One line on what has been left out."""
        each = "; ".join(
            f"{name} {images} images ({refs} refs, {sentences} sentences)"
            for name, (images, refs, sentences) in self.dropped.items()
        )
        absent = ", ".join(self.absent)
        return f"left out, as they are in a non-train split of one of the sets: {each}" + (
            f"; BUT {absent} are not here, so their images may be among those to train on"
            if absent
            else ""
        )

    def image(self, ref: Ref) -> np.ndarray:
        """uint8 [H, W, 3], RGB."""
        source, original = self._origins[ref.ref_id]
        return source.image(original)

    def image_file(self, ref: Ref) -> ImageFile:
        source, original = self._origins[ref.ref_id]
        return source.image_file(original)

    def image_bytes(self, ref: Ref) -> bytes:
        """The encoded picture."""
        source, original = self._origins[ref.ref_id]
        return source.image_bytes(original)

    def image_place(self, ref: Ref) -> str:
        source, original = self._origins[ref.ref_id]
        return source.image_place(original)

    def mask(self, ref: Ref) -> np.ndarray:
        """bool [H, W]."""
        source, original = self._origins[ref.ref_id]
        return source.mask(original)
