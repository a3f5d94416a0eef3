"""Anyone's own photos: a file of expressions as JSON lines, or a plain folder.

JSON lines, one object each, that points at a region and says what people call it:

    {"image": "park.jpg", "ann_id": 17, "sentences": ["the dog on the left", "brown dog"]}

`image` is a file name in the folder of images, or an image's id in a COCO `instances.json`. The
region is one of `ann_id` (an annotation of that file, or a list of them; [] for expressions that
fit nothing in the image), `polygon` ([x0, y0, x1, y1, ...] or a list of such, in pixels) or `mask`
(a picture whose pixels other than 0 are the region, best a PNG, relative to the file of
expressions, or a COCO run-length code). `split`, `category` and `kinds` (the type of each sentence,
such as "place", by which scores are listed) may be added.

A plain folder holds the same as files:

    images/park.jpg    masks/park_1.png    expressions/park_1.txt    (one expression per line)

A mask belongs to the image of its name, or of its name up to a "_" or "-".
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from refseg_jax.data import annotations, rle
from refseg_jax.data.files import read_bytes, sha256
from refseg_jax.data.records import ImageFile, Ref, RefList, Sentence
from refseg_jax.data.transforms import read_image
from refseg_jax.errors import UserError

VAL_SHARE = 0.1

_REGIONS = ("ann_id", "polygon", "mask")
_FIELDS = ("image", "sentences", "kinds", "split", "category", *_REGIONS)
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_FAULTS_SHOWN = 5

Region = list | pathlib.Path  # COCO polygons and run-length codes, or a picture.


class _Item(NamedTuple):
    """A region with its expressions."""

    where: str
    ref: Ref
    image: ImageFile
    region: Region


class CustomSource(RefList):
    """One split of someone's own data; `records.FileSource` says what it offers."""

    def __init__(
        self,
        name: str,
        split: str,
        folder: pathlib.Path,
        items: Sequence[_Item],
        other_images: Iterable[ImageFile] = (),
    ):
        super().__init__(name, split, [item.ref for item in items], other_images=other_images)
        self._folder = folder
        self._items = {item.ref.ref_id: item for item in items}

    def image(self, ref: Ref) -> np.ndarray:
        """uint8 [H, W, 3], RGB. UserError: the file is gone, damaged or of another size."""
        file = self.image_file(ref)
        return read_image(self._folder / file.name, (file.height, file.width))

    def image_file(self, ref: Ref) -> ImageFile:
        return self._items[ref.ref_id].image

    def image_bytes(self, ref: Ref) -> bytes:
        """The file's contents. UserError: it is gone."""
        return read_bytes(self._folder / self.image_file(ref).name)

    def origin(self, ref: Ref) -> str:
        return self._items[ref.ref_id].where

    def image_place(self, ref: Ref) -> str:
        return str(self._folder / self.image_file(ref).name)

    def mask(self, ref: Ref) -> np.ndarray:
        """bool [H, W]. UserError: it cannot be decoded, has another size, or no pixel."""
        where, _, file, region = self._items[ref.ref_id]
        size = file.height, file.width
        if not ref.ann_ids:
            return np.zeros(size, bool)
        try:
            if isinstance(region, pathlib.Path):
                mask = _read_mask(region)
            else:
                mask = rle.decode_parts(region, *size).any(axis=2)
            if mask.shape != size:
                raise ValueError(f"it is {mask.shape}, its image {size} (height, width)")
            if not mask.any():
                raise ValueError(
                    'no pixel (for expressions that fit nothing JSON lines have "ann_id": [])'
                )
        except ValueError as error:
            raise UserError(f"{where}: its region cannot be used: {error}") from error
        return mask

    def fingerprint(self) -> str:
        """Changes when a mask does, or the size of an image's file."""
        digest = hashlib.sha256()
        for _, ref, file, region in self._items.values():
            size = (self._folder / file.name).stat().st_size
            mask = sha256(region) if isinstance(region, pathlib.Path) else region
            digest.update(f"{ref.ref_id} {size} {mask}\n".encode("utf-8", "replace"))
        return digest.hexdigest()


def read_lines(
    expressions: str | os.PathLike[str],
    images: str | os.PathLike[str],
    instances: str | os.PathLike[str] | None = None,
    *,
    name: str,
    val_share: float = VAL_SHARE,
    partial: bool = False,
) -> dict[str, CustomSource]:
    """The splits of a JSON-lines file of expressions.

    Where no line names a split, `val_share` of the images, and one at least, become "val", chosen
    by their names; the rest is "train". Where some do, the other lines are "train".

    Args:
      expressions: the JSON lines.
      images: the folder that holds the images.
      instances: the COCO file that `ann_id` and image ids refer to.
      name: what to call the dataset.
      partial: leave out lines that cannot be used (`faults` lists them), instead of an error.

    Raises:
      UserError: a file is missing or damaged, or lines cannot be used (a few are named).
    """
    path = pathlib.Path(expressions)
    reader = _Reader(pathlib.Path(images), path.parent, instances)
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if line.strip():
            reader.add(f"{path.name}, line {number}", number, lambda line=line: _object(line))
    return reader.splits(name, val_share, partial, path)


def read_entries(
    entries: Iterable[Mapping[str, Any]],
    images: str | os.PathLike[str],
    instances: str | os.PathLike[str],
    *,
    name: str,
    partial: bool = False,
) -> dict[str, CustomSource]:
    """The splits of such lines that were never written; for arguments and errors `read_lines`."""
    path = pathlib.Path(instances)
    reader = _Reader(pathlib.Path(images), path.parent, path)
    for number, entry in enumerate(entries, 1):
        reader.add(f"annotation {entry.get('ann_id')}", number, lambda entry=entry: entry)
    return reader.splits(name, VAL_SHARE, partial, path)


def read_folder(
    root: str | os.PathLike[str],
    *,
    name: str,
    val_share: float = VAL_SHARE,
    partial: bool = False,
) -> dict[str, CustomSource]:
    """The splits of a plain folder; for arguments and errors see `read_lines`."""
    root = pathlib.Path(root)
    images, masks = (_by_key(root / name, _PICTURES) for name in ("images", "masks"))
    texts = _by_key(root / "expressions", (".txt",))

    def entry(stem: str) -> dict[str, Any]:
        if stem not in masks:
            raise UserError(f"there is no mask of that name in {root / 'masks'}")
        if stem not in texts:
            raise UserError(f"there is no {root / 'expressions' / stem}.txt")
        text = root / "expressions" / texts[stem]
        owner = _owner(stem, images)
        if owner is None:
            kinds = ", ".join(_PICTURES)
            raise UserError(f"there is no image of that name in {root / 'images'} (of {kinds})")
        try:
            lines = read_bytes(text).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{text} is not UTF-8 ({error.reason})") from None
        sentences = [line for line in lines if line.strip()]
        if not sentences:
            raise UserError(f"{text} is empty")
        return {"image": images[owner], "mask": masks[stem], "sentences": sentences}

    reader = _Reader(root / "images", root / "masks", None)
    for number, stem in enumerate(sorted(masks.keys() | texts.keys()), 1):
        reader.add(f"region {stem!r}", number, lambda stem=stem: entry(stem))
    return reader.splits(name, val_share, partial, root)


def images_alone(root: str | os.PathLike[str], sources: Mapping[str, CustomSource]) -> list[str]:
    """Names of a plain folder's images that no region of `sources`, all its splits, is of."""
    images = _by_key(pathlib.Path(root) / "images", _PICTURES).values()
    used = {item.image.name for source in sources.values() for item in source._items.values()}
    return [name for name in images if name not in used]


class _Reader:
    """Collects regions and what is wrong with them."""

    def __init__(
        self,
        images: pathlib.Path,
        masks: pathlib.Path,
        instances: str | os.PathLike[str] | None,
    ):
        self._images, self._masks = images, masks
        self._coco = annotations.instance_tables(pathlib.Path(instances)) if instances else None
        self._by_name = {
            record["file_name"]: record
            for record in (self._coco or {"images": {}})["images"].values()
        }
        self._items: list[_Item] = []
        self._faults: list[str] = []
        self._others: list[tuple[str, ImageFile]] = []  # Splits and images of the faulty ones.

    def add(self, where: str, number: int, read) -> None:
        """Takes the region that `read` returns, as an entry of the JSON lines."""
        entry = {}
        try:
            entry = read()
            self._items.append(self._item(where, number, entry))
        except UserError as fault:
            self._faults.append(f"{where}: {fault}")
            if isinstance(split := entry.get("split"), str):
                with contextlib.suppress(UserError):
                    self._others.append((split.strip(), self._file(entry.get("image"))))

    def splits(
        self, name: str, val_share: float, partial: bool, where: pathlib.Path
    ) -> dict[str, CustomSource]:
        """What was collected. UserError: nothing, or some of it cannot be used."""
        if not self._items or (self._faults and not partial):
            more = "; ..." * (len(self._faults) > _FAULTS_SHOWN)
            raise UserError(
                f"{where}: {len(self._faults)} of {len(self._items) + len(self._faults)} regions "
                f"cannot be used: {'; '.join(self._faults[:_FAULTS_SHOWN]) or 'there are none'}"
                f"{more} (mend them, or leave them out with --partial)"
            )
        val: set[str] = set()
        if not any(item.ref.split for item in self._items):
            val = held_out({item.image.name for item in self._items}, val_share)
        parts: dict[str, list[_Item]] = {}
        for item in self._items:
            split = item.ref.split or ("val" if item.image.name in val else "train")
            ref = Ref(**{**vars(item.ref), "split": split})
            parts.setdefault(split, []).append(item._replace(ref=ref))
        sources = {
            s: CustomSource(name, s, self._images, items, (i for of, i in self._others if of == s))
            for s, items in parts.items()
        }
        next(iter(sources.values())).faults = tuple(self._faults)
        return sources

    def _item(self, where: str, number: int, entry: dict[str, Any]) -> _Item:
        unknown = [field for field in entry if field not in _FIELDS]
        if unknown:
            raise UserError(f"unknown field {unknown[0]!r}, known are {', '.join(_FIELDS)}")
        given = [field for field in _REGIONS if field in entry]
        if len(given) != 1:
            raise UserError(f"it has {len(given)} of {', '.join(_REGIONS)}, one is needed")
        image_id, _ = self._record(entry.get("image"))
        split, category = (_text(entry, field) for field in ("split", "category"))
        value, ann_ids = entry[given[0]], (number,)
        if given == ["ann_id"]:
            ann_ids = tuple(value) if isinstance(value, list) else (value,)
            region, shared = self._annotations(ann_ids, image_id)
            category = category or shared
        elif given == ["mask"] and isinstance(value, str):
            region = _inside(self._masks, value, "mask")
        else:
            if _are_points(value) or not (
                isinstance(value, list) and any(isinstance(part, list) for part in value)
            ):
                value = [value]
            region = rle.drawable(
                [
                    [number for point in part for number in point] if _are_points(part) else part
                    for part in value
                ]
            )
        if ann_ids and not region:
            raise UserError(f"its {given[0]} encloses nothing")
        image = self._file(entry["image"], region if isinstance(region, pathlib.Path) else None)
        if given == ["polygon"] and _are_shares(region, image):
            raise UserError(
                "all coordinates of its polygon are between 0 and 1: give pixels, not shares of "
                "the image"
            )
        try:
            rle.check_size(image.height, image.width)
        except ValueError as error:
            raise UserError(str(error)) from None
        said = entry.get("sentences")
        if not (isinstance(said, list) and said and all(isinstance(text, str) for text in said)):
            raise UserError("its 'sentences' are not a list of one or more texts")
        kinds = entry.get("kinds", [""] * len(said))
        if not (isinstance(kinds, list) and len(kinds) == len(said)) or not all(
            isinstance(kind, str) for kind in kinds
        ):
            raise UserError("its 'kinds' are not a list of one text per sentence")
        sentences = tuple(
            Sentence(annotations.clean_text(text, f"sentence {k + 1}"), 1000 * number + k, kind)
            for k, (text, kind) in enumerate(zip(said, kinds, strict=True))
        )
        ref = Ref(number, image_id, ann_ids, category, split, sentences)
        return _Item(where, ref, image, region)

    def _record(self, image: Any) -> tuple[int, dict | None]:
        """An image's id and, where there is a COCO file, its record there."""
        if self._coco is None:
            if not isinstance(image, str):
                raise UserError(f"its image {image!r:.80} is no file name (ids need --instances)")
            digest = hashlib.sha256(self._name(image).encode("utf-8", "replace")).digest()
            return int.from_bytes(digest[:6], "big"), None
        if isinstance(image, str):
            record = self._by_name.get(image)
        else:
            record = self._coco["images"].get(image) if type(image) is int else None
        if record is None:
            raise UserError(f"its image {image!r:.80} is not in the instances file")
        return record["id"], record

    def _file(self, image: Any, mask: pathlib.Path | None = None) -> ImageFile:
        """An image's name and size, which is that of its mask's file where there is one."""
        _, record = self._record(image)
        if record:
            _inside(self._images, record["file_name"], "image")
            return ImageFile(record["file_name"], record["height"], record["width"])
        path = _inside(self._images, image, "image")
        return ImageFile(self._name(image), *_size(mask or path))

    def _name(self, image: str) -> str:
        """The one name of an image's file, which may be written in several ways."""
        return os.path.relpath(self._images / image, self._images)

    def _annotations(self, ids: tuple, image_id: int) -> tuple[list, str]:
        """Parts of all these annotations, and the category that they share, or ""."""
        if self._coco is None and ids:
            raise UserError("its ann_id needs --instances")
        parts, names = [], set()
        for i in ids:
            annotation = self._coco["annotations"].get(i) if type(i) is int else None
            if annotation is None or annotation["image_id"] != image_id:
                raise UserError(f"annotation {i!r:.40} is not one of its image")
            parts += rle.drawable(annotations.segmentation(annotation))
            category = annotation.get("category_id")
            if isinstance(category, int) and category in self._coco["categories"]:
                names.add(self._coco["categories"][category]["name"])
        return parts, names.pop() if len(names) == 1 else ""


def _are_points(value: Any) -> bool:
    """Whether it is a polygon of points [x, y]."""
    return isinstance(value, list) and all(
        isinstance(point, list) and len(point) == 2 for point in value
    )


def _are_shares(region: list, image: ImageFile) -> bool:
    """Whether polygons are written in shares of the image, as some formats have it."""
    numbers = [number for part in region if isinstance(part, list) for number in part]
    fitting = (isinstance(number, int | float) and -0.01 <= number <= 1.01 for number in numbers)
    # Whole numbers may mean the first pixel.
    return all(fitting) and any(n != int(n) for n in numbers) and max(image.height, image.width) > 1


def _object(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise UserError("it is not a JSON object")
    return entry


def _text(entry: Mapping[str, Any], field: str) -> str:
    value = entry.get(field, "")
    if not isinstance(value, str):
        raise UserError(f"its {field!r} is not a text")
    return annotations.clean_text(value, field) if value else ""


def _inside(folder: pathlib.Path, name: str, what: str) -> pathlib.Path:
    """The file of that name, which must lie in the folder."""
    path = folder / name
    if "\0" in name or not pathlib.Path(os.path.normpath(path)).is_relative_to(
        os.path.normpath(folder)
    ):
        raise UserError(f"its {what} {name!r:.80} lies outside {folder}")
    try:
        there = path.is_file()
    except OSError:  # Its name is too long for one.
        there = False
    if not there:
        raise UserError(f"there is no {what} {path}")
    return path


def _by_key(folder: pathlib.Path, kinds: Collection[str]) -> dict[str, str]:
    """Names of the files of these kinds in a folder and those inside it, relative to it.

    Their keys are these names without the suffix, in composed Unicode: two systems may spell one
    name in two ways. Hidden files are passed over.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: images/, masks/ and expressions/ are expected")
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix.lower() not in kinds or any(part.startswith(".") for part in name.parts):
            continue
        key = unicodedata.normalize("NFC", name.with_suffix("").as_posix())
        if key in found:
            raise UserError(f"{folder} has both {found[key]} and {name}: rename one")
        found[key] = str(name)
    return found


def _owner(mask: str, images: Collection[str]) -> str | None:
    """The image that a mask is named after: of several the one of the longest name."""
    ends = [len(mask), *(match.start() for match in re.finditer("[_-]", mask))]
    return max((mask[:end] for end in ends if mask[:end] in images), key=len, default=None)


def _size(path: pathlib.Path) -> tuple[int, int]:
    """(H, W) of a picture, upright."""
    try:
        with Image.open(path) as file:
            turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return (file.width, file.height) if turned else (file.height, file.width)
    except Exception as error:  # Pillow's decoders raise almost anything.
        raise UserError(f"cannot read {path} as an image ({error})") from error


def _read_mask(path: pathlib.Path) -> np.ndarray:
    """bool [H, W]: what is opaque, where some is not; else the pixels that are not 0.

    Where the file's black is not quite 0, as it is compressed with loss, those from 128. Of
    colours any such; of a palette, whose entries are labels, those that are not its black. It is
    turned upright by its own EXIF orientation, as images are.
    """
    try:
        with Image.open(path) as file:
            lossy = file.format in ("JPEG", "MPO", "WEBP")  # Of WebP nothing says whether it is.
            lossy = lossy or "jpeg" in str(file.info.get("compression", ""))
            file = ImageOps.exif_transpose(file)
            if file.has_transparency_data:
                opacity = np.asarray(file.convert("RGBA"))[..., 3]
                if opacity.min() < opacity.max():
                    return opacity >= 128
                file = file.convert("RGB")
            elif file.mode not in ("1", "L", "P", "RGB", "F") and file.mode[0] != "I":
                file = file.convert("RGB")
            pixels = np.asarray(file)
            if file.mode == "P":
                pixels = pixels != _background(file, pixels)
    except Exception as error:  # Pillow's decoders raise almost anything.
        raise UserError(f"cannot read {path} as a mask ({error})") from error
    pixels = pixels >= 128 if lossy and pixels.dtype == np.uint8 else pixels != 0
    return pixels.reshape(*pixels.shape[:2], -1).any(axis=2)


def _background(image: Image.Image, labels: np.ndarray) -> int:
    """The entry of a palette that is no region: black where one that is used is, else 0."""
    colours = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
    black = [i for i in np.unique(labels) if i < len(colours) and not colours[i].any()]
    return int(black[0]) if black and 0 not in black else 0


def held_out(names: Collection[str], share: float) -> set[str]:
    """That share of the names, by their hashes; neither none nor all of them."""
    ranked = sorted(
        names, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest()
    )
    return set(ranked[: min(max(1, round(share * len(ranked))), len(ranked) - 1)])
