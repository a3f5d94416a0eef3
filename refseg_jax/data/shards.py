"""Prepared datasets: ArrayRecord shards with one record per image, and an index to them.

<root>/index.array_record                     what `PreparedSource` opens: all but images and masks
<root>/images-00000-of-00078.array_record     an image with its masks and expressions per record
<root>/manifest.json                          for people: counts, checksums, source, licence

Every record is msgpack, which holds plain data only. `prepare.py` writes them. The root may be a
`gs://` folder, which ArrayRecord reads by itself.

An image's record is {name, height, width, image: the encoded picture, refs}, a ref {split, ref_id,
image_id, ann_ids, category, sentences: [[sent_id, text, kind], ...], mask: `rle.encode`d}. The
index's records are a header {format, version, dataset, split_by, shards: [[file, records], ...],
splits: [name, ...], text_field: "raw", "sent", or "" where there is one text alone, left_out:
[[split, name, height, width], ...], images of refs that are not here}, the images [[name, height,
width], ...] in the order of the shards, and for each split its refs [[ref_id, image_id, ann_ids,
category, sentences, number of the image, number of the ref in the image's record], ...] in the
order of the dataset.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from refseg_jax.data import rle
from refseg_jax.data.records import ImageFile, Ref, RefList, Sentence
from refseg_jax.data.refer import warn_if_partial
from refseg_jax.data.transforms import read_image
from refseg_jax.errors import UserError

INDEX = "index.array_record"
MANIFEST = "manifest.json"
PLAN = "plan.json"  # There while a preparation is not finished.
FORMAT, VERSION = "refseg_jax", 2


@dataclasses.dataclass(frozen=True)
class Header:
    """The head of an index: which dataset it is, its shards (file, records) and splits.

    `text_field`: which of two texts its sentences are, "raw" or "sent", or "". `left_out`: (split,
    name, height, width) of images of refs that could not be used.
    """

    dataset: str
    split_by: str
    shards: tuple[tuple[str, int], ...]
    splits: tuple[str, ...]
    text_field: str = ""
    left_out: tuple[tuple[str, str, int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Shard:
    """How ArrayRecord is told the length of a file that it need not open for that."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


class PreparedSource(RefList):
    """One split of a prepared dataset; `records.FileSource` says what it offers.

    It has the samples of the source that was prepared, in the same order.

    Raises:
      UserError: there is no prepared dataset at `root`, it is damaged, of another version, or has
        no such split.
    """

    def __init__(self, root: str | os.PathLike[str], split: str):
        self._root = os.fspath(root).rstrip("/")
        header = read_header(self._root)
        if split not in header.splits:
            raise UserError(
                f"{self._root} has no split {split!r}, it has {', '.join(header.splits)}"
            )
        images, entries = _index(self._root, (1, 2 + header.splits.index(split)))
        with _blaming(f"{self._root}/{INDEX}"):
            self._files = tuple(ImageFile(*_typed(image, (str, int, int))) for image in images)
            if not images or sum(count for _, count in header.shards) != len(images):
                raise ValueError("it lists other images than its shards hold")
            refs = [_ref(entry[:5], split) for entry in entries]
            # For every ref its image's number, and its own in the image's record.
            places = (tuple(_typed(entry[5:], (int, int))) for entry in entries)
            self._places = dict(zip(refs, places, strict=True))
            if not all(0 <= image < len(self._files) for image, _ in self._places.values()):
                raise ValueError("a ref lies on no image")
        self._shards = header.shards
        self._local = threading.local()
        self._open()
        others = (ImageFile(*image) for of, *image in header.left_out if of == split)
        super().__init__(header.dataset, split, refs, other_images=others)
        warn_if_partial(self, header.split_by)

    def _open(self) -> None:
        paths = [_Shard(f"{self._root}/{name}", count) for name, count in self._shards]
        self._data = ArrayRecordDataSource([path for path in paths if path.take])

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        del state["_local"], state["_data"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._local = threading.local()
        self._open()

    def image(self, ref: Ref) -> np.ndarray:
        """uint8 [H, W, 3], RGB. UserError: the shard is gone or damaged."""
        file = self.image_file(ref)
        return read_image(self.image_bytes(ref), (file.height, file.width), self._where(ref))

    def image_file(self, ref: Ref) -> ImageFile:
        return self._files[self._places[ref][0]]

    def image_bytes(self, ref: Ref) -> bytes:
        """The encoded picture. UserError: the shard is gone or damaged."""
        return self._record(ref)["image"]

    def image_place(self, ref: Ref) -> str:
        return self._where(ref)

    def fingerprint(self) -> str:
        """Changes when anything prepared does. UserError: the manifest is gone."""
        try:
            return hashlib.sha256(epath.Path(self._root, MANIFEST).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"cannot read {self._root}/{MANIFEST}: fetch it again") from error

    def mask(self, ref: Ref) -> np.ndarray:
        """bool [H, W]. UserError: the shard is gone or damaged."""
        file = self.image_file(ref)
        with _blaming(self._where(ref)):
            entry = self._record(ref)["refs"][self._places[ref][1]]
            fields = ("ref_id", "image_id", "ann_ids", "category", "sentences")
            if _ref([entry[field] for field in fields], entry["split"]) != ref:
                raise ValueError("it belongs to another index")
            return rle.decode(entry["mask"], file.height, file.width)

    def _where(self, ref: Ref) -> str:
        number = self._places[ref][0]
        for name, count in self._shards:
            if number < count:
                return f"{self._root}/{name} (record {number}, {self.image_file(ref).name})"
            number -= count
        raise IndexError(number)

    def _record(self, ref: Ref) -> dict[str, Any]:
        """The record of a ref's image; the last one of every thread is kept, for its mask."""
        number = self._places[ref][0]
        if getattr(self._local, "number", None) != number:
            with _blaming(self._where(ref)):
                record = _unpack(self._data[number])
                if (record["name"], type(record["image"])) != (self._files[number].name, bytes):
                    raise ValueError("it belongs to another index")
            self._local.number, self._local.record = number, record
        return self._local.record


def pack(value: Any) -> bytes:
    """Plain data -> msgpack, the same bytes for equal data. ValueError: it is not plain."""
    try:
        return msgpack.packb(value)
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error


def index_records(
    header: Header, images: Iterable[ImageFile], splits: Iterable[list[tuple[Ref, int, int]]]
) -> Iterator[bytes]:
    """The records of an index; `splits`: per split, refs with their image's number and place."""
    yield pack({"format": FORMAT, "version": VERSION, **dataclasses.asdict(header)})
    yield pack([dataclasses.astuple(image) for image in images])
    for refs in splits:
        yield pack([[*ref_fields(ref).values(), *place] for ref, *place in refs])


def ref_fields(ref: Ref) -> dict[str, Any]:
    """A ref as plain data, but for its split."""
    return {
        "ref_id": ref.ref_id,
        "image_id": ref.image_id,
        "ann_ids": ref.ann_ids,
        "category": ref.category,
        "sentences": [[s.sent_id, s.text, s.kind] for s in ref.sentences],
    }


def merged_sets(root: str) -> list[str]:
    """The sets that a prepared one was merged from; [] for others, and where nothing says so."""
    try:
        sets = json.loads(epath.Path(root, MANIFEST).read_text())["source"]["sets"]
        return _typed(sets, (str,) * len(sets))
    except (OSError, ValueError, TypeError, KeyError):
        return []


def read_header(root: str) -> Header:
    """The head of a prepared dataset's index.

    Raises:
      UserError: there is none, or it is damaged or of another version.
    """
    (fields,) = _index(root, (0,))
    where = f"{root}/{INDEX}"
    with _blaming(where):
        if fields["format"] != FORMAT or fields["version"] != VERSION:
            raise UserError(
                f"{where} is of version {fields['version']!r} of {fields['format']!r}, this "
                f"library reads version {VERSION} of {FORMAT!r}: prepare the data again"
            )
        shards = tuple(tuple(_typed(shard, (str, int))) for shard in fields["shards"])
        if any("/" in name or count < 0 for name, count in shards):
            raise ValueError("it names a shard that cannot be")
        left_out = (_typed(image, (str, str, int, int)) for image in fields["left_out"])
        names = [fields[name] for name in ("dataset", "split_by", "text_field")]
        _typed([*names, *fields["splits"]], (str,) * (3 + len(fields["splits"])))
        dataset, split_by, text_field = names
        header = Header(
            *(dataset, split_by, shards, tuple(fields["splits"])),
            *(text_field, tuple(map(tuple, left_out))),
        )
    return header


def is_prepared(root: str) -> bool:
    """Whether a prepared dataset lies at `root`: a folder, or a gs:// address.

    Raises:
      UserError: its preparation has not been finished, or the address cannot be read.
    """
    if "://" not in root:
        if os.path.exists(f"{root}/{PLAN}"):
            raise UserError(
                f"{root} holds a preparation that is not finished: run "
                "`python -m refseg_jax.data.prepare` again as before"
            )
        return os.path.exists(f"{root}/{INDEX}")
    try:
        ArrayRecordReader(f"{root}/{INDEX}").close()
    except RuntimeError as error:
        if "404" in str(error) or "not found" in str(error).lower():
            return False
        raise UserError(f"cannot read {root}/{INDEX}: {_first_line(error)}") from error
    return True


def _index(root: str, numbers: tuple[int, ...]) -> list[Any]:
    """Records of an index."""
    path = f"{root}/{INDEX}"
    try:
        reader = ArrayRecordReader(path)
        try:
            records = reader.read(list(numbers))
        finally:
            reader.close()
    # ArrayRecord raises either, for any fault.
    except (RuntimeError, IndexError) as error:
        raise UserError(
            f"cannot read {path}: {_first_line(error)} (prepare it with "
            "`python -m refseg_jax.data.prepare`, or fetch it again)"
        ) from error
    with _blaming(path):
        return [_unpack(record) for record in records]


def _unpack(record: bytes) -> Any:
    return msgpack.unpackb(record, strict_map_key=True)


@contextlib.contextmanager
def _blaming(where: str) -> Iterator[None]:
    """Turns whatever goes wrong with what a file holds into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{where} is damaged or not ours ({type(error).__name__}: {_first_line(error)}): "
            "fetch it again, or run `python -m refseg_jax.data.prepare` again"
        ) from error


def _typed(values: list, kinds: tuple[type, ...]) -> list:
    """`values`, made sure to be of these types."""
    if [type(value) for value in values] != list(kinds):
        raise ValueError(f"{values!r:.80} is not what belongs here")
    return values


def _ref(fields: list, split: str) -> Ref:
    """The inverse of `ref_fields`."""
    ref_id, image_id, ann_ids, category, sentences = fields
    _typed([ref_id, image_id, category, *ann_ids], (int, int, str, *(int for _ in ann_ids)))
    return Ref(
        ref_id,
        image_id,
        tuple(ann_ids),
        category,
        split,
        tuple(
            Sentence(text, sent_id, kind)
            for sent_id, text, kind in (_typed(s, (int, str, str)) for s in sentences)
        ),
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
