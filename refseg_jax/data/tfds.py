"""TensorFlow Datasets' `ref_coco` as it was built, read without TensorFlow.

<root>/dataset_info.json
<root>/ref_coco-train.tfrecord-00000-of-00016       (or .array_record-)

<root> is the folder of a version, .../ref_coco/refcoco_unc/1.1.0. Version 1.0.0 has no masks. What
the builder does not keep is made up: an image's name from its COCO number, a ref's number is its
annotation's, and categories have no names.
"""

import io
import itertools
import pathlib
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from refseg_jax.data import annotations
from refseg_jax.data.records import ImageFile, Ref, RefList, Sentence
from refseg_jax.data.refer import warn_if_partial
from refseg_jax.data.transforms import read_image
from refseg_jax.errors import UserError

VERSION = "1.1.0"
_DATASETS = {"refcocoplus": "refcoco+"}
_SPLITS = {"validation": "val"}
_HEAD = struct.Struct("<QI")  # TFRecord: length and its checksum before the record,
_FOOT = struct.Struct("<I")  # the record's checksum after it.
_FAULTS_SHOWN = 5


class _Place(NamedTuple):
    """Where a record is: byte and length in a TFRecord file, or number in an ArrayRecord one."""

    path: pathlib.Path
    start: int
    length: int


class TfdsSource(RefList):
    """One split of a built `ref_coco`; `records.FileSource` says what it offers.

    `partial`: leave out refs that cannot be used (`faults` lists them), where that is an error.

    Raises:
      UserError: a file is damaged or holds something else, or refs cannot be used.
    """

    def __init__(
        self,
        dataset: str,
        split_by: str,
        split: str,
        paths: list[pathlib.Path],
        partial: bool = False,
    ):
        refs: list[Ref] = []
        faults: list[str] = []
        self._places: dict[int, _Place] = {}
        self._files: dict[int, ImageFile] = {}
        self._masks: dict[int, int] = {}  # Of a ref: the number of its mask in the record.
        for path in paths:
            for place in _places(path):
                try:
                    features = _features(place)
                    (image_id,) = features["image/id"].int64_list.value
                    with Image.open(io.BytesIO(_picture(features))) as picture:
                        size = picture.height, picture.width
                    found = _refs(features, image_id, split, faults)
                except UserError:
                    raise
                except Exception as error:  # Damage shows in almost any way.
                    raise UserError(
                        f"record {len(self._places)} of {split} in {path} is damaged or not "
                        f"ref_coco's ({type(error).__name__}: {error}): build it again"
                    ) from error
                self._places[image_id] = place
                self._files[image_id] = ImageFile(f"COCO_train2014_{image_id:012d}.jpg", *size)
                self._masks |= {ref.ref_id: k for k, ref in found.items()}
                refs += found.values()
        if faults and not (partial and refs):
            raise UserError(
                f"{len(faults)} refs of split {split!r} cannot be used: "
                f"{'; '.join(faults[:_FAULTS_SHOWN])}{'; ...' * (len(faults) > _FAULTS_SHOWN)}"
                + ("" if partial else " (leave them out with --partial)")
            )
        used = {ref.image_id for ref in refs}
        others = (file for image_id, file in self._files.items() if image_id not in used)
        super().__init__(dataset, split, refs, faults, others)
        self.num_images = len(self._files)
        warn_if_partial(self, split_by)

    def image(self, ref: Ref) -> np.ndarray:
        """uint8 [H, W, 3], RGB. UserError: it is damaged."""
        file = self.image_file(ref)
        return read_image(self.image_bytes(ref), (file.height, file.width), file.name)

    def image_file(self, ref: Ref) -> ImageFile:
        return self._files[ref.image_id]

    def image_bytes(self, ref: Ref) -> bytes:
        """The encoded picture."""
        return _picture(_features(self._places[ref.image_id]))

    def image_place(self, ref: Ref) -> str:
        return str(self._places[ref.image_id])

    def mask(self, ref: Ref) -> np.ndarray:
        """bool [H, W]. UserError: it cannot be decoded."""
        masks = _features(self._places[ref.image_id])["objects/mask"].bytes_list.value
        try:
            with Image.open(io.BytesIO(masks[self._masks[ref.ref_id]])) as picture:
                mask = np.asarray(picture) != 0
                # Masks that a build was given as arrays have three channels.
                return mask.reshape(*mask.shape[:2], -1).any(axis=2)
        except Exception as error:  # Pillow's decoders raise almost anything.
            raise UserError(f"the mask of annotation {ref.ref_id} is damaged ({error})") from error


def open_built(
    root: str, partial: bool = False
) -> tuple[str, str, dict[str, TfdsSource], list[pathlib.Path]]:
    """(dataset, split_by, its splits, the files that describe it) of a built `ref_coco`.

    `partial`: see `TfdsSource`.

    Raises:
      UserError: that is not such a folder, its version has no masks, or files are missing,
        damaged or do not hold as many records as they should.
    """
    folder = pathlib.Path(root).expanduser().absolute()
    info_path = folder / "dataset_info.json"
    info = annotations.read(info_path)
    try:
        name, version = info["name"], info["version"]
        lengths = {s["name"]: [int(n) for n in s["shardLengths"]] for s in info["splits"]}
        config = info.get("configName") or folder.parent.name
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{info_path} does not describe a dataset ({error!r})") from error
    dataset, _, split_by = config.rpartition("_")
    if name != "ref_coco" or not dataset:
        raise UserError(
            f"{folder} holds {name!r}: give the folder of a version of ref_coco, such as "
            ".../ref_coco/refcoco_unc/1.1.0"
        )
    if version != VERSION:
        raise UserError(
            f"{folder} is version {version} of ref_coco, of which only {VERSION} is known to have "
            "masks: build that one"
        )
    dataset = _DATASETS.get(dataset, dataset)
    sources = {}
    for built, counts in lengths.items():
        paths = sorted(folder.glob(f"ref_coco-{built}.*-?????-of-{len(counts):05d}"))
        if len(paths) != len(counts):
            raise UserError(
                f"{folder} has {len(paths)} of the {len(counts)} files of {built}: build it again"
            )
        split = _SPLITS.get(built, built)
        sources[split] = TfdsSource(dataset, split_by, split, paths, partial)
        if sources[split].num_images != sum(counts):
            raise UserError(
                f"{folder} has {sources[split].num_images} of the {sum(counts)} images of {built}: "
                "build it again"
            )
    return dataset, split_by, sources, [info_path]


def _places(path: pathlib.Path) -> Iterator[_Place]:
    """Where the records of a file are. UserError: it is cut off, or of another format."""
    if ".array_record-" in path.name:
        try:
            reader = ArrayRecordReader(str(path))
            count = reader.num_records()
            reader.close()
        except RuntimeError as error:
            raise UserError(f"cannot read {path}: {error}".splitlines()[0]) from error
        yield from (_Place(path, number, 0) for number in range(count))
        return
    if ".tfrecord-" not in path.name:
        raise UserError(f"{path} is neither a tfrecord nor an array_record file: convert it")
    end, position = path.stat().st_size, 0
    with open(path, "rb") as file:
        while position < end:
            head = file.read(_HEAD.size)
            start = position + _HEAD.size
            length, check = _HEAD.unpack(head) if len(head) == _HEAD.size else (end, 0)
            position = start + length + _FOOT.size
            if position > end or check != _checksum(head[:8]):
                raise UserError(f"{path} is cut off or damaged: build it again")
            yield _Place(path, start, length)
            file.seek(position)


def _features(place: _Place) -> Mapping[str, Any]:
    """The features of a tf.train.Example by name."""
    # Here, since it takes seconds and only this reader needs it.
    from tensorflow_datasets.proto import tf_example_pb2

    if place.length:
        with open(place.path, "rb") as file:
            file.seek(place.start)
            record = file.read(place.length)
            (check,) = _FOOT.unpack(file.read(_FOOT.size))
        if check != _checksum(record):
            raise UserError(f"{place.path}, byte {place.start}: it is damaged: build it again")
    else:
        reader = ArrayRecordReader(str(place.path))
        (record,) = reader.read([place.start])
        reader.close()
    return tf_example_pb2.Example.FromString(record).features.feature


def _checksum(data: bytes) -> int:
    """TFRecord's: a CRC-32C, turned by 15 bits, and a constant added."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _picture(features: Mapping[str, Any]) -> bytes:
    (picture,) = features["image"].bytes_list.value
    return picture


def _refs(
    features: Mapping[str, Any], image_id: int, split: str, faults: list[str]
) -> dict[int, Ref]:
    """The refs of one image by their objects' numbers there; `faults` gets what cannot be used.

    What is a list of lists is stored flat, with the lists' lengths.
    """
    sentences = zip(
        features["objects/refexp/raw/ragged_flat_values"].bytes_list.value,
        features["objects/refexp/refexp_id/ragged_flat_values"].int64_list.value,
        strict=True,
    )
    ann_ids = features["objects/id"].int64_list.value
    lengths = features["objects/refexp/raw/ragged_row_lengths_0"].int64_list.value
    if len(features["objects/mask"].bytes_list.value) != len(ann_ids):
        raise ValueError("it has not as many masks as objects")
    refs = {}
    for k, (ann_id, length) in enumerate(zip(ann_ids, lengths, strict=True)):
        said = [(text.decode(), i) for text, i in itertools.islice(sentences, length)]
        if not said:
            raise ValueError("its expressions do not fit its objects")
        try:
            texts = [(annotations.clean_text(text, f"sentence {i}"), i) for text, i in said]
        except UserError as fault:
            faults.append(f"ref {ann_id}: {fault}")
            continue
        spoken = tuple(Sentence(text, i) for text, i in texts)
        refs[k] = Ref(ann_id, image_id, (ann_id,), "", split, spoken)
    if next(sentences, None):
        raise ValueError("its expressions do not fit its objects")
    return refs
