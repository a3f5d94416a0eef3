"""Preparing: resumable to the byte, idempotent, and it says what differs and what is left out."""

import fcntl
import functools
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from refseg_jax.data import prepare, refer, sets, shards, writer
from refseg_jax.data.shards import PreparedSource
from refseg_jax.errors import UserError
from tests import preparing

REPO = pathlib.Path(__file__).resolve().parents[1]
OPTIONS = ("--images_per_shard", 2, "--workers", 1)  # Six images: three shards.


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return preparing.write_shapes(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """What an unbroken preparation writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert prepare_shapes(raw, out) == 0
    return preparing.contents(out)


def prepare_shapes(raw, out, *options):
    return preparing.run(
        "refer", "--root", raw, "--dataset", "shapes", "--out", out, *OPTIONS, *options
    )


def test_the_manifest_says_what_was_written(raw, whole, tmp_path):
    manifest = json.loads(whole["manifest.json"])
    assert sorted(whole) == sorted(
        [
            *(shard["file"] for shard in (*manifest["shards"], manifest["index"])),
            "manifest.json",
        ]
    )
    for shard in (*manifest["shards"], manifest["index"]):
        path = tmp_path / shard["file"]
        path.write_bytes(whole[shard["file"]])
        sums = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert sums.stdout.split()[0] == shard["sha256"]
        assert path.stat().st_size == shard["bytes"]
    assert manifest["splits"] == {
        "train": {"refs": 12, "images": 4, "sentences": 36, "without_target": 0},
        "val": {"refs": 6, "images": 2, "sentences": 18, "without_target": 0},
    }
    assert (manifest["dataset"], manifest["split_by"], manifest["version"]) == ("shapes", "unc", 2)
    assert manifest["differences"] == manifest["skipped"] == {}
    assert set(manifest["source"]["files"]) == {"refs(unc).p", "instances.json"}
    assert manifest["licence"] and str(raw) not in json.dumps(manifest)


def test_workers_and_reruns_change_nothing(raw, whole, tmp_path):
    out = tmp_path / "out"
    assert prepare_shapes(raw, out, "--workers", 3) == 0
    assert preparing.contents(out) == whole
    written = {path: path.stat().st_mtime_ns for path in out.glob("images-*")}
    assert prepare_shapes(raw, out) == 0
    assert preparing.contents(out) == whole
    assert {path: path.stat().st_mtime_ns for path in out.glob("images-*")} == written


def test_damaged_and_missing_files_are_written_again(raw, whole, tmp_path):
    out = tmp_path / "out"
    assert prepare_shapes(raw, out) == 0
    shards_there = sorted(out.glob("images-*"))
    data = bytearray(shards_there[0].read_bytes())
    data[len(data) // 2] ^= 1
    shards_there[0].write_bytes(data)
    shards_there[1].unlink()
    (out / shards.INDEX).unlink()
    assert prepare_shapes(raw, out) == 0
    assert preparing.contents(out) == whole


class Killed(BaseException):
    pass


def test_stopped_at_any_point_it_goes_on_to_the_same_bytes(raw, whole, tmp_path, monkeypatch):
    """Stopped before the first, the second, ... renaming or deletion of a file."""
    stops = 0
    while True:
        out = tmp_path / str(stops)
        left = stops
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)  # No power is cut here, and it is slow.

            def step(change, *args):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                change(*args)

            patch.setattr(os, "replace", functools.partial(step, os.replace))
            patch.setattr(os, "unlink", functools.partial(step, os.unlink))
            try:
                assert prepare_shapes(raw, out) == 0
                break
            except Killed:
                stops += 1
        with pytest.raises(UserError, match="not finished|is missing"):
            sets.open_set(str(out), "shapes_unc")
        assert prepare_shapes(raw, out) == 0
        assert preparing.contents(out) == whole
    # Renamed are the plan, three shards with their checksums, index and manifest.
    assert stops >= 9 and preparing.contents(out) == whole


def test_a_killed_preparation_of_real_photos_goes_on_to_the_same_bytes(test_data, tmp_path):
    root = test_data / "data" / "refcoco_smoke"

    def command(out):
        return [
            sys.executable, "-m", "refseg_jax.data.prepare", "refer", "--root", str(root),
            "--out", str(out), "--partial", "--images_per_shard", "1", "--workers", "2",
        ]  # fmt: skip

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = subprocess.Popen(command(broken), cwd=REPO, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while len(list(broken.glob("images-*.array_record"))) < 3:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert (broken / shards.PLAN).exists() and not (broken / shards.MANIFEST).exists()
    # Its workers notice, and let go of what they were writing.
    for out in (broken, whole):
        subprocess.run(command(out), cwd=REPO, check=True, capture_output=True)
    assert preparing.contents(broken) == preparing.contents(whole)
    for split, expected in preparing.refer_sources(root, "refcoco").items():
        assert PreparedSource(broken, split).num_sentences == expected.num_sentences


def test_a_second_preparation_waits_its_turn(raw, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert prepare_shapes(raw, out) == 2
    assert "another preparation is writing" in capsys.readouterr().err
    os.close(handle)
    assert prepare_shapes(raw, out) == 0


@pytest.mark.parametrize("options", [("--images_per_shard", 3), ("--splits", "val")])
def test_another_preparations_folder_is_refused(raw, tmp_path, capsys, options):
    out = tmp_path / "out"
    assert prepare_shapes(raw, out) == 0
    before = preparing.contents(out)
    assert prepare_shapes(raw, out, *options) == 2
    assert "holds another preparation, of 'shapes'" in capsys.readouterr().err
    assert preparing.contents(out) == before


def test_folders_that_cannot_be_written_to(raw, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".letter.tmp").write_text("dear")
    assert prepare_shapes(raw, tmp_path / "mine") == 2
    assert "is not empty and holds no preparation" in capsys.readouterr().err
    (tmp_path / "mine" / ".letter.tmp").rename(tmp_path / "mine" / "letter.txt")
    assert prepare_shapes(raw, tmp_path / "mine" / "letter.txt") == 2
    assert "cannot write to" in capsys.readouterr().err
    assert preparing.contents(tmp_path / "mine") == {"letter.txt": b"dear"}


def test_what_is_finished_without_a_part_stays_so(tmp_path, capsys):
    raw, out = preparing.write_shapes(tmp_path / "raw"), tmp_path / "out"
    image = next((raw / "images").rglob("*_1000001.png"))
    whole = image.read_bytes()
    image.write_bytes(whole[:99])
    assert prepare_shapes(raw, out, "--partial") == 0
    before = preparing.contents(out)
    assert prepare_shapes(raw, out) == 2
    assert "3 refs cannot be prepared: " in capsys.readouterr().err
    assert preparing.contents(out) == before
    image.write_bytes(whole)
    assert prepare_shapes(raw, out) == 0
    assert preparing.manifest(out)["splits"]["train"]["refs"] == 12


def test_counts_are_asserted_and_differences_listed(raw, tmp_path, capsys, monkeypatch):
    known = {"train": (12, 4, 36), "val": (6, 2, None), "testA": (5, 5, 5)}
    monkeypatch.setitem(refer.KNOWN_COUNTS, ("shapes", "unc"), known)
    out = tmp_path / "out"
    # A split with all its refs that has not all their sentences is no part, but something else.
    known["val"] = (6, 2, 20)
    assert prepare_shapes(raw, out) == 2
    assert "shapes (unc) is not what is published: val has 18 of 20 sentences (" in (
        capsys.readouterr().err
    )
    assert not out.exists()
    assert prepare_shapes(raw, out, "--partial") == 0
    absent = {"testA": ["it is missing"]}
    assert preparing.manifest(out)["differences"] == {"val": ["18 of 20 sentences"], **absent}
    known["val"] = (7, 2, 20)
    assert prepare_shapes(raw, tmp_path / "part") == 0
    said = "a part of shapes (unc) as it is published: val has 6 of 7 refs, 18 of 20 sentences; "
    assert f"{said}testA is missing" in capsys.readouterr().err
    expected = {"val": ["6 of 7 refs", "18 of 20 sentences"], **absent}
    assert preparing.manifest(tmp_path / "part")["differences"] == expected
    del known["testA"], known["val"]
    assert prepare_shapes(raw, tmp_path / "whole") == 0
    assert preparing.manifest(tmp_path / "whole")["differences"] == {}


def test_masks_without_a_pixel_are_kept_and_listed(raw, tmp_path, capsys):
    root = pathlib.Path(shutil.copytree(raw, tmp_path / "root"))
    path = root / "shapes" / "instances.json"
    instances = json.loads(path.read_text())
    instances["annotations"][0]["segmentation"] = [[70, 10, 90, 10, 90, 30]]  # Beside the image.
    path.write_text(json.dumps(instances))
    assert prepare_shapes(root, tmp_path / "out") == 0
    said = "kept, though their masks have no pixel: ref 10000002 of train"
    assert capsys.readouterr().err.endswith(f"{said}\n")
    assert preparing.manifest(tmp_path / "out")["blank"] == {"train": ["ref 10000002 of train"]}
    assert len(PreparedSource(tmp_path / "out", "train")) == 12
    before = preparing.contents(tmp_path / "out")
    assert prepare_shapes(root, tmp_path / "out") == 0
    assert preparing.contents(tmp_path / "out") == before


def test_the_bytes_do_not_depend_on_hashes(spoiled, tmp_path):
    """Python's, which are others in each process."""
    for seed in ("1", "2"):
        subprocess.run(
            [
                sys.executable, "-m", "refseg_jax.data.prepare", "refer", "--root", str(spoiled),
                "--dataset", "shapes", "--out", tmp_path / seed, "--partial", "--workers", "1",
            ],
            cwd=REPO, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
    assert preparing.contents(tmp_path / "1") == preparing.contents(tmp_path / "2")
    others = PreparedSource(tmp_path / "1", "train").other_images
    assert [file.name for file in others] == ["shapes_1000000.png", "shapes_1000001.png"]


def test_a_name_that_is_no_file_s_is_left_out_like_others(raw, tmp_path, capsys):
    root = pathlib.Path(shutil.copytree(raw, tmp_path / "root"))
    path = root / "shapes" / "instances.json"
    instances = json.loads(path.read_text())
    instances["images"][0]["file_name"] = "bad\ud800.png"
    path.write_text(json.dumps(instances))
    assert prepare_shapes(root, tmp_path / "out", "--partial") == 0
    assert capsys.readouterr().err.count("left out: ref") == 3
    assert "bad?.png" in [f.name for f in PreparedSource(tmp_path / "out", "train").other_images]


@pytest.fixture
def spoiled(raw, tmp_path):
    """The first image is cut off, the second has another size, ref 4 an annotation no one has."""
    root = pathlib.Path(shutil.copytree(raw, tmp_path / "spoiled"))
    images = sorted((root / "images" / "mscoco" / "train2014").iterdir())
    images[0].write_bytes(images[0].read_bytes()[:500])
    Image.new("RGB", (65, 64)).save(images[1])
    path = root / "shapes" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    refs[6]["ann_id"] = 1
    path.write_bytes(pickle.dumps(refs))
    return root


def test_damage_is_an_error_or_listed(spoiled, raw, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare_shapes(spoiled, out) == 2
    assert "1 of 12 refs of split 'train'" in capsys.readouterr().err
    path = pathlib.Path("shapes") / "refs(unc).p"
    whole_refs = (raw / path).read_bytes()
    spoiled_refs = (spoiled / path).read_bytes()
    (spoiled / path).write_bytes(whole_refs)
    assert prepare_shapes(spoiled, out) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        "error: 6 refs cannot be prepared: ref 10000000 of train: cannot read"
    )
    assert "; ... (mend them" in message
    # What was sound is there; mended, the rest is written.
    assert (out / "images-00001-of-00003.array_record").exists()
    assert not (out / "images-00000-of-00003.array_record").exists()

    (spoiled / path).write_bytes(spoiled_refs)
    part = tmp_path / "part"
    assert prepare_shapes(spoiled, part, "--partial") == 0
    assert capsys.readouterr().err.count("left out: ref ") == 7
    manifest = preparing.manifest(part)
    assert len(manifest["skipped"]["train"]) == 7 and "val" not in manifest["skipped"]
    assert manifest["splits"]["train"] == {
        "refs": 5, "images": 2, "sentences": 15, "without_target": 0,
    }  # fmt: skip
    source = PreparedSource(part, "train")
    expected = preparing.refer_sources(raw, "shapes")["train"]
    kept = [expected[i] for i in range(12) if i > 6]
    assert [source[i] for i in range(len(source))] == kept
    for ref in kept:
        np.testing.assert_array_equal(source.image(ref), expected.image(ref))
        np.testing.assert_array_equal(source.mask(ref), expected.mask(ref))
    before = preparing.contents(part)
    assert prepare_shapes(spoiled, part, "--partial") == 0
    assert preparing.contents(part) == before

    # One of the two pictures is mended: what lies on it is taken now.
    image = pathlib.Path("images", "mscoco", "train2014", "shapes_1000000.png")
    shutil.copy(raw / image, spoiled / image)
    assert prepare_shapes(spoiled, part, "--partial") == 0
    assert len(preparing.manifest(part)["skipped"]["train"]) == 4
    source = PreparedSource(part, "train")
    assert [source[i] for i in range(len(source))] == [
        expected[i] for i in range(12) if i < 3 or i > 6
    ]


def test_mended_data_goes_on_where_it_failed(spoiled, raw, whole, tmp_path):
    out = tmp_path / "out"
    for path in ("shapes/refs(unc).p", "images/mscoco/train2014/shapes_1000001.png"):
        (spoiled / path).write_bytes((raw / path).read_bytes())
    assert prepare_shapes(spoiled, out) == 2
    written = {path: path.stat().st_mtime_ns for path in out.glob("images-*.array_record")}
    assert len(written) == 2
    for path in (raw / "images" / "mscoco" / "train2014").iterdir():
        shutil.copy(path, spoiled / "images" / "mscoco" / "train2014")
    assert prepare_shapes(spoiled, out) == 0
    assert preparing.contents(out) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def test_annotations_may_be_mended_before_the_end(spoiled, raw, whole, tmp_path, capsys):
    (spoiled / "shapes" / "refs(unc).p").write_bytes((raw / "shapes" / "refs(unc).p").read_bytes())
    out = tmp_path / "out"
    arguments = "refer", "--root", spoiled, "--dataset", "shapes", "--out", out, "--workers", 1
    assert preparing.run(*arguments, "--images_per_shard", 1) == 2
    assert "mend them and run this again" in capsys.readouterr().err
    assert len(list(out.glob("*.array_record"))) > 3
    # Another plan: it begins anew, and what the last one wrote is gone. Of what was not refused,
    # but ended some other way, nothing is deleted.
    plan = out / "plan.json"
    refused = plan.read_text()
    plan.write_text(json.dumps({**json.loads(refused), "refused": False}))
    before = preparing.contents(out)
    assert prepare_shapes(spoiled, out) == 2
    assert "holds another preparation" in capsys.readouterr().err
    assert preparing.contents(out) == before
    plan.write_text(refused)
    (out / "index.array_record").touch()
    shutil.copytree(raw, spoiled, dirs_exist_ok=True)
    assert prepare_shapes(spoiled, out) == 0
    assert preparing.contents(out) == whole


def test_nothing_usable_is_an_error(raw, tmp_path, capsys):
    root = pathlib.Path(shutil.copytree(raw, tmp_path / "root"))
    for path in (root / "images" / "mscoco" / "train2014").glob("shapes_2*"):
        path.write_bytes(b"")
    assert prepare_shapes(root, tmp_path / "out", "--partial") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "nothing usable is left of split val: ref 20000000 of val: cannot read" in message
    assert message.endswith("; ... (6 refs)")


def test_a_full_disk_is_named(raw, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_records", full)
    assert prepare_shapes(raw, tmp_path / "out") == 2
    assert "cannot write to" in (error := capsys.readouterr().err) and "No space left" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["refer", "--root", "nowhere"], "nowhere/refcoco/instances.json is missing"),
        (["folder", "--root", "nowhere"], "nowhere/images is missing"),
        (["coco", "--images", "nowhere", "--expressions", "none.jsonl"], "cannot read none.jsonl"),
        (["tfds", "--root", "nowhere"], "nowhere/dataset_info.json"),
        (["merged", "--root", "nowhere"], "nowhere/refcoco/instances.json is missing"),
        (["merged", "--root", "nowhere", "--sets", "photos"], "no prepared set at nowhere"),
        (
            ["merged", "--root", "nowhere", "--sets", "refcocog"],
            "or is refcocog_google or refcocog_umd meant?",
        ),
    ],
)
def test_missing_data_is_one_line(tmp_path, capsys, arguments, message):
    assert preparing.run(*arguments, "--out", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["refer"],
        ["refer", "--root", "x"],
        ["refer", "--root", "x", "--out", "y", "--workers", "0"],
        ["refer", "--root", "x", "--out", "y", "--text_field", "none"],
        ["folder", "--root", "x", "--out", "y", "--val_share", "1"],
        ["folder", "--root", "x", "--out", "gs://bucket/y"],
        ["refer", "--root", "gs://bucket/x", "--out", "y"],
    ],
)
def test_bad_flags_exit_with_status_2(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        prepare.main(arguments)
    assert error.value.code == 2 and "error: " in capsys.readouterr().err
