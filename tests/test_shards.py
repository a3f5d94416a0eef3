"""Prepared data reads back as the very data it was prepared from, from disk and from gs://."""

import http.server
import pathlib
import pickle
import re
import shutil
import threading
import urllib.parse

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from refseg_jax.data import open_source, sets, shapes, shards
from refseg_jax.data.pipeline import EvalBatches, TrainBatches, train_iterator
from refseg_jax.data.shards import PreparedSource
from refseg_jax.errors import UserError
from tests import preparing, tiny


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return preparing.write_shapes(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "shapes_unc"
    arguments = ("--out", out, "--images_per_shard", 4, "--workers", 1)
    assert preparing.run("refer", "--root", raw, "--dataset", "shapes", *arguments) == 0
    return out


def batches(source, tokenizer, workers=0):
    """Training batches of both samplings over three epochs, and all evaluation batches."""
    settings = dict(image_size=32, max_tokens=12, batch_size=4)
    found = []
    for sampling in ("sentence", "ref"):
        steps = 3 * source.num_sentences // 4
        made = TrainBatches(
            source, tokenizer, num_steps=steps, seed=5, sampling=sampling, **settings
        )
        found += list(train_iterator(made, workers=workers))
    return found + list(train_iterator(EvalBatches(source, tokenizer, **settings)))


def assert_same_batches(source, other, tokenizer, workers=0):
    ours, theirs = (batches(s, tokenizer, w) for s, w in ((source, 0), (other, workers)))
    assert len(ours) == len(theirs)
    for batch, expected in zip(ours, theirs, strict=True):
        assert batch.keys() == expected.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], expected[key])


@pytest.mark.parametrize("split", preparing.SCENES)
def test_prepared_data_is_the_raw_data(raw, prepared, split):
    expected = preparing.refer_sources(raw, "shapes")[split]
    source = PreparedSource(prepared, split)
    preparing.assert_same_source(source, expected)
    workers = 1 if split == "val" else 0  # The workers' source has been pickled.
    assert_same_batches(expected, source, shapes.tokenizer(), workers)


def test_real_photographs_prepared_are_the_raw_ones(test_data, tmp_path):
    root = test_data / "data" / "refcoco_smoke"
    arguments = ("--partial", "--images_per_shard", 6, "--workers", 1)
    assert preparing.run("refer", "--root", root, "--out", tmp_path / "out", *arguments) == 0
    for split, expected in preparing.refer_sources(root, "refcoco").items():
        source = PreparedSource(tmp_path / "out", split)
        preparing.assert_same_source(source, expected)
    assert_same_batches(source, expected, shapes.tokenizer())


def test_an_image_is_stored_once(raw, prepared):
    manifest = preparing.manifest(prepared)
    assert [shard["records"] for shard in manifest["shards"]] == [4, 2]
    seen = []
    for shard in manifest["shards"]:
        reader = ArrayRecordReader(str(prepared / shard["file"]))
        for data in reader.read_all():
            record = msgpack.unpackb(data)
            seen.append(record["name"])
            path = raw / "images" / "mscoco" / "train2014" / record["name"]
            assert record["image"] == path.read_bytes()
            assert [len(entry["sentences"]) for entry in record["refs"]] == [3, 3, 3]
    assert len(set(seen)) == len(seen) == 6


def test_configs_open_raw_and_prepared_data_alike(raw, prepared):
    config = tiny.config("refcoco").data
    config.update(dataset="shapes", split_by="unc")
    # `shapes` is drawn; under another name the same files are read.
    config.dataset = "mine"
    shutil.copytree(raw / "shapes", raw / "mine", dirs_exist_ok=True)
    config.root = str(raw)
    expected = open_source(config, "val")
    assert expected.name == "mine"
    config.update(dataset="prepared", split_by="", root=str(prepared))
    source = open_source(config, "val")
    assert [source[i] for i in range(len(source))] == [expected[i] for i in range(len(expected))]
    for root in (prepared, prepared.parent):
        found = sets.open_set(str(root), "shapes_unc", ["val"])["val"]
        assert isinstance(found, PreparedSource)
    with pytest.raises(UserError, match="holds the prepared set shapes_unc, not refcoco_unc"):
        sets.open_set(str(prepared), "refcoco_unc")
    config.root = str(raw.parent / "nowhere")
    with pytest.raises(UserError, match="no prepared set at .*nowhere.*refseg_jax.data.prepare"):
        open_source(config, "val")
    with pytest.raises(UserError, match="has no split 'test', it has train, val"):
        PreparedSource(prepared, "test")


def test_texts_are_those_that_are_asked_for_or_it_is_an_error(raw, tmp_path):
    for field in ("raw", "sent"):
        assert preparing.run(
            "refer", "--root", raw, "--dataset", "shapes", "--out", tmp_path / field / "shapes_unc",
            "--text_field", field, "--workers", 1,
        ) == 0  # fmt: skip
        root = str(tmp_path / field)
        other = {"raw": "sent", "sent": "raw"}[field]
        with pytest.raises(UserError, match=f"{field!r} of its sentences, not {other!r}: set"):
            sets.open_set(root, "shapes_unc", text_field=other)
        expected = preparing.refer_sources(raw, "shapes", text_field=field)["val"]
        for asked in (field, None):
            source = sets.open_set(root, "shapes_unc", ["val"], text_field=asked)["val"]
            preparing.assert_same_source(source, expected)


def test_a_folder_with_another_set_s_name_is_not_taken_for_it(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "refcoco_unc")
    with pytest.raises(UserError, match="refcoco_unc holds the prepared set shapes_unc"):
        sets.open_set(str(tmp_path), "refcoco_unc")
    shutil.copytree(prepared, tmp_path / "drawn")  # A name of one's own may be any.
    assert list(sets.open_set(str(tmp_path), "drawn")) == ["train", "val"]


def test_an_unfinished_preparation_is_not_read(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    (copy / shards.PLAN).write_text("{}")
    with pytest.raises(UserError, match="preparation that is not finished"):
        sets.open_set(str(copy), "shapes_unc")


def test_a_source_survives_pickling_and_holds_no_open_files(prepared):
    source = PreparedSource(prepared, "val")
    source.image(source[0])
    preparing.assert_same_source(pickle.loads(pickle.dumps(source)), source)


def damage(path, record_number, change):
    """Rewrites one record of a file, unpacked; the file itself stays sound."""
    reader = ArrayRecordReader(str(path))
    records = list(reader.read_all())
    reader.close()
    value = msgpack.unpackb(records[record_number])
    records[record_number] = msgpack.packb(change(value) or value)
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()


INDEX_DAMAGE = {
    "version": (0, lambda v: v.update(version=1)),
    "format": (0, lambda v: v.update(format="other")),
    "no dataset": (0, lambda v: v.pop("dataset") and None),
    "not a dict": (0, lambda v: [1]),
    "shard path": (0, lambda v: v["shards"][0].__setitem__(0, "../../etc/passwd")),
    "shard count": (0, lambda v: v["shards"][0].__setitem__(1, 3)),
    "negative": (0, lambda v: v["shards"][0].__setitem__(1, -4)),
    "no shards": (0, lambda v: v.update(shards=[])),
    "split type": (0, lambda v: v.update(splits=["train", 7])),
    "image type": (1, lambda v: v[0].__setitem__(1, "high")),
    "images gone": (1, lambda v: v.pop() and None),
    "image number": (2, lambda v: v[0].__setitem__(5, 99)),
    "ref type": (2, lambda v: v[0].__setitem__(0, "1")),
    "sentence": (2, lambda v: v[0][4].append([1])),
    "a ref too short": (2, lambda v: v[0].pop() and None),
    "extension": (2, lambda v: [msgpack.ExtType(1, b"x")]),
}


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_a_spoiled_index_is_named(prepared, tmp_path, name):
    number, change = INDEX_DAMAGE[name]
    copy = shutil.copytree(prepared, tmp_path / "copy")
    damage(copy / shards.INDEX, number, change)
    with pytest.raises(UserError, match="index.array_record.*prepare"):
        PreparedSource(copy, "train")


RECORD_DAMAGE = {
    "another image": lambda v: v.update(name="other.png"),
    "no picture": lambda v: v.update(image=None),
    "damaged picture": lambda v: v.update(image=v["image"][:200]),
    "another ref": lambda v: v["refs"][0].update(ref_id=1),
    "fewer refs": lambda v: v.update(refs=[]),
    "another sentence": lambda v: v["refs"][0]["sentences"][0].__setitem__(1, "other words"),
    "mask too long": lambda v: v["refs"][0].update(mask=v["refs"][0]["mask"] + b"11"),
    "mask cut off": lambda v: v["refs"][0].update(mask=v["refs"][0]["mask"][:-1]),
    "mask of text": lambda v: v["refs"][0].update(mask="a"),
    "no mask": lambda v: v["refs"][0].pop("mask") and None,
}


@pytest.mark.parametrize("name", RECORD_DAMAGE)
def test_a_spoiled_record_is_named(prepared, tmp_path, name):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    shard = preparing.manifest(copy)["shards"][0]["file"]
    damage(copy / shard, 0, RECORD_DAMAGE[name])
    source = PreparedSource(copy, "train")
    with pytest.raises(UserError, match=shard):
        source.image(source[0])
        source.mask(source[0])
    source.image(source[3])  # Its neighbour is unharmed.


def test_shards_that_are_gone_or_cut_off_are_named(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "copy")
    shard = copy / preparing.manifest(copy)["shards"][1]["file"]
    source = PreparedSource(copy, "val")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=shard.name):
        source.image(source[0])
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        PreparedSource(copy, "val").mask(source[0])
    (copy / shards.INDEX).write_bytes(b"")
    with pytest.raises(UserError, match="index.array_record"):
        PreparedSource(copy, "val")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that a server on this machine offers as gs://bucket/data."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = urllib.parse.unquote(self.path.partition("?")[0])
            path = tmp_path / "bucket" / name.partition("/o/data/")[2]
            if not path.is_file():
                self.send_response(404)
                self.end_headers()
                return
            data = path.read_bytes()
            # bytes=FIRST-, bytes=FIRST-LAST, or bytes=-LENGTH for the end of the file.
            first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"]).groups()
            start = int(first) if first else max(0, len(data) - int(last))
            stop = min(len(data), int(last) + 1) if first and last else len(data)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            # The reader hangs up when it has seen enough.
            try:
                self.wfile.write(data[start:stop])
            except OSError:
                self.close_connection = True

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", address)
        yield tmp_path / "bucket"
        server.shutdown()


def test_prepared_data_is_read_from_a_bucket(raw, prepared, bucket):
    shutil.copytree(prepared, bucket / "shapes_unc")
    expected = preparing.refer_sources(raw, "shapes")["val"]
    source = sets.open_set("gs://bucket/data", "shapes_unc", ["val"])["val"]
    preparing.assert_same_source(source, expected)
    preparing.assert_same_source(PreparedSource("gs://bucket/data/shapes_unc/", "val"), expected)
    with pytest.raises(UserError, match="no prepared set at gs://bucket/data or .*/refcoco_unc"):
        sets.open_set("gs://bucket/data", "refcoco_unc")
    pathlib.Path(bucket / "shapes_unc" / shards.INDEX).write_bytes(bytes(70_000))
    with pytest.raises(UserError, match="cannot read gs://bucket/data/shapes_unc/index"):
        sets.open_set("gs://bucket/data", "shapes_unc")
