"""Damage at random: a clear error or a reported skip, and nothing lost or run in silence.

What may come out is a `UserError` (any other exception fails the test, and a crash of the process
does so too) or data, and then all that went in is either there or listed as left out.
"""

import copy
import io
import json
import os
import pathlib
import pickle
import shutil

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from refseg_jax.data import annotations, custom, sets, shards, tfds
from refseg_jax.data.transforms import read_image
from refseg_jax.errors import UserError
from tests import preparing
from tests.test_tfds import BUILT

JUNK = (
    None, True, -1, 0, 1 << 40, 1 << 70, 0.5, float("nan"), 1e300, "", " ", "x", "\ud800", "../x",
    "a\0b", "train", [], [[]], [1], [-1], {}, {"size": [64, 64], "counts": "0"}, {"id": 1},
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return preparing.write_shapes(tmp_path_factory.mktemp("raw"), size=48)


def mutate(value, rng):
    """A copy of plain data in which one thing somewhere is replaced, removed, doubled or moved."""
    value = copy.deepcopy(value)
    node, parents = value, []
    while isinstance(node, dict | list) and len(node) and (not parents or rng.random() < 0.95):
        key = rng.choice(list(node)) if isinstance(node, dict) else int(rng.integers(len(node)))
        key = str(key) if isinstance(node, dict) else key
        parents.append((node, key))
        node = node[key]
    holder, key = parents[-1]
    action = rng.integers(4)
    if action == 0:
        del holder[key]
    elif action == 1 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[int(rng.integers(len(holder)))]))
    else:
        holder[key] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])
    return value


def damage(data: bytes, rng) -> bytes:
    """Bits flipped, a run overwritten, the end cut off, or a piece taken out."""
    changed, where = bytearray(data), int(rng.integers(len(data)))
    action = rng.integers(4)
    if action == 0:
        for _ in range(1 + rng.integers(8)):
            changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif action == 1:
        run = rng.bytes(1 + rng.integers(30))
        changed[where : where + len(run)] = run
    elif action == 2:
        del changed[where:]
    else:
        del changed[where : where + 1 + rng.integers(20)]
    return bytes(changed)


def entries(text):
    """How many refs a file of refs holds, if it is a list."""
    value = json.loads(text)
    return len(value) if isinstance(value, list) else 0


@pytest.mark.parametrize("name", ["refs(unc).json", "instances.json"])
def test_annotations(raw, tmp_path, capsys, name):
    root = pathlib.Path(shutil.copytree(raw, tmp_path / "root"))
    folder = root / "shapes"
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    (folder / "refs(unc).p").unlink()
    (folder / "refs(unc).json").write_text(json.dumps(refs))
    whole = json.loads((folder / name).read_text())
    rng = np.random.default_rng(0)
    refused = skipped = 0
    for step in range(120):
        (folder / name).write_text(json.dumps(mutate(whole, rng)))
        out = tmp_path / "out"
        arguments = ("refer", "--root", root, "--dataset", "shapes", "--out", out, "--workers", 1)
        arguments += ("--partial",) * (step % 2)
        code = preparing.run(*arguments)
        captured = capsys.readouterr()
        if code:
            assert code == 2
            lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and len(lines[0]) > 30, captured.err
            refused += 1
        else:
            manifest = preparing.manifest(out)
            left_out = sum(map(len, manifest["skipped"].values()))
            there = sum(split["refs"] for split in manifest["splits"].values())
            assert there + left_out == entries((folder / "refs(unc).json").read_text())
            assert captured.err.count("left out: ref") == left_out
            skipped += bool(left_out)
            for split in manifest["splits"]:
                source = sets.open_set(str(out), "shapes_unc", [split])[split]
                for i in range(len(source)):
                    source.image(source[i])
                    source.mask(source[i])
        shutil.rmtree(out, ignore_errors=True)
    assert refused > 20 and skipped > 0


class Malice:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_with_code_in_them(raw, tmp_path):
    refs = pickle.loads((raw / "shapes" / "refs(unc).p").read_bytes())
    path, ran = tmp_path / "refs.p", tmp_path / "ran"
    rng = np.random.default_rng(1)
    refused = 0
    for step in range(300):
        value = refs if step % 2 else mutate(refs, rng)
        planted = pickle.dumps([*value, Malice(ran)], protocol=int(rng.integers(6)))
        path.write_bytes(planted if step % 3 else damage(planted, rng))
        try:
            annotations.read(path)
        except UserError as error:
            assert "refs.p" in str(error)
            refused += 1
        assert not ran.exists()
    assert refused > 250
    pickle.loads(pickle.dumps(Malice(ran)))
    assert ran.exists()  # It would have been seen.


def test_pickles_that_only_take_memory_are_refused(tmp_path):
    path = tmp_path / "refs.p"
    put = b"\x80\x02]r\xff\xff\xff\x7f."  # An empty list, remembered as number 2 ** 31 - 1.
    path.write_bytes(put)
    assert annotations.read(path) == []
    reserve = b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"."
    nested = b"\x80\x02}K\x01" + b"\x85" * 1_000_000 + b"K\x01s."
    for content in (reserve, nested):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cannot read .*refs\.p"):
            annotations.read(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_pictures(form):
    rng = np.random.default_rng((10, 2))  # Pillow shows nearly all of its tempers.
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    pixels = rng.integers(0, 256, (24, 32, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **({} if form in ("BMP", "GIF") else {"exif": exif}))
    whole = file.getvalue()
    refused = 0
    for _ in range(300):
        try:
            image = read_image(damage(whole, rng), name="the picture")
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        except UserError as error:
            assert "the picture" in str(error)
            refused += 1
    assert refused > 50


def test_json_lines(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / f"{name}.png")
    whole = [
        {"image": "a.png", "polygon": [1, 1, 9, 1, 9, 9], "sentences": ["x", "y"], "split": "val"},
        {"image": "b.png", "polygon": [[1, 1, 9, 1, 9, 9]], "sentences": ["x"], "category": "c"},
        {"image": "b.png", "mask": {"size": [20, 30], "counts": [590, 10]}, "sentences": ["z"]},
        {"image": "a.png", "ann_id": [], "sentences": ["none"]},
    ]
    path = tmp_path / "said.jsonl"
    rng = np.random.default_rng(3)
    left_out = 0
    for step in range(600):
        lines = [json.dumps(mutate(e, rng) if k == step % 4 else e) for k, e in enumerate(whole)]
        data = "\n".join(lines).encode()
        if step % 3 == 0:
            data = damage("\n".join(map(json.dumps, whole)).encode(), rng)
        path.write_bytes(data)
        count = sum(bool(line.strip()) for line in data.split(b"\n"))
        try:
            sources = custom.read_lines(path, tmp_path / "images", name="mine", partial=True)
        except UserError as error:
            assert "none" in str(error) or f"{count} of {count} regions" in str(error)
            continue
        faults = sum(len(source.faults) for source in sources.values())
        assert sum(map(len, sources.values())) + faults == count
        left_out += faults
        for source in sources.values():
            for i in range(len(source)):
                try:
                    assert source.mask(source[i]).shape == (20, 30)
                except UserError as error:
                    assert "said.jsonl, line" in str(error)
    assert left_out > 200


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    arguments = ("--dataset", "shapes", "--images_per_shard", 3, "--workers", 1)
    assert preparing.run("refer", "--root", raw, *arguments, "--out", out) == 0
    return out


def read_all(folder):
    """Everything of a prepared dataset, as bytes and numbers."""
    found = []
    for split, source in sets.open_set(str(folder), "shapes_unc").items():
        for ref in (source[i] for i in range(len(source))):
            mask = source.mask(ref)
            found.append((split, ref, source.image(ref).tobytes(), mask.tobytes()))
    return found


def test_files_of_prepared_data(prepared, tmp_path):
    """ArrayRecord's own checksums see to it that damage never goes unnoticed."""
    folder = pathlib.Path(shutil.copytree(prepared, tmp_path / "copy"))
    expected = read_all(folder)
    rng = np.random.default_rng(4)
    refused = 0
    for path in sorted(folder.glob("*.array_record")):
        whole = path.read_bytes()
        for _ in range(60):
            path.write_bytes(damage(whole, rng))
            try:
                assert read_all(folder) == expected  # Only padding was hit.
            except UserError as error:
                assert ".array_record" in str(error)
                refused += 1
        path.write_bytes(whole)
    assert refused > 80


def test_records_of_prepared_data(prepared, tmp_path):
    """Sound files with records that someone has made up."""
    folder = pathlib.Path(shutil.copytree(prepared, tmp_path / "copy"))
    rng = np.random.default_rng(5)
    refused = 0
    for path in sorted(folder.glob("*.array_record")):
        reader = ArrayRecordReader(str(path))
        whole = list(reader.read_all())
        reader.close()
        for _ in range(60):
            records = list(whole)
            number = int(rng.integers(len(records)))
            try:
                if rng.random() < 0.2:
                    records[number] = damage(records[number], rng)
                else:
                    value = mutate(msgpack.unpackb(records[number]), rng)
                    records[number] = msgpack.packb(value)
            except (OverflowError, UnicodeEncodeError):  # msgpack has no such value.
                continue
            writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            for record in records:
                writer.write(record)
            writer.close()
            try:
                read_all(folder)
            except UserError as error:
                assert "prepare" in str(error) or "replace the file" in str(error)
                refused += 1
        shutil.copy(prepared / path.name, path)
    assert refused > 60
    assert shards.is_prepared(str(folder))


def test_files_of_tensorflow_datasets(tmp_path):
    folder = pathlib.Path(shutil.copytree(BUILT, tmp_path / "refcocog_google" / "1.1.0"))
    rng = np.random.default_rng(6)
    refused = 0
    for name in ("ref_coco-train.tfrecord-00000-of-00001", "dataset_info.json"):
        whole = (folder / name).read_bytes()
        for _ in range(150):
            (folder / name).write_bytes(damage(whole, rng))
            try:
                _, _, sources, _ = tfds.open_built(str(folder))
                for source in sources.values():
                    for i in range(len(source)):
                        source.image(source[i])
                        source.mask(source[i])
            except UserError as error:
                assert len(str(error)) > 20
                refused += 1
        (folder / name).write_bytes(whole)
    assert refused > 100
