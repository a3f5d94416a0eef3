"""RefCOCO, RefCOCO+ and RefCOCOg, read from the file layout of the `refer` project.

<root>/images/mscoco/train2014/COCO_train2014_000000000009.jpg
<root>/<dataset>/instances.json
<root>/<dataset>/refs(<split_by>).p      (or .json with the same fields)
"""

import bisect
import collections
import itertools
import json
import logging
import os
import pathlib
import pickle
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as coco_mask

from refseg_jax.data.records import Ref, Sentence
from refseg_jax.data.transforms import read_image
from refseg_jax.errors import UserError

# Refs, images and sentences of whole splits, by (dataset, split_by); None: not published.
KNOWN_COUNTS: dict[tuple[str, str], dict[str, tuple[int, int, int | None]]] = {
    ("refcoco", "unc"): {
        "train": (42404, 16994, 120624),
        "val": (3811, 1500, 10834),
        "testA": (1975, 750, 5657),
        "testB": (1810, 750, 5095),
    },
    ("refcoco+", "unc"): {
        "train": (42278, 16992, 120191),
        "val": (3805, 1500, 10758),
        "testA": (1975, 750, 5726),
        "testB": (1798, 750, 4889),
    },
    ("refcocog", "umd"): {
        "train": (42226, 21899, 80512),
        "val": (2573, 1300, 4896),
        "test": (5023, 2600, 9602),
    },
    ("refcocog", "google"): {
        "train": (44822, 24698, None),
        "val": (5000, 4650, None),
    },
    ("refcoco", "google"): {
        "train": (40000, 19213, None),
        "val": (5000, 4559, None),
        "test": (5000, 4527, None),
    },
}

_WHERE_TO_GET_IT = (
    "expected are <root>/images/mscoco/train2014/*.jpg (COCO train2014 images, cocodataset.org) "
    "and <root>/<dataset>/instances.json with <root>/<dataset>/refs(<split_by>).p "
    "(github.com/lichengunc/refer)"
)
_FAULTS_SHOWN = 5

_REF_FIELDS = {
    "ref_id": int,
    "ann_id": int,
    "image_id": int,
    "category_id": int,
    "split": str,
    "sentences": list,
}
_INSTANCE_FIELDS = {
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {"id": int, "image_id": int, "segmentation": (list, dict)},
    "categories": {"id": int, "name": str},
}


class _Image(NamedTuple):
    file_name: str
    height: int
    width: int


class ReferSource:
    """One split of a dataset in the `refer` layout; `records.Source` says what it offers.

    A mask is the union of its annotation's polygons, or its run-length code. Refs and sentences
    keep the order of the file. A split whose published numbers of refs, images and sentences are
    known and not met logs one warning.

    Args:
      root: the data root of the layout above.
      dataset: its folder, such as "refcoco", "refcoco+" or "refcocog".
      split_by: whose split: "unc", "umd" or "google".
      split: the exact split name: "testA" never takes a "testAB" along.
      text_field: the field of a sentence that is the expression. Paper leaves open: LAVT's and
        CrossVLT's code reads "raw" (as typed), CRIS's reads "sent" (lower-cased, cleaned).
      compat_sum_polygons: foreground is where exactly one polygon lies, which erases overlaps:
        wrong, but the way some released code trains and scores.

    Raises:
      UserError: a file is missing or unreadable, there is no such split, or refs, annotations
        and image files do not fit together (these faults are gathered into one error).
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        dataset: str,
        split_by: str,
        split: str,
        *,
        text_field: str = "raw",
        compat_sum_polygons: bool = False,
    ):
        self.name, self.split = dataset, split
        self._compat_sum_polygons = compat_sum_polygons
        folder = pathlib.Path(root) / dataset
        instances_path = _existing(folder / "instances.json")
        refs_path = _existing(folder / f"refs({split_by}).p", folder / f"refs({split_by}).json")
        self._image_folder = _existing(pathlib.Path(root) / "images" / "mscoco" / "train2014")

        entries = _split_entries(refs_path, split)
        tables = _instance_tables(instances_path)
        files = set(os.listdir(self._image_folder))

        self._refs: list[Ref] = []
        self._images: dict[int, _Image] = {}
        self._parts: dict[int, list] = {}
        faults = []
        for entry in entries:
            image_id, ann_id = entry["image_id"], entry["ann_id"]
            try:
                self._images[image_id] = _image(image_id, tables["images"], files)
                self._parts[ann_id] = _parts(ann_id, image_id, tables["annotations"])
                sentences = _sentences(entry["sentences"], text_field)
            except UserError as fault:
                faults.append(f"ref {entry['ref_id']}: {fault}")
                continue
            category = tables["categories"].get(entry["category_id"], {"name": ""})["name"]
            self._refs.append(Ref(entry["ref_id"], image_id, (ann_id,), category, split, sentences))
        if faults:
            listed = "; ".join(faults[:_FAULTS_SHOWN]) + "; ..." * (len(faults) > _FAULTS_SHOWN)
            raise UserError(
                f"{len(faults)} of {len(entries)} refs of split {split!r} in {refs_path} cannot be "
                f"used: {listed} (mend the annotations or fetch what is missing; "
                f"{_WHERE_TO_GET_IT})"
            )
        # Number of sentences of refs 0 .. i.
        self._ends = list(itertools.accumulate(len(ref.sentences) for ref in self._refs))
        self.num_sentences = self._ends[-1]
        self._warn_if_partial(split_by)

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, i: int) -> Ref:
        return self._refs[i]

    def locate(self, j: int) -> tuple[int, int]:
        """Sentence number -> (ref index, index of the sentence within the ref)."""
        if not 0 <= j < self.num_sentences:
            raise IndexError(f"sentence {j} of {self.num_sentences}")
        i = bisect.bisect_right(self._ends, j)
        return i, j - self._ends[i] + len(self._refs[i].sentences)

    def image(self, ref: Ref) -> np.ndarray:
        """uint8 [H, W, 3], RGB. UserError: the file is gone, damaged or of another size."""
        image = self._images[ref.image_id]
        return read_image(self._image_folder / image.file_name, (image.height, image.width))

    def mask(self, ref: Ref) -> np.ndarray:
        """bool [H, W]. UserError: the segmentation cannot be decoded to the image's size."""
        image = self._images[ref.image_id]
        (ann_id,) = ref.ann_ids
        try:
            layers = coco_mask.decode([_run_lengths(part, image) for part in self._parts[ann_id]])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"annotation {ann_id} of {self.name}: its segmentation cannot be decoded ({error})"
            ) from error
        return layers.sum(axis=2) == 1 if self._compat_sum_polygons else layers.any(axis=2)

    def _warn_if_partial(self, split_by: str) -> None:
        known = KNOWN_COUNTS.get((self.name, split_by), {}).get(self.split)
        if known is None:
            return
        found = len(self), len(self._images), self.num_sentences
        differing = [
            f"{have} of {want} {what}"
            for have, want, what in zip(found, known, ("refs", "images", "sentences"), strict=True)
            if want is not None and have != want
        ]
        if differing:
            logging.warning(
                "%s (%s) %s is not the whole published split: it has %s",
                *(self.name, split_by, self.split, ", ".join(differing)),
            )


class _PlainUnpickler(pickle.Unpickler):
    """Builds nothing but plain containers, strings, numbers and bytes: refs come from strangers.

    Most plain values need no import at all; these few do, depending on the pickle's protocol.
    """

    _ADMITTED = {
        ("__builtin__", "set"): set,
        ("builtins", "set"): set,
        ("__builtin__", "frozenset"): frozenset,
        ("builtins", "frozenset"): frozenset,
        ("collections", "OrderedDict"): collections.OrderedDict,
        # How protocols 0 to 2 spell bytes: text and its encoding, always latin-1.
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin-1"),
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it holds {module}.{name}, which is not plain data: do not trust this file"
            ) from None


def _existing(*candidates: pathlib.Path) -> pathlib.Path:
    """The first of the paths that exists."""
    for path in candidates:
        if path.exists():
            return path
    missing = " or ".join(map(str, candidates))
    raise UserError(f"{missing} is missing: {_WHERE_TO_GET_IT}")


def _read(path: pathlib.Path) -> Any:
    """Contents of a JSON file, or of a pickle of plain data (Python 2's strings taken as UTF-8)."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".json":
                return json.load(file)
            return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
    # A damaged pickle can raise almost anything.
    except Exception as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}): fetch it again"
        ) from error


def _records(value: Any, fields: dict[str, type | tuple], where: str) -> list[dict]:
    """`value`, made sure to be a list of dicts with these fields of these types."""
    if not isinstance(value, list):
        raise UserError(f"{where}: a list is expected, not {type(value).__name__}")
    for number, record in enumerate(value):
        for field, kind in fields.items():
            if not isinstance(record, dict) or not isinstance(record.get(field), kind):
                raise UserError(f"{where}: record {number} lacks a usable {field!r}")
    return value


def _split_entries(path: pathlib.Path, split: str) -> list[dict]:
    """The refs of one split as they stand in the file."""
    entries = _records(_read(path), _REF_FIELDS, str(path))
    sizes = collections.Counter(entry["split"] for entry in entries)
    if split not in sizes:
        have = ", ".join(f"{name} ({count} refs)" for name, count in sorted(sizes.items()))
        raise UserError(f"{path} has no split {split!r}, it has: {have or 'no refs at all'}")
    return [entry for entry in entries if entry["split"] == split]


def _instance_tables(path: pathlib.Path) -> dict[str, dict[int, dict]]:
    """`images`, `annotations` and `categories` of an instances.json, each by id."""
    tables = _read(path)
    if not isinstance(tables, dict):
        raise UserError(f"{path}: a JSON object is expected, not {type(tables).__name__}")
    return {
        name: {
            record["id"]: record for record in _records(tables.get(name), fields, f"{path}, {name}")
        }
        for name, fields in _INSTANCE_FIELDS.items()
    }


def _image(image_id: int, images: dict[int, dict], files: set[str]) -> _Image:
    # A ref's own `file_name` carries an annotation number: it is not the image's name.
    if image_id not in images:
        raise UserError(f"image {image_id} is not in instances.json")
    image = _Image(*(images[image_id][field] for field in _Image._fields))
    if image.file_name not in files:
        raise UserError(f"image file {image.file_name} is missing")
    return image


def _parts(ann_id: int, image_id: int, annotations: dict[int, dict]) -> list[list | dict]:
    """The polygons and run-length codes that make up one annotation."""
    if ann_id not in annotations:
        raise UserError(f"annotation {ann_id} is not in instances.json")
    if annotations[ann_id]["image_id"] != image_id:
        raise UserError(f"annotation {ann_id} belongs to another image than {image_id}")
    segmentation = annotations[ann_id]["segmentation"]
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    # Fewer than three points enclose nothing (and pycocotools would take two for a box).
    parts = [part for part in parts if isinstance(part, dict) or len(part) >= 6]
    if not parts:
        raise UserError(f"annotation {ann_id} has no polygon and no run-length code")
    return parts


def _run_lengths(part: list | dict, image: _Image) -> dict:
    """One polygon [x0, y0, x1, y1, ...] or run-length code -> pycocotools' compressed code."""
    shape = image.height, image.width
    if isinstance(part, list):
        return coco_mask.frPyObjects([part], *shape)[0]
    size, counts = tuple(part["size"]), part["counts"]
    if size != shape:
        raise ValueError(f"a run-length code of size {size} on an image of size {shape}")
    if not isinstance(counts, list):
        return part
    if sum(counts) != image.height * image.width:
        raise ValueError("a run-length code that does not cover its image")
    return coco_mask.frPyObjects(part, *shape)


def _sentences(entries: list, text_field: str) -> tuple[Sentence, ...]:
    if not entries:
        raise UserError("it has no sentences")
    sentences = tuple(
        # `kind` is no field of the original layout; the embedded set writes it.
        Sentence(entry[text_field].strip(), entry["sent_id"], entry.get("kind", ""))
        for entry in _records(entries, {"sent_id": int, text_field: str}, "sentences")
    )
    for sentence in sentences:
        if not sentence.text:
            raise UserError(f"sentence {sentence.sent_id} is empty ({text_field!r})")
    return sentences
