"""Own photos: JSON lines and plain folders, from files to batches."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import alignformer
from refseg_jax.data import custom, inspect, open_source, rle, shapes, transforms
from refseg_jax.data.pipeline import TrainBatches
from refseg_jax.data.records import ImageFile
from refseg_jax.data.shards import PreparedSource
from refseg_jax.errors import UserError
from tests import preparing

REPO = pathlib.Path(__file__).resolve().parents[1]
HEIGHT, WIDTH = 20, 30
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]


def box(x0, y0, x1, y1):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.fixture
def photos(tmp_path):
    """Three photos, a mask picture, and a COCO file with two annotations on the first."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in "abc":
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    Image.fromarray(box(3, 4, 9, 15)).save(tmp_path / "b mask.png")
    instances = {
        "images": [
            {"id": i, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate("abc")
        ],
        "annotations": [
            {"id": 5, "image_id": 0, "category_id": 1, "segmentation": [SQUARE]},
            {"id": 6, "image_id": 0, "category_id": 1, "segmentation": [[0, 0, 3, 0, 3, 3, 0, 3]]},
        ],
        "categories": [{"id": 1, "name": "box"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    return tmp_path


ENTRIES = [
    {"image": "a.png", "ann_id": 5, "sentences": ["the box", " second one "], "split": "train"},
    {"image": 0, "ann_id": [5, 6], "sentences": ["both"], "split": "val"},
    {"image": "c.png", "ann_id": [], "sentences": ["a cat"], "split": "val"},
    {"image": "b.png", "mask": "b mask.png", "sentences": ["drawn"], "category": "thing"},
    {"image": "c.png", "polygon": SQUARE, "sentences": ["flat"]},
    {"image": "c.png", "polygon": [SQUARE, [20, 0, 25, 0, 25, 5, 20, 5]], "sentences": ["two"]},
]


def write(photos, entries):
    text = "\n".join(e if isinstance(e, str) else json.dumps(e) for e in entries)
    (photos / "said.jsonl").write_text(text + "\n\n")
    return photos / "said.jsonl"


def read(photos, entries, instances=True, **options):
    path = photos / "instances.json" if instances else None
    return custom.read_lines(
        write(photos, entries), photos / "images", path, name="mine", **options
    )


def test_every_kind_of_region(photos):
    counts = rle.encode(box(1, 1, 4, 4)).decode()
    points = {"image": "c.png", "polygon": [[2, 2], [12, 2], [12, 12], [2, 12]]}
    (source,) = read(photos, [points | {"sentences": ["points"], "split": "train"}]).values()
    np.testing.assert_array_equal(source.mask(source[0]), box(2, 2, 12, 12))
    far = [[20, 0], [25, 0], [25, 5], [20, 5]]
    for rings, expected in (([far], box(20, 0, 25, 5)), ([far, SQUARE], None)):
        (source,) = read(photos, [points | {"polygon": rings, "sentences": ["x"]}]).values()
        expected = box(20, 0, 25, 5) | box(2, 2, 12, 12) if expected is None else expected
        np.testing.assert_array_equal(source.mask(source[0]), expected)
    entry = {"image": "c.png", "mask": {"size": [HEIGHT, WIDTH], "counts": counts}}
    sources = read(photos, [*ENTRIES, entry | {"sentences": ["code"]}])
    assert {s: len(source) for s, source in sources.items()} == {"train": 5, "val": 2}
    train, val = sources["train"], sources["val"]
    assert [[s.text for s in train[i].sentences] for i in range(5)] == [
        *(["the box", "second one"], ["drawn"], ["flat"], ["two"], ["code"])
    ]
    assert [train[i].category for i in range(5)] == ["box", "thing", "", "", ""]
    expected = [
        *(box(2, 2, 12, 12), box(3, 4, 9, 15), box(2, 2, 12, 12)),
        *(box(2, 2, 12, 12) | box(20, 0, 25, 5), box(1, 1, 4, 4)),
    ]
    for i, mask in enumerate(expected):
        np.testing.assert_array_equal(train.mask(train[i]), mask)
    both, none = val[0], val[1]
    assert (both.ann_ids, none.ann_ids) == ((5, 6), ())
    np.testing.assert_array_equal(val.mask(both), box(2, 2, 12, 12) | box(0, 0, 3, 3))
    assert not val.mask(none).any()
    assert val.image_file(none) == ImageFile("c.png", HEIGHT, WIDTH)


def test_without_a_coco_file_the_pictures_tell_their_size(photos):
    sources = read(photos, ENTRIES[3:], instances=False)
    source = sources["train"]
    assert source.image_file(source[0]) == ImageFile("b.png", HEIGHT, WIDTH)
    np.testing.assert_array_equal(source.mask(source[0]), box(3, 4, 9, 15))


def test_one_photo_has_one_name(photos):
    """Or it would be trained on and tested on."""
    entries = [
        {"image": name, "polygon": SQUARE, "sentences": ["x"]}
        for name in ("a.png", "./a.png", "b.png", "../images/b.png")
    ]
    sources = read(photos, entries, instances=False)
    names = [{source.image_file(source[i]).name for i in range(2)} for source in sources.values()]
    assert sorted(map(sorted, names)) == [["a.png"], ["b.png"]]
    assert all(len({source[i].image_id for i in range(2)}) == 1 for source in sources.values())


def test_black_of_a_jpeg_is_no_region(photos):
    region = np.zeros((HEIGHT, WIDTH), bool)
    region[4:12, 8:24] = True
    for mode in ("L", "RGB"):
        mask = Image.fromarray(255 * region.astype(np.uint8)).convert(mode)
        mask.save(photos / "mask.jpg", quality=75)
        entry = {"image": "b.png", "mask": "mask.jpg", "sentences": ["drawn"]}
        (source,) = (s for s in read(photos, [entry]).values() if len(s))
        np.testing.assert_array_equal(source.mask(source[0]), region)


def mask_files(region):
    """Name -> a picture of `region` and how it is saved, as editors and scripts make them."""
    grey = Image.fromarray(255 * region.astype(np.uint8))
    noise = np.random.default_rng(0).integers(0, 256, (*region.shape, 3), np.uint8)
    cut_out = Image.fromarray(noise)
    cut_out.putalpha(grey)
    paint = Image.new("LA", grey.size, 0)  # Black on nothing.
    paint.putalpha(grey)
    white_first = Image.fromarray(1 - region.astype(np.uint8), "P")
    white_first.putpalette([255, 255, 255, 0, 0, 0])
    labels = Image.fromarray(3 * region.astype(np.uint8), "P")
    labels.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    opaque = grey.convert("RGB")
    opaque.putalpha(255)
    return {
        "cut out.png": (cut_out, {}),
        "paint.png": (paint, {}),
        "white first.png": (white_first, {}),
        "labels.png": (labels, {}),
        "opaque.png": (opaque, {}),
        "few.png": (grey.convert("RGB").quantize(2), {}),
        "a.gif": (grey.convert("RGB"), {}),
        "lossy.webp": (grey.convert("RGB"), {"quality": 50}),
        "jpeg.tif": (grey.convert("RGB"), {"compression": "jpeg"}),
        "colours.tif": (grey.convert("RGB").convert("YCbCr"), {}),
        "bits.png": (grey.convert("1"), {}),
        "deep.png": (Image.fromarray(region.astype(np.uint16)), {}),
        "floats.tif": (Image.fromarray(region.astype(np.float32)), {}),
    }


def test_masks_of_every_make(tmp_path):
    region = np.zeros((32, 48), bool)
    region[8:24, 16:40] = True
    for name, (picture, options) in mask_files(region).items():
        picture.save(tmp_path / name, **options)
        found = custom._read_mask(tmp_path / name)
        assert (found == region).mean() > (0.97 if "lossy" in name else 0.9999), name


def test_a_turned_photo_is_upright(photos):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(photos / "images" / "t.jpg", exif=exif)
    (source,) = read(
        photos, [{"image": "t.jpg", "polygon": SQUARE, "sentences": ["x"]}], instances=False
    ).values()
    assert source.image(source[0]).shape == (*source.mask(source[0]).shape, 3)
    assert source.mask(source[0]).shape == (HEIGHT, WIDTH)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_its_photo_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "mask.png"
    region = np.zeros((6, 9), np.uint8)
    region[1:3, 2:8] = region[3:5, 6:8] = 255
    Image.fromarray(region).save(path, exif=exif)
    mask = custom._read_mask(path)
    np.testing.assert_array_equal(mask, transforms.read_image(path)[..., 0] > 0)
    assert mask.shape == custom._size(path) and mask.sum() == 16


def test_without_splits_some_images_are_held_out(photos):
    entries = [
        {"image": f"{name}.png", "polygon": SQUARE, "sentences": ["x"]} for name in "abcabcabc"
    ]
    sources = read(photos, entries, instances=False)
    assert {s: len(source) for s, source in sources.items()} == {"train": 6, "val": 3}
    names = {
        s: {src.image_file(src[i]).name for i in range(len(src))} for s, src in sources.items()
    }
    assert not names["train"] & names["val"]
    more = read(photos, entries, instances=False, val_share=0.67)
    assert len(more["val"]) == 6
    assert list(read(photos, entries[:1], instances=False)) == ["train"]


FAULTS = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("7", "not a JSON object"),
    ({}, "it has 0 of ann_id, polygon, mask, one is needed"),
    ({"image": "a.png", "ann_id": 5, "polygon": SQUARE, "sentences": ["x"]}, "it has 2 of"),
    ({"image": "a.png", "ann_id": 5, "sentence": ["x"]}, "unknown field 'sentence'"),
    ({"image": "a.png", "ann_id": 5}, "'sentences' are not a list"),
    ({"image": "a.png", "ann_id": 5, "sentences": []}, "'sentences' are not a list"),
    ({"image": "a.png", "ann_id": 5, "sentences": ["x", 3]}, "'sentences' are not a list"),
    ({"image": "a.png", "ann_id": 5, "sentences": ["x", "  "]}, "sentence 2 is empty"),
    ({"image": "a.png", "ann_id": 5, "sentences": ["\u200b\ufeff \u202e"]}, "sentence 1 is empty"),
    ('{"image": "a.png", "ann_id": 5, "sentences": ["\\ud800"]}', "sentence 1 is no valid Unicode"),
    ({"image": "a.png", "ann_id": 5, "sentences": ["x"], "split": 3}, "'split' is not a text"),
    ({"image": "a.png", "ann_id": 7, "sentences": ["x"]}, "annotation 7 is not one of its image"),
    ({"image": "b.png", "ann_id": 5, "sentences": ["x"]}, "annotation 5 is not one of its image"),
    ({"image": "a.png", "ann_id": [[5]], "sentences": ["x"]}, "is not one of its image"),
    ({"image": "z.png", "ann_id": 5, "sentences": ["x"]}, "'z.png' is not in the instances file"),
    ({"image": [1], "ann_id": 5, "sentences": ["x"]}, "is not in the instances file"),
    ({"image": "a.png", "polygon": [1, 2], "sentences": ["x"]}, "its polygon encloses nothing"),
    ({"image": "a.png", "polygon": [], "sentences": ["x"]}, "its polygon encloses nothing"),
    ({"image": "a.png", "polygon": [0.1, 0.1, 0.8, 0.2, 1, 0.9], "sentences": ["x"]}, "not shares"),
    ({"image": "a.png", "mask": "none.png", "sentences": ["x"]}, "there is no mask .*none.png"),
    ({"image": "a.png", "mask": "n" * 300, "sentences": ["x"]}, "there is no mask .*nnn"),
    ({"image": "a.png", "mask": "../x.png", "sentences": ["x"]}, "'../x.png' lies outside"),
    ({"image": "a.png", "mask": "/etc/passwd", "sentences": ["x"]}, "'/etc/passwd' lies outside"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "message"), FAULTS)
def test_lines_that_cannot_be_used_are_named_or_skipped(photos, entry, message):
    entries = [ENTRIES[0], entry, ENTRIES[1]]
    with pytest.raises(UserError, match=f"said.jsonl: 1 of 3 .*line 2: .*{message}"):
        read(photos, entries)
    sources = read(photos, entries, partial=True)
    assert [len(source) for source in sources.values()] == [1, 1]
    (fault,) = (fault for source in sources.values() for fault in source.faults)
    assert "line 2" in fault


def test_images_of_lines_that_cannot_be_used_are_kept_in_mind(photos):
    """A set that this one is merged with must not be trained on them."""
    entries = [
        entry | {"split": split} for entry, split in zip(ENTRIES, ("train", "val"), strict=False)
    ]
    blank = entries[0] | {"split": "val", "sentences": [" "]}
    sources = read(photos, [*entries, blank, {"split": "val", "image": "gone"}], partial=True)
    first = sources["train"][0]
    assert sources["val"].other_images == (sources["train"].image_file(first),)
    assert sources["train"].other_images == ()


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"mask": {"size": [3, 3], "counts": [9]}}, "a run-length code of size"),
        ({"mask": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}}, "no pixel"),
        ({"mask": "said.jsonl"}, "cannot read .*said.jsonl as a mask"),
        ({"mask": "other size.png"}, r"it is \(9, 9\), its image \(20, 30\)"),
        ({"polygon": ["a"] * 6}, "could not convert"),
        ({"polygon": [1e9] * 6}, "outside its image"),
        ({"polygon": [10**400, 1, 2, 3, 4, 5]}, "OverflowError"),
    ],
)
def test_regions_that_cannot_be_drawn_are_named_or_skipped(photos, capsys, region, message):
    Image.new("L", (9, 9), 255).save(photos / "other size.png")
    said = write(photos, [ENTRIES[4], {"image": "a.png", "sentences": ["x"], **region}])
    arguments = ("coco", "--images", photos / "images", "--expressions", said, "--workers", 1)
    arguments += ("--instances", photos / "instances.json", "--out", photos / "out")
    # Both in one split: one of which nothing is left would be an error.
    said.write_text(said.read_text().replace("{", '{"split": "train", ', 1))
    assert preparing.run(*arguments) == 2
    complaint = capsys.readouterr().err
    assert "1 refs cannot be prepared: ref 2 of train: " in complaint
    assert re.search(f"ref 2 of train: .*{message}", complaint)
    assert preparing.run(*arguments, "--partial") == 0
    (line,) = preparing.manifest(photos / "out")["skipped"]["train"]
    assert re.search(message, line)
    source = PreparedSource(photos / "out", "train")
    assert [s.text for i in range(len(source)) for s in source[i].sentences] == ["flat"]


def test_a_mask_decides_the_size_of_a_photo_without_a_record(photos):
    Image.new("L", (9, 9), 255).save(photos / "other size.png")
    entry = {"image": "a.png", "mask": "other size.png", "sentences": ["x"]}
    (source,) = read(photos, [entry], instances=False).values()
    with pytest.raises(UserError, match="a.png is 20 x 30 .* drawn at 9 x 9"):
        source.image(source[0])


def make_folder(root, masks=("a", "b_1", "b_2", "c-left")):
    for folder in ("images", "masks", "expressions"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in "abc":
        pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{name}.jpg")
    for k, name in enumerate(masks):
        Image.fromarray(box(k, 2, k + 9, 12)).save(root / "masks" / f"{name}.png")
        (root / "expressions" / f"{name}.txt").write_text(f"\ufeffthe {name}\n\n caf\u00e9 \n")
    return root


def test_a_plain_folder(tmp_path):
    sources = custom.read_folder(make_folder(tmp_path / "photos"), name="mine")
    refs = {source[i].ref_id: (source, source[i]) for source in sources.values()
            for i in range(len(source))}  # fmt: skip
    assert sorted(refs) == [1, 2, 3, 4] and set(sources) == {"train", "val"}
    for number, (image, name) in enumerate(
        (("a", "a"), ("b", "b_1"), ("b", "b_2"), ("c", "c-left"))
    ):
        source, ref = refs[number + 1]
        assert source.image_file(ref).name == f"{image}.jpg"
        assert [s.text for s in ref.sentences] == [f"the {name}", "café"]
        np.testing.assert_array_equal(source.mask(ref), box(number, 2, number + 9, 12))


def test_a_mask_is_of_the_image_of_the_longest_name(tmp_path):
    root = make_folder(tmp_path / "photos", masks=("b_1", "b_2"))
    shutil.copy(root / "images" / "b.jpg", root / "images" / "b_1.jpg")
    sources = custom.read_folder(root, name="mine")
    refs = [(source, source[i]) for source in sources.values() for i in range(len(source))]
    names = {ref.ref_id: source.image_file(ref).name for source, ref in refs}
    assert names == {1: "b_1.jpg", 2: "b.jpg"}


def test_folders_inside_are_read_and_hidden_files_are_not(tmp_path):
    root = make_folder(tmp_path / "photos")
    for kind, name in (("images", "a.jpg"), ("masks", "a.png"), ("expressions", "a.txt")):
        inside = root / kind / "trip" / "day 1"
        inside.mkdir(parents=True)
        spelled = "cafe\u0301" if kind == "images" else "caf\u00e9"
        shutil.copy(root / kind / name, inside / (spelled + name[1:].upper()))
        (root / kind / f"._{name}").write_bytes(b"of a file system")
    sources = custom.read_folder(root, name="mine")
    refs = [(source, source[i]) for source in sources.values() for i in range(len(source))]
    names = {source.image_file(ref).name for source, ref in refs}
    assert len(refs) == 5 and "trip/day 1/cafe\u0301.JPG" in names
    for source, ref in refs:
        assert source.image(ref).shape[:2] == source.mask(ref).shape


def mask_without_words(root):
    (root / "expressions" / "a.txt").unlink()


def words_without_mask(root):
    (root / "masks" / "a.png").unlink()


def mask_without_image(root):
    (root / "images" / "a.jpg").unlink()


def empty_words(root):
    (root / "expressions" / "a.txt").write_text("\n")


def words_in_latin_1(root):
    (root / "expressions" / "a.txt").write_bytes(b"caf\xe9")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (mask_without_words, "there is no .*expressions/a.txt"),
        (words_without_mask, "no mask of that name"),
        (mask_without_image, "no image of that name"),
        (empty_words, "expressions/a.txt is empty"),
        (words_in_latin_1, "a.txt is not UTF-8"),
    ],
)
def test_a_folder_with_something_missing(tmp_path, spoil, message):
    root = make_folder(tmp_path / "photos")
    spoil(root)
    with pytest.raises(UserError, match=f"1 of 4 regions .*'a': .*{message}"):
        custom.read_folder(root, name="mine")
    sources = custom.read_folder(root, name="mine", partial=True)
    assert sum(len(source) for source in sources.values()) == 3


def test_a_mask_of_another_size_is_named(tmp_path, capsys):
    root = make_folder(tmp_path / "photos")
    Image.new("L", (9, 9), 255).save(root / "masks" / "b_2.png")
    assert preparing.run("folder", "--root", root, "--out", tmp_path / "o", "--workers", 1) == 2
    assert "region 'b_2': b.jpg is 20 x 30 " in capsys.readouterr().err
    assert inspect.main(["folder", "--root", str(root), "--out", str(tmp_path / "i.html")]) == 0
    said = capsys.readouterr().out
    assert "ref 3 (region 'b_2'): " in said and "b.jpg is 20 x 30 " in said


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="images is missing: images/, masks/ and expressions/"):
        custom.read_folder(tmp_path, name="mine")
    root = make_folder(tmp_path / "photos", masks=())
    with pytest.raises(UserError, match="there are none"):
        custom.read_folder(root, name="mine")
    Image.new("RGB", (3, 3)).save(root / "images" / "a.png")
    with pytest.raises(UserError, match="both a.jpg and a.png"):
        custom.read_folder(root, name="mine")


def test_images_of_a_folder_that_have_no_region_are_said(tmp_path, capsys):
    root = make_folder(tmp_path / "photos", masks=("a", "c-left"))
    arguments = "--root", str(root), "--out"
    assert preparing.run("folder", *arguments, tmp_path / "out") == 0
    said = "images left out, without a usable region: 1 (b.jpg)"
    assert said in capsys.readouterr().err
    assert inspect.main(["folder", *arguments, str(tmp_path / "page.html")]) == 0
    assert said in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    (root / "images" / "b.jpg").unlink()
    assert preparing.run("folder", *arguments, tmp_path / "out") == 0
    assert "left out" not in capsys.readouterr().err


def test_own_photos_become_batches_of_the_documented_config(tmp_path, test_data):
    """Real photos with a sentence for every category that is in them once."""
    folder = test_data / "data" / "coco_photos"
    coco = json.loads((folder / "instances.json").read_text())
    names = {category["id"]: category["name"] for category in coco["categories"]}
    seen = {}
    for annotation in coco["annotations"]:
        seen.setdefault((annotation["image_id"], annotation["category_id"]), []).append(annotation)
    alone = [found[0] for found in seen.values() if len(found) == 1 and found[0]["area"] > 2000]
    lines = [
        json.dumps(
            {
                "image": a["image_id"],
                "ann_id": a["id"],
                "sentences": [f"the {names[a['category_id']]}"],
            }
        )
        for a in alone[:40]
    ]
    said = tmp_path / "said.jsonl"
    said.write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "refseg_jax.data.prepare", "coco", "--images", folder / "images",
         "--expressions", said, "--instances", folder / "instances.json",
         "--out", tmp_path / "photos"],
        cwd=REPO, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["skipped"] == 0

    config = alignformer.get_config("prepared,small")
    config.data.root = str(tmp_path / "photos")
    source, *others = (
        open_source(config.data, split) for split in ("train", *config.data.eval_splits)
    )
    assert len(source) + sum(map(len, others)) == 40
    sizes = dict(image_size=config.data.image_size, max_tokens=config.data.max_tokens, batch_size=8)
    batch = TrainBatches(source, shapes.tokenizer(), num_steps=1, seed=0, **sizes)[0]
    assert batch["valid"].all() and batch["mask"].any(axis=(1, 2)).all()
    areas = {a["id"]: a["area"] for a in alone}
    for i in range(0, len(source), 7):
        ref = source[i]
        assert source.mask(ref).sum() == pytest.approx(areas[ref.ann_ids[0]], rel=0.06, abs=30)
