"""RefCOCO, RefCOCO+, RefCOCOg, gRefCOCO and ReferIt, in the file layout of the `refer` project.

<root>/images/mscoco/train2014/COCO_train2014_000000000009.jpg
<root>/<dataset>/instances.json
<root>/<dataset>/refs(<split_by>).p      (or .json with the same fields)

ReferIt is the dataset "refclef", its images lie in images/saiapr_tc-12. gRefCOCO's file is
grefs(unc).json: there a ref's ann_id is a list, the target being the union, and [-1] means none;
and its refs without sentences, of which the published file has some, are left out, as its authors
say.
"""

import collections
import logging
import os
import pathlib
from collections.abc import Callable

import numpy as np

from refseg_jax.data import annotations, rle
from refseg_jax.data.files import read_bytes, sha256
from refseg_jax.data.records import ImageFile, Ref, RefList, Sentence, Source
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

# Where the images of a dataset lie, beneath the root: the first of these that there is.
_COCO_FOLDERS = ("images/mscoco/train2014", "images/mscoco/images/train2014", "images/train2014")
_IMAGE_FOLDERS = {"refclef": ("images/saiapr_tc-12",)}

_WHERE_TO_GET_IT = (
    "expected are <root>/images/mscoco/train2014/*.jpg (COCO train2014 images, cocodataset.org) "
    "and <root>/<dataset>/instances.json with <root>/<dataset>/refs(<split_by>).p "
    "(github.com/lichengunc/refer)"
)
_FAULTS_SHOWN = 5

_REF_FIELDS = {
    "ref_id": int,
    "ann_id": (int, list),
    "image_id": int,
    "category_id": (int, list),
    "split": str,
    "sentences": list,
}


class ReferFiles:
    """The files of one dataset, read once, for any number of its splits.

    `repeated`: see `annotations.instance_tables`.

    Attributes:
      annotation_files: the two files that hold refs and instances.
      splits: the names of the splits, in the order of the file.
      generalized: whether it is gRefCOCO's, whose refs have any number of targets.
      unspoken: how many refs of gRefCOCO's file were left out, as they have no sentences.

    Raises:
      UserError: a file is missing or unreadable.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        dataset: str,
        split_by: str,
        repeated: Callable[[str], None] | None = None,
    ):
        self.dataset, self.split_by = dataset, split_by
        folder = pathlib.Path(root) / dataset
        names = [f"{refs}({split_by}).{end}" for refs in ("refs", "grefs") for end in ("p", "json")]
        instances_path = _existing(folder / "instances.json")
        self.refs_path = _existing(*(folder / name for name in names))
        candidates = _IMAGE_FOLDERS.get(dataset, _COCO_FOLDERS)
        self.image_folder = _existing(*(pathlib.Path(root) / name for name in candidates))
        self.annotation_files = (self.refs_path, instances_path)
        self._entries = collections.defaultdict(list)
        self._image_ids = collections.defaultdict(dict)
        self.generalized = self.refs_path.name.startswith("grefs(")
        self.unspoken = 0
        for entry in annotations.read_records(self.refs_path, _REF_FIELDS):
            self._image_ids[entry["split"]][entry["image_id"]] = None
            if self.generalized and not entry["sentences"]:
                self.unspoken += 1
            else:
                self._entries[entry["split"]].append(entry)
        if self.unspoken:
            logging.warning("%s: %s", self.refs_path, self.report())
        self.splits = tuple(self._entries)
        if not self.splits:
            raise UserError(f"{self.refs_path} has no refs at all: fetch it again")
        self.tables = annotations.instance_tables(instances_path, repeated)
        self.image_names = _files_below(self.image_folder)

    def report(self) -> str:
        """One line on what has been left out."""
        return f"{self.unspoken} refs without sentences are left out"

    def entries(self, split: str) -> list[dict]:
        """The refs of one split as they stand in the file. UserError: there is no such split."""
        if split not in self.splits:
            sizes = ((name, len(entries)) for name, entries in sorted(self._entries.items()))
            have = ", ".join(f"{name} ({count} refs)" for name, count in sizes)
            raise UserError(f"{self.refs_path} has no split {split!r}, it has: {have}")
        return self._entries[split]

    def images(self, split: str) -> list[ImageFile]:
        """All images of a split, also of refs that cannot be used, if instances.json has them."""
        table = self.tables["images"]
        return [_image_file(table[i]) for i in self._image_ids[split] if i in table]


class ReferSource(RefList):
    """One split of a dataset in the `refer` layout; `records.FileSource` says what it offers.

    A mask is the union of its annotations' polygons and run-length codes. Refs and sentences keep
    the order of the file. A split whose published numbers of refs, images and sentences are known
    and not met logs one warning.

    Args:
      root: the data root of the layout above.
      dataset: its folder, such as "refcoco", "refcoco+" or "refcocog".
      split_by: whose split: "unc", "umd", "google" or "berkeley".
      split: the exact split name: "testA" never takes a "testAB" along.
      text_field: the field of a sentence that is the expression. Paper leaves open: LAVT's and
        CrossVLT's code reads "raw" (as typed), CRIS's reads "sent" (lower-cased, cleaned):
        config.data.text_field.
      compat_sum_polygons: foreground is where exactly one polygon lies, which erases overlaps:
        wrong, but the way some released code trains and scores.
      partial: leave out refs that cannot be used (`faults` lists them), where that is an error
        otherwise.
      files: the dataset's files, if they have been read already.

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
        partial: bool = False,
        files: ReferFiles | None = None,
    ):
        files = files or ReferFiles(root, dataset, split_by)
        self._compat_sum_polygons = compat_sum_polygons
        self._image_folder, self._annotation_files = files.image_folder, files.annotation_files
        self._images: dict[int, ImageFile] = {}
        self._parts: dict[int, list] = {}
        refs, faults = [], []
        entries = files.entries(split)
        for entry in entries:
            image_id = entry["image_id"]
            try:
                ann_ids = _ann_ids(entry["ann_id"], files.generalized)
                image = _image(image_id, files.tables["images"], files.image_names)
                parts = {i: _parts(i, image_id, files.tables["annotations"]) for i in ann_ids}
                sentences = _sentences(entry["sentences"], text_field)
            except UserError as fault:
                faults.append(f"ref {entry['ref_id']}: {fault}")
                continue
            self._images[image_id] = image
            self._parts |= parts
            category = _category(entry["category_id"], files.tables["categories"])
            refs.append(Ref(entry["ref_id"], image_id, ann_ids, category, split, sentences))
        if faults and not (partial and refs):
            listed = "; ".join(faults[:_FAULTS_SHOWN]) + "; ..." * (len(faults) > _FAULTS_SHOWN)
            raise UserError(
                f"{len(faults)} of {len(entries)} refs of split {split!r} in {files.refs_path} "
                f"cannot be used: {listed} (mend the annotations or fetch what is missing; "
                f"{_WHERE_TO_GET_IT})"
            )
        used = set(self._images.values())
        others = (image for image in files.images(split) if image not in used)
        super().__init__(dataset, split, refs, faults, others)
        warn_if_partial(self, files.split_by)

    def image(self, ref: Ref) -> np.ndarray:
        """uint8 [H, W, 3], RGB. UserError: the file is gone, damaged or of another size."""
        image = self._images[ref.image_id]
        return read_image(self._image_folder / image.name, (image.height, image.width))

    def image_file(self, ref: Ref) -> ImageFile:
        return self._images[ref.image_id]

    def image_bytes(self, ref: Ref) -> bytes:
        """The file's contents. UserError: it is gone."""
        return read_bytes(self._image_folder / self._images[ref.image_id].name)

    def image_place(self, ref: Ref) -> str:
        return str(self._image_folder / self._images[ref.image_id].name)

    def fingerprint(self) -> str:
        """Changes when an annotation file does."""
        return " ".join(map(sha256, self._annotation_files))

    def mask(self, ref: Ref) -> np.ndarray:
        """bool [H, W]. UserError: the segmentation cannot be decoded to the image's size."""
        image = self._images[ref.image_id]
        mask = np.zeros((image.height, image.width), bool)
        for ann_id in ref.ann_ids:
            try:
                layers = rle.decode_parts(self._parts[ann_id], image.height, image.width)
            except ValueError as error:
                raise UserError(
                    f"annotation {ann_id} of {self.name}: its segmentation cannot be decoded "
                    f"({error})"
                ) from error
            mask |= layers.sum(axis=2) == 1 if self._compat_sum_polygons else layers.any(axis=2)
        return mask


def count_differences(source: Source, split_by: str) -> list[str]:
    """What a split has other than published, such as "26 of 42404 refs"; [] if nothing is known."""
    known = KNOWN_COUNTS.get((source.name, split_by), {}).get(source.split)
    if known is None:
        return []
    images = len({source[i].image_id for i in range(len(source))})
    found = len(source), images, source.num_sentences
    return [
        f"{have} of {want} {what}"
        for have, want, what in zip(found, known, ("refs", "images", "sentences"), strict=True)
        if want is not None and have != want
    ]


def warn_if_partial(source: Source, split_by: str) -> None:
    """Logs one warning if `count_differences` has any."""
    differing = count_differences(source, split_by)
    if differing:
        logging.warning(
            "%s (%s) %s is not the whole published split: it has %s",
            *(source.name, split_by, source.split, ", ".join(differing)),
        )


def _existing(*candidates: pathlib.Path) -> pathlib.Path:
    """The first of the paths that exists."""
    for path in candidates:
        if path.exists():
            return path
    missing = " or ".join(map(str, candidates))
    raise UserError(f"{missing} is missing: {_WHERE_TO_GET_IT}")


def _files_below(folder: pathlib.Path) -> set[str]:
    """Names of all files in a folder and its subfolders, relative to it.

    A subfolder may be a link; one that leads back to a folder around it is not followed again.
    """
    found, seen = set(), set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(parent, f)) not in seen]
        found.update(os.path.relpath(os.path.join(parent, name), folder) for name in names)
    return found


def _image(image_id: int, images: dict[int, dict], names: set[str]) -> ImageFile:
    # A ref's own `file_name` carries an annotation number: it is not the image's name.
    if image_id not in images:
        raise UserError(f"image {image_id} is not in instances.json")
    image = _image_file(images[image_id])
    if image.name not in names:
        raise UserError(f"image file {image.name} is missing")
    try:
        rle.check_size(image.height, image.width)
    except ValueError as error:
        raise UserError(f"image {image_id}: {error}") from None
    return image


def _image_file(record: dict) -> ImageFile:
    return ImageFile(record["file_name"], record["height"], record["width"])


def _ann_ids(value: int | list, generalized: bool) -> tuple[int, ...]:
    """A ref's annotations: one, several, or none: [-1], and in gRefCOCO's file -1 as well."""
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(type(i) is int and -(2**63) <= i < 2**63 for i in ids):
        raise UserError("its ann_id is neither a number nor a list of numbers")
    none = ids == [-1] and (generalized or ids is value)
    return () if none else tuple(ids)


def _category(value: int | list, categories: dict[int, dict]) -> str:
    """The category that all targets share; "" if there is no such thing."""
    ids = value if isinstance(value, list) else [value]
    names = {categories.get(i, {"name": ""})["name"] for i in ids if isinstance(i, int)}
    return names.pop() if len(names) == 1 else ""


def _parts(ann_id: int, image_id: int, table: dict[int, dict]) -> list[list | dict]:
    """The polygons and run-length codes that make up one annotation."""
    if ann_id not in table:
        raise UserError(f"annotation {ann_id} is not in instances.json")
    if table[ann_id]["image_id"] != image_id:
        raise UserError(f"annotation {ann_id} belongs to another image than {image_id}")
    parts = rle.drawable(annotations.segmentation(table[ann_id]))
    if not parts:
        raise UserError(f"annotation {ann_id} has no polygon and no run-length code")
    return parts


def _sentences(entries: list, text_field: str) -> tuple[Sentence, ...]:
    if not entries:
        raise UserError("it has no sentences")
    checked = annotations.check_records(entries, {"sent_id": int, text_field: str}, "sentences")
    return tuple(
        Sentence(
            annotations.clean_text(entry[text_field], f"sentence {entry['sent_id']}"),
            entry["sent_id"],
            # No field of the original layout; the embedded set writes it.
            kind if isinstance(kind := entry.get("kind"), str) else "",
        )
        for entry in checked
    )
