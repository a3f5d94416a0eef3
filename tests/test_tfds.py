"""`ref_coco` as TensorFlow Datasets built it.

The files in golden/ref_coco were written by TensorFlow Datasets 4.9.10's own builder, version
1.1.0, as RefCOCOg (google), from `shapes.write_refer(num_scenes={"train": 2, "val": 1}, size=48)`.
"""

import io
import json
import pathlib
import shutil
import struct
import sys

import numpy as np
import pytest
import tensorflow_datasets
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from refseg_jax.data import inspect, sets, shapes, tfds
from refseg_jax.data.shards import PreparedSource
from refseg_jax.errors import UserError
from tests import preparing

BUILT = pathlib.Path(__file__).parent / "golden" / "ref_coco" / "refcocog_google" / "1.1.0"
SPLITS = {"train": 2, "val": 1}


@pytest.fixture
def built(tmp_path):
    return pathlib.Path(shutil.copytree(BUILT, tmp_path / "refcocog_google" / "1.1.0"))


def as_array_records(folder):
    for path in list(folder.glob("*.tfrecord-*")):
        writer = ArrayRecordWriter(str(path).replace("tfrecord", "array_record"), "group_size:1")
        for place in tfds._places(path):
            writer.write(path.read_bytes()[place.start : place.start + place.length])
        writer.close()
        path.unlink()


@pytest.mark.parametrize("form", ["tfrecord", "array_record"])
def test_a_built_dataset_is_what_it_was_built_from(built, form):
    if form == "array_record":
        as_array_records(built)
    dataset, split_by, sources, _ = tfds.open_built(str(built))
    assert (dataset, split_by, list(sources)) == ("refcocog", "google", list(SPLITS))
    for split, scenes in SPLITS.items():
        drawn = shapes.ShapesSource(split, num_scenes=scenes, size=48)
        expected = {drawn[i].ann_ids: drawn[i] for i in range(len(drawn))}
        source = sources[split]
        assert (len(source), source.num_sentences) == (len(drawn), drawn.num_sentences)
        for i in range(len(source)):
            ref = source[i]
            original = expected.pop(ref.ann_ids)
            assert ref.image_id == original.image_id and ref.split == split
            # The builder sorts sentences by number, and so does the drawn data.
            assert [(s.text, s.sent_id) for s in ref.sentences] == [
                (s.text, s.sent_id) for s in original.sentences
            ]
            np.testing.assert_array_equal(source.image(ref), drawn.image(original))
            np.testing.assert_array_equal(source.mask(ref), drawn.mask(original))
            assert source.image_file(ref).name == f"COCO_train2014_{ref.image_id:012d}.jpg"
        assert not expected


def test_the_library_s_own_reader_agrees(tmp_path):
    """`as_data_source`, without TensorFlow, of the same records as ArrayRecord."""
    folder = tmp_path / "ref_coco" / "refcocog_google" / "1.1.0"
    shutil.copytree(BUILT, folder)
    as_array_records(folder)
    spoil_info(fileFormat="array_record")(folder)
    _, _, sources, _ = tfds.open_built(str(folder))
    builder = tensorflow_datasets.builder(
        "ref_coco/refcocog_google", data_dir=tmp_path, file_format="array_record"
    )
    for split, theirs in (("train", "train"), ("val", "validation")):
        source = sources[split]
        refs = iter([source[i] for i in range(len(source))])
        for example in builder.as_data_source(theirs):
            objects = example["objects"]
            for k, ann_id in enumerate(objects["id"]):
                ref = next(refs)
                assert (ref.ann_ids, ref.image_id) == ((int(ann_id),), int(example["image/id"]))
                said = objects["refexp"]["raw"][k]
                assert [s.text for s in ref.sentences] == [text.decode() for text in said]
                np.testing.assert_array_equal(source.image(ref), example["image"])
                np.testing.assert_array_equal(source.mask(ref), objects["mask"][k][..., 0] > 0)
        assert next(refs, None) is None
    assert "tensorflow" not in sys.modules


def test_it_is_prepared(built, tmp_path, capsys):
    arguments = ("tfds", "--root", built, "--out", tmp_path / "out", "--workers", 1)
    assert preparing.run(*arguments) == 0
    assert "train has 6 of 44822 refs, 2 of 24698 images; val has" in capsys.readouterr().err
    with pytest.raises(UserError, match="the texts 'raw' of its sentences, not 'sent'"):
        sets.open_set(str(tmp_path / "out"), sets.ANY, text_field="sent")
    _, _, sources, _ = tfds.open_built(str(built))
    for split, source in sources.items():
        preparing.assert_same_source(PreparedSource(tmp_path / "out", split), source)


def spoil_info(**changes):
    def spoil(folder):
        path = folder / "dataset_info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def train_file(folder):
    return folder / "ref_coco-train.tfrecord-00000-of-00001"


def cut_off(folder):
    train_file(folder).write_bytes(train_file(folder).read_bytes()[:-9])


def one_record_less(folder):
    path = train_file(folder)
    path.write_bytes(path.read_bytes()[: next(tfds._places(path)).length + 16])


def damaged(folder):
    path = train_file(folder)
    data = bytearray(path.read_bytes())
    data[14:40] = bytes(26)
    path.write_bytes(data)


def one_bit_turned(folder):
    path = train_file(folder)
    data = bytearray(path.read_bytes())
    data[data.index(b"object") + 1] ^= 1
    path.write_bytes(data)


def a_length_changed(folder):
    path = train_file(folder)
    data = bytearray(path.read_bytes())
    data[8] ^= 1  # In the length's checksum.
    path.write_bytes(data)


def another_record(folder):
    rewrite(folder, lambda record: b"")


def rewrite(folder, change):
    """The training file anew, with `change`d records and the checksums that belong to them."""
    path = train_file(folder)
    data, whole = path.read_bytes(), b""
    for place in tfds._places(path):
        record = change(data[place.start : place.start + place.length])
        head = struct.pack("<Q", len(record))
        whole += head + struct.pack("<I", tfds._checksum(head)) + record
        whole += struct.pack("<I", tfds._checksum(record))
    path.write_bytes(whole)


def edited(change):
    """A change of records: `change(features)` of each, in place."""
    from tensorflow_datasets.proto import tf_example_pb2

    def changed(record):
        example = tf_example_pb2.Example.FromString(record)
        change(example.features.feature)
        return example.SerializeToString()

    return changed


def test_masks_may_have_three_channels(built):
    source = tfds.open_built(str(built))[2]["train"]
    expected = [source.mask(ref) for ref in source]

    def in_colour(features):
        masks = features["objects/mask"].bytes_list.value
        for k, mask in enumerate(masks):
            picture = io.BytesIO()
            Image.open(io.BytesIO(mask)).convert("RGB").save(picture, "png")
            masks[k] = picture.getvalue()

    rewrite(built, edited(in_colour))
    source = tfds.open_built(str(built))[2]["train"]
    np.testing.assert_array_equal([source.mask(ref) for ref in source], expected)


def test_a_ref_that_cannot_be_used_is_left_out_on_request(built, tmp_path, capsys):
    def blank(features):
        features["objects/refexp/raw/ragged_flat_values"].bytes_list.value[0] = b" "

    whole = list(tfds.open_built(str(built))[2]["train"])

    def all_blank(features):
        texts = features["objects/refexp/raw/ragged_flat_values"].bytes_list.value
        texts[:] = [b" "] * len(texts)

    rewrite(built, edited(blank))
    with pytest.raises(UserError, match=r"2 refs of split 'train' .*: ref \d+: sentence .* empty"):
        tfds.open_built(str(built))
    source = tfds.open_built(str(built), partial=True)[2]["train"]
    assert len(source.faults) == 2 and len(source) == len(whole) - 2
    assert set(source) < set(whole)
    for ref in source:
        assert source.mask(ref).any()
    arguments = ("tfds", "--root", built, "--out", tmp_path / "out", "--workers", 1, "--partial")
    assert preparing.run(*arguments) == 0 and capsys.readouterr().err.count("left out: ") == 2
    assert inspect.main(["tfds", "--root", str(built), "--out", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.count(" is empty\n") == 2
    once = iter([edited(all_blank), lambda record: record])
    rewrite(built, lambda record: next(once)(record))
    source = tfds.open_built(str(built), partial=True)[2]["train"]
    first = f"COCO_train2014_{whole[0].image_id:012d}.jpg"
    assert [file.name for file in source.other_images] == [first]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_info(version="1.0.0"), "version 1.0.0 of ref_coco, of which only 1.1.0"),
        (spoil_info(name="coco"), "holds 'coco': give the folder of a version of ref_coco"),
        (spoil_info(splits=[{"name": "train"}]), "dataset_info.json does not describe"),
        (lambda folder: (folder / "dataset_info.json").unlink(), "dataset_info.json"),
        (lambda folder: train_file(folder).unlink(), "has 0 of the 1 files of train"),
        (cut_off, "train.*is cut off or damaged"),
        (one_record_less, "has 1 of the 2 images of train"),
        (damaged, "train.*, byte 12: it is damaged"),
        (a_length_changed, "train.* is cut off or damaged"),
        (one_bit_turned, "train.*, byte 12: it is damaged"),
        (another_record, "record 0 of train in .* is damaged or not ref_coco's"),
    ],
)
def test_what_cannot_be_read_is_named(built, spoil, message):
    spoil(built)
    with pytest.raises(UserError, match=message):
        tfds.open_built(str(built))
