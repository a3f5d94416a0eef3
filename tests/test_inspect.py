"""Looking data over: statistics by hand, every planted fault, and whatever can be read."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from refseg_jax.data import checks, inspect
from tests import preparing
from tests.test_custom import ENTRIES, photos  # noqa: F401
from tests.test_refer import HEIGHT, WIDTH, box_mask, small_set, write
from tests.test_report import Checker
from tests.test_tfds import BUILT


def look(tmp_path, capsys, *arguments):
    """What `--json` prints, and the page."""
    out = tmp_path / "page.html"
    assert inspect.main([*map(str, arguments), "--json", "--out", str(out)]) == 0
    checker = Checker()
    checker.feed(out.read_text())
    assert not checker.open
    assert all(source.startswith("data:image/jpeg;base64,") for source in checker.sources)
    return json.loads(capsys.readouterr().out), checker


def look_at_refer(root, capsys, *arguments):
    return look(root, capsys, "refer", "--root", root, "--dataset", "mine", *arguments)


@pytest.fixture
def faulty(tmp_path):
    """A set with a fault of every sort, and what is said of them."""
    refs, instances = small_set()  # Refs 10 .. 12 in train, 13 in testA, all of image 7: a leak.
    expected = {checks.LEAK: ["testA: seven.jpg"]}

    def add(ref_id, sort, *lines, ann=None, segmentation=None, image_id=7, texts=("a box",)):
        ann_id = 200 + ref_id if ann is None else ann
        sentences = [
            {"sent_id": 100 * ref_id + k, "raw": text, "sent": text} for k, text in enumerate(texts)
        ]
        refs.append(
            {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "category_id": 1,
             "split": "train", "sentences": sentences}
        )  # fmt: skip
        if ann is None:
            instances["annotations"].append(
                {"id": ann_id, "image_id": image_id, "category_id": 1,
                 "segmentation": segmentation or [[2, 2, 9, 2, 9, 9]]}
            )  # fmt: skip
        if sort:
            expected.setdefault(sort, []).extend(lines)
        return refs[-1]

    for image_id, name in ((8, "gone.jpg"), (9, "torn.jpg"), (10, "small.jpg")):
        instances["images"].append(
            {"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH}
        )
    folder = write(tmp_path, refs, instances) / "images" / "mscoco" / "train2014"
    (folder / "torn.jpg").write_bytes((folder / "seven.jpg").read_bytes()[:200])
    Image.new("RGB", (8, 8)).save(folder / "small.jpg")

    add(20, checks.UNUSABLE, "train: ref 20: image file gone.jpg is missing", image_id=8)
    add(21, checks.IMAGE, "train: ref 21: cannot read", image_id=9)
    add(22, None, image_id=9)  # The same picture: said once.
    add(23, checks.IMAGE, "train: ref 23: ", image_id=10)
    expected[checks.UNUSABLE].append("train: ref 24: annotation 999 is not in instances.json")
    add(24, None, ann=999)
    add(
        25,
        checks.MASK,
        "train: ref 25: annotation 225",
        segmentation={"size": [1, 1], "counts": "1"},
    )
    add(26, checks.EMPTY, "train: ref 26", segmentation=[[5, 5, 5.1, 5, 5.1, 5.1]])
    add(27, checks.BEYOND, "train: ref 27, annotation 227: by 4.5 px",
        segmentation=[[20, 5, WIDTH + 4.5, 5, 20, 15]])  # fmt: skip
    add(28, None, segmentation=[[20, 5, WIDTH + 0.9, 5, 20, 15]])  # A slip.
    add(29, checks.BLANK, "train: ref 29: sentence 2901", texts=("a box", " \t", "the box"))
    add(30, checks.UNUSABLE, "train: ref 30: it has no sentences", texts=("",))
    expected[checks.BLANK].append("train: ref 30: sentence 3000")
    add(31, checks.LONG, "train: ref 31: sentence 3100: 22 tokens, 20 are read",
        texts=("the box " * 5,))  # fmt: skip
    add(34, checks.WHOLE, "train: ref 34",
        segmentation=[[0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT]])  # fmt: skip
    add(32, None, ann=[-1])  # No target: no fault.
    refs.append(copy.deepcopy(refs[-1]))
    both = "train: ref 32"
    expected[checks.IDS] = [
        f"ref_id 32, 2 times: {both}", f"sent_id 3200, 2 times: {both}",
        "ann_id 227, 2 times: train: ref 27; train: ref 33", "instances.json, annotations: id 100",
    ]  # fmt: skip
    add(33, None, ann=227)
    expected[checks.BEYOND].append("train: ref 33, annotation 227: by 4.5 px")
    instances["annotations"].append(instances["annotations"][1] | {"id": 100})
    return write(tmp_path, refs, instances), expected


def test_every_planted_fault_is_listed(faulty, capsys):
    root, expected = faulty
    result, checker = look_at_refer(root, capsys, "--tokenizer", "shapes")
    assert result["problems"].keys() == expected.keys()
    for sort, lines in expected.items():
        found = result["problems"][sort]
        assert len(found) == len(lines), (sort, found)
        for line in lines:
            assert any(other.startswith(line) for other in found), (line, found)
            assert line in checker.text
    train = result["splits"]["train"]
    assert (train["refs"], train["without_target"]) == (3 + 15 - 3 + 1, 2)
    assert train["mask_share"]["min"] == 0
    # Of the record whose id came first.
    assert result["splits"]["testA"]["mask_share"]["max"] == pytest.approx(66 / 600)
    total = sum(map(len, expected.values()))
    assert f"Problems: {total}" in checker.text

    out = str(root / "page.html")
    assert inspect.main(["refer", "--root", str(root), "--dataset", "mine", "--out", out]) == 0
    printed = capsys.readouterr().out
    assert f"{total - 1} problems" in printed  # Without a tokenizer there is no limit.
    assert "ids that occur twice: 4\n" in printed


def test_words_stand_for_tokens_where_there_is_no_tokenizer(tmp_path, capsys):
    refs, instances = small_set()
    refs[0]["sentences"][0]["raw"] = "word " * 19
    result, _ = look_at_refer(write(tmp_path, refs, instances), capsys)
    (line,) = result["problems"][checks.LONG]
    assert "19 words and two marks, 20 are read" in line


def test_the_terminal_shows_some_and_counts_the_rest(tmp_path, capsys):
    refs, instances = small_set()
    for k in range(9):
        refs[0]["sentences"].append({"sent_id": k, "raw": "", "sent": ""})
    out = write(tmp_path, refs, instances) / "page.html"
    arguments = ["refer", "--root", str(tmp_path), "--dataset", "mine", "--out", str(out)]
    assert inspect.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "blank sentences: 9" in printed and "... and 4 more" in printed
    assert printed.count("sentence ") == inspect.SHOWN and "sentence 8" in out.read_text()


def test_statistics_by_hand(tmp_path, capsys):
    refs, instances = small_set()
    for ref, text in zip(refs, ("Red box", "the box's red, RED top", "box", "x"), strict=True):
        ref["sentences"] = [{"sent_id": ref["ref_id"], "raw": text, "sent": text}]
    result, checker = look_at_refer(
        write(tmp_path, refs, instances), capsys, "--tokenizer", "shapes", "--splits", "train"
    )
    assert result["problems"] == {} and list(result["splits"]) == ["train"]
    train = result["splits"]["train"]
    assert [train[name] for name in inspect.COUNTS] == [3, 1, 3, 0, 5]  # red box the box's top
    assert train["words"] == pytest.approx(
        {"mean": 8 / 3, "min": 1, "5 %": 1.1, "median": 2, "95 %": 4.7, "max": 5}
    )
    assert train["tokens"]["min"] == 2 + len("box")  # A mark each side; its letters are pieces.
    assert train["objects_per_image"]["max"] == 3 and train["sentences_per_ref"]["mean"] == 1
    areas = [mask.sum() / 600 for mask in (box_mask((2, 2, 12, 12)), box_mask((3, 4, 9, 15)))]
    assert train["mask_share"]["min"] == pytest.approx(min(areas))
    assert checker.tags.count("img") == 1 and "Red box" in checker.text


def test_whatever_the_library_reads(tmp_path, photos, capsys):  # noqa: F811
    root = preparing.write_shapes(tmp_path / "raw", size=48)
    assert preparing.run("refer", "--root", root, "--dataset", "shapes",
                         "--out", tmp_path / "done", "--workers", 1) == 0  # fmt: skip
    capsys.readouterr()
    raw, _ = look(tmp_path, capsys, "refer", "--root", root, "--dataset", "shapes")
    done, checker = look(tmp_path, capsys, "prepared", "--root", tmp_path / "done")
    assert raw["splits"] == done["splits"] and raw["splits"]["train"]["sentences"] == 36
    assert raw["problems"] == done["problems"] == {} and checker.tags.count("img") == 6
    shutil.copytree(root / "shapes", root / "again")  # Two sets may have the same ids.
    merged, _ = look(tmp_path, capsys, "merged", "--root", root, "--sets", "shapes_unc,again_unc")
    assert list(merged["splits"]) == ["train", "shapes_unc/val", "again_unc/val"]
    assert merged["splits"]["train"]["refs"] == 24 and merged["problems"] == {}
    built, _ = look(tmp_path, capsys, "tfds", "--root", BUILT)
    assert built["splits"]["train"]["refs"] == 6 and built["problems"] == {}
    drawn, _ = look(tmp_path, capsys, "shapes", "--scenes", 2)
    assert drawn["splits"]["testB"]["sentences"] == 18 and drawn["problems"] == {}
    lines = [*ENTRIES, {"image": "lost.png", "polygon": [1, 1, 5, 1, 5, 5], "sentences": ["x"]}]
    (photos / "said.jsonl").write_text("\n".join(map(json.dumps, lines)))
    own, _ = look(tmp_path, capsys, "coco", "--images", photos / "images", "--instances",
                  photos / "instances.json", "--expressions", photos / "said.jsonl")  # fmt: skip
    assert own["splits"]["val"]["without_target"] == 1
    assert list(own["problems"]) == [checks.UNUSABLE, checks.LEAK]
    options = ("--images", root / "images/mscoco/train2014")
    options += ("--instances", root / "shapes/instances.json", "--val_share", 0.4)
    generated, _ = look(tmp_path, capsys, "coco", *options)
    assert preparing.run("coco", *options, "--out", tmp_path / "generated", "--workers", 1) == 0
    written = preparing.manifest(tmp_path / "generated")["splits"]
    assert generated["splits"]["val"]["sentences"] == written["val"]["sentences"] > 0


def test_damage_in_prepared_shards_is_listed(tmp_path, capsys):
    root = preparing.write_shapes(tmp_path / "raw", size=48)
    preparing.run("refer", "--root", root, "--dataset", "shapes", "--out", tmp_path / "done",
                  "--workers", 1, "--images_per_shard", 2)  # fmt: skip
    capsys.readouterr()
    (shard, *_) = sorted((tmp_path / "done").glob("images-*"))
    content = bytearray(shard.read_bytes())
    content[100:600] = bytes(500)
    shard.write_bytes(content)
    result, _ = look(tmp_path, capsys, "prepared", "--root", tmp_path / "done")
    assert len(result["problems"][checks.IMAGE]) == 1 and len(result["problems"][checks.MASK]) == 3


def test_nothing_to_read_is_one_line(tmp_path, capsys):
    assert inspect.main(["refer", "--root", str(tmp_path)]) == 2
    refs, instances = small_set()
    write(tmp_path, refs, instances | {"annotations": []})
    assert inspect.main(["refer", "--root", str(tmp_path), "--dataset", "mine"]) == 2
    refer = ["refer", "--root", str(write(tmp_path, refs, instances)), "--dataset", "mine"]
    (tmp_path / "file").write_text("")
    for out in ("no/page.html", "file/page.html", "."):
        assert inspect.main([*refer, "--out", str(tmp_path / out)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith("error: ") for line in lines)
    expected = "is missing", "annotation 100", *["cannot write the page"] * 3
    for line, words in zip(lines, expected, strict=True):
        assert words in line


def test_real_data(test_data, tmp_path):
    """As a command, which must not need a device."""
    done = subprocess.run(
        [sys.executable, "-m", "refseg_jax.data.inspect", "refer", "--root",
         test_data / "data" / "refcoco_smoke", "--json", "--out", tmp_path / "page.html"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [split["refs"] for split in result["splits"].values()] == [26, 16, 6, 11]
    # Three of its expressions share a number; nothing else is wrong.
    assert list(result["problems"]) == [checks.IDS] and len(result["problems"][checks.IDS]) == 1
    assert len((tmp_path / "page.html").read_bytes()) < 2_000_000
