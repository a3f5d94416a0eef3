"""Merged training sets: nothing of what is tested on may be trained on."""

import json
import logging
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from refseg_jax.data import inspect, open_source, refer, sets
from refseg_jax.data.records import ImageFile
from refseg_jax.data.refer import ReferSource
from refseg_jax.data.shards import PreparedSource
from refseg_jax.errors import UserError
from tests import preparing, tiny


def write_sets(root):
    """Sets a, b and c over the six images 1000000 .. 1000003 (train), 2000000, 2000001 (val).

    a: as drawn. b: with a leak planted: 1000001, which is training in a, is validation. c: has an
    own split by google, whose one image 1000002 is both, in different refs. Of c, 1000003 is left.
    """
    preparing.write_shapes(root)
    refs = pickle.loads((root / "shapes" / "refs(unc).p").read_bytes())
    by_image = {}
    for ref in refs:
        by_image.setdefault(ref["image_id"], []).append(ref)

    def save(name, split_by, chosen):
        folder = root / name
        folder.mkdir()
        shutil.copy(root / "shapes" / "instances.json", folder)
        content = [ref | {"split": split} for ref, split in chosen]
        (folder / f"refs({split_by}).json").write_text(json.dumps(content))

    save("a", "unc", [(ref, ref["split"]) for ref in refs])
    leak = [(ref, "val") for ref in by_image[1000001]]
    save("b", "unc", [(ref, "train") for ref in by_image[1000000]] + leak)
    first, *others = by_image[1000002]
    kept = [(ref, "train") for ref in by_image[1000003][:2]]
    save("c", "google", [(first, "test"), *((ref, "train") for ref in others), *kept])
    return root


SETS = ("a_unc", "b_unc", "c_google")
HELD_OUT = {1000001, 1000002, 2000000, 2000001}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def prepared(root, tmp_path_factory):
    """Every set prepared by itself."""
    out = tmp_path_factory.mktemp("prepared")
    for name in SETS:
        dataset, split_by = name.split("_")
        assert preparing.run(
            "refer", "--root", root, "--dataset", dataset, "--split_by", split_by,
            "--out", out / name, "--workers", 1,
        ) == 0  # fmt: skip
    return out


def test_a_planted_leak_is_dropped_and_counted(root, caplog):
    source = sets.open_merged(str(root), SETS, "train")
    images = [source[i].image_id for i in range(len(source))]
    assert not HELD_OUT & set(images)
    # a: two of four images, b: one, c: one, with two refs.
    assert images == [*[1000000] * 3, *[1000003] * 3, *[1000000] * 3, *[1000003] * 2]
    assert source.dropped == {"a_unc": (2, 6, 18), "b_unc": (0, 0, 0), "c_google": (1, 2, 6)}
    assert source.num_sentences == 11 * 3
    (message,) = (record.getMessage() for record in caplog.records)
    assert "a_unc 2 images (6 refs, 18 sentences); b_unc 0 images" in message


def test_merged_samples_are_those_of_the_sets(root):
    merged = sets.open_merged(str(root), SETS, "train")
    originals = []
    for name in SETS:
        source = sets.open_set(str(root), name, ["train"])["train"]
        originals += [(source, source[i]) for i in range(len(source))]
    originals = [(s, ref) for s, ref in originals if ref.image_id not in HELD_OUT]
    for i, (source, ref) in enumerate(originals):
        assert merged[i].sentences == ref.sentences and merged[i].ann_ids == ref.ann_ids
        np.testing.assert_array_equal(merged.image(merged[i]), source.image(ref))
        np.testing.assert_array_equal(merged.mask(merged[i]), source.mask(ref))
    assert len({merged[i].ref_id for i in range(len(merged))}) == len(merged) == len(originals)


def test_raw_and_prepared_sets_merge_alike(root, prepared, tmp_path):
    raw = sets.open_merged(str(root), SETS, "train")
    from_shards = sets.open_merged(str(prepared), SETS, "train")
    assert isinstance(sets.open_set(str(prepared), "b_unc")["val"], PreparedSource)
    preparing.assert_same_source(from_shards, raw)
    assert from_shards.dropped == raw.dropped

    out = tmp_path / "merged"
    arguments = ("merged", "--root", root, "--sets", ",".join(SETS), "--out", out, "--workers", 1)
    assert preparing.run(*arguments) == 0
    preparing.assert_same_source(sets.open_merged(str(out), SETS, "train"), raw)
    manifest = preparing.manifest(out)
    assert list(manifest["splits"]) == ["train", "a_unc/val", "b_unc/val", "c_google/test"]
    assert manifest["images"] == 6
    dropped = manifest["source"]["dropped"]
    assert dropped["a_unc"] == {"images": 2, "refs": 6, "sentences": 18}

    # It is found beside other sets, and is not taken for another one.
    preparing.assert_same_source(sets.open_merged(str(tmp_path), SETS[::-1], "train"), raw)
    for place in (out, tmp_path):
        with pytest.raises(UserError, match=r"holds the merged set of a_unc, .*, not of a_unc: "):
            sets.open_merged(str(place), SETS[:1], "train")


def test_configs_open_merged_sets(root, prepared):
    config = tiny.config("merged").data
    assert config.select_split == "refcoco_unc/val" and config.select_split in config.eval_splits
    assert {split.split("/")[0] for split in config.eval_splits} == set(config.merged)
    config.merged = SETS
    for folder in (root, prepared):
        config.root = str(folder)
        assert len(open_source(config, "train")) == 11
        expected = ReferSource(root, "c", "google", "test")
        source = open_source(config, "c_google/test")
        preparing.assert_same_source(source, expected)
    for split in ("val", "d_unc/val", "a_unc"):
        with pytest.raises(UserError, match="a_unc, b_unc, c_google"):
            open_source(config, split)
    with pytest.raises(UserError, match="no split 'test'"):
        open_source(config, "a_unc/test")


def test_sets_that_cannot_be_merged(root):
    only_val = {"val": ReferSource(root, "a", "unc", "val")}
    with pytest.raises(UserError, match="no 'train' split in x"):
        sets.MergedSource({"x": only_val})
    train = ReferSource(root, "b", "unc", "train")
    with pytest.raises(UserError, match="nothing is left"):
        sets.MergedSource({"x": {"train": train, "val": train}})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (("COCO_train2014_000000000009.jpg", 4, 5), ("000000000009.jpg", 8, 10), True),
        (
            ("COCO_train2014_000000000009.jpg", 4, 5),
            ("x/COCO_val2014_000000000009.jpg", 4, 5),
            True,
        ),
        (("COCO_train2014_000000000009.jpg", 4, 5), ("000000000019.jpg", 4, 5), False),
        (("01/images/9.jpg", 4, 5), ("01/images/9.jpg", 4, 5), True),
        (("01/images/9.jpg", 4, 5), ("02/images/9.jpg", 4, 5), False),
        (("9.jpg", 4, 5), ("9.jpg", 5, 4), False),
        (("COCO_train2014_000000000009.jpg", 4, 5), ("000000000009.JPEG", 8, 10), True),
        (("COCO_train2014_000000000009.jpg", 4, 5), ("000000000009.png", 8, 10), True),
    ],
)
def test_which_files_are_the_same_photograph(one, other, same):
    assert (sets.image_key(ImageFile(*one)) == sets.image_key(ImageFile(*other))) == same


def test_real_sets_are_merged(test_data, caplog):
    """One set beside itself: every one of its own held-out images is kept out of both."""
    smoke = test_data / "data" / "refcoco_smoke"
    with caplog.at_level(logging.WARNING):
        source = sets.open_merged(str(smoke), ["refcoco_unc"], "train")
    assert len(source) == 26 and source.dropped == {"refcoco_unc": (0, 0, 0)}
    others = sets.open_set(str(smoke), "refcoco_unc")
    leaky = {"google": {**others, "val": others["train"]}, "unc": others}
    with pytest.raises(UserError, match="nothing is left of google, unc"):
        sets.MergedSource(leaky)


def test_two_pictures_of_one_name_are_not_taken_for_one(tmp_path, capsys):
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        images = tmp_path / f"{name} images"
        images.mkdir()
        lines = []
        for file, split in ((f"{name}.png", "train"), ("1.png", "train"), (f"{name} 2.png", "val")):
            Image.new("RGB", (9, 9), colour).save(images / file)
            line = {"image": file, "polygon": [0, 0, 5, 0, 5, 5], "split": split}
            lines.append(json.dumps(line | {"sentences": [f"{name} {file}"]}))
        said = tmp_path / f"{name}.jsonl"
        said.write_text("\n".join(lines))
        options = ("--images", images, "--expressions", said, "--name", name, "--workers", 1)
        assert preparing.run("coco", *options, "--out", tmp_path / "sets" / name) == 0
    merge = ("merged", "--root", tmp_path / "sets", "--sets", "red,blue", "--workers", 1)
    merge += ("--out", tmp_path / "out")
    assert preparing.run(*merge) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "1 refs cannot be prepared: ref 3 of train: " in message
    assert "1.png) is another picture than that of ref 1 of train" in message
    assert preparing.run(*merge, "--partial") == 0
    source = PreparedSource(tmp_path / "out", "train")
    colours = {source[i].sentences[0].text: source.image(source[i])[0, 0] for i in range(3)}
    assert {text: tuple(colour) for text, colour in colours.items()} == {
        "red red.png": (255, 0, 0), "red 1.png": (255, 0, 0), "blue blue.png": (0, 0, 255),
    }  # fmt: skip


def test_merging_again_sees_what_became_of_the_sets(tmp_path, prepared, capsys):
    """Of raw annotations, and of sets that were prepared anew."""
    root, shards = write_sets(tmp_path / "raw"), shutil.copytree(prepared, tmp_path / "shards")
    for place in (root, shards):
        merge = ("merged", "--root", place, "--sets", ",".join(SETS), "--workers", 1)
        merge += ("--out", tmp_path / "out" / place.name)
        assert preparing.run(*merge) == preparing.run(*merge) == 0
        if place is root:
            path = root / "c" / "instances.json"
            content = json.loads(path.read_text())
            for annotation in content["annotations"]:
                annotation["segmentation"] = [[0, 0, 9, 0, 9, 9]]
            path.write_text(json.dumps(content))
        else:
            shutil.rmtree(shards / "c_google")
            preparing.run(
                "refer", "--root", root, "--dataset", "c", "--split_by", "google",
                "--out", shards / "c_google", "--workers", 1,
            )  # fmt: skip
        capsys.readouterr()
        assert preparing.run(*merge) == 2
        assert "of other annotations or options" in capsys.readouterr().err


def test_a_part_of_sets_is_merged_and_said_to_be_one(tmp_path, capsys, monkeypatch):
    root = write_sets(tmp_path / "raw")
    path = root / "b" / "refs(unc).json"
    refs = json.loads(path.read_text())
    refs[0]["ann_id"] = 1
    path.write_text(json.dumps(refs))
    counts = {**refer.KNOWN_COUNTS, ("a", "unc"): {"train": (13, 4, 36)}}
    monkeypatch.setattr(refer, "KNOWN_COUNTS", counts)
    merge = ("merged", "--root", root, "--sets", ",".join(SETS), "--workers", 1)
    assert preparing.run(*merge, "--out", tmp_path / "out") == 2
    assert "1 of 3 refs of split 'train'" in capsys.readouterr().err
    assert preparing.run(*merge, "--out", tmp_path / "out", "--partial") == 0
    assert "a_unc is not what is published: train has 12 of 13 refs" in capsys.readouterr().err
    skipped = preparing.manifest(tmp_path / "out")["skipped"]
    assert len(skipped["train"]) == 1 and skipped["train"][0].startswith("b_unc: ref ")
    about = preparing.manifest(tmp_path / "out")["source"]
    assert "12 of 13 refs" in about["differences"]["a_unc/train"][0] and about["absent"] == []


def test_refs_that_cannot_be_used_hold_their_images_out_all_the_same(tmp_path):
    """Raw, prepared with what is left out, and in gRefCOCO, where they have no sentences."""
    root = write_sets(tmp_path / "raw")
    path = root / "b" / "refs(unc).json"
    refs = json.loads(path.read_text())
    validation = [ref for ref in refs if ref["split"] == "val"]
    more = {"split": "val", "image_id": 1000003, "sent_ids": [1]}
    more["sentences"] = [{"sent_id": 1, "raw": "it", "sent": "it"}]
    for ref in (more | {"ref_id": 1, "ann_id": 1}, more | {"ref_id": 2, "ann_id": 2}):
        refs.append(validation[0] | ref)
    path.write_text(json.dumps(refs))
    shards = tmp_path / "shards"
    for name in SETS:
        dataset, split_by = name.split("_")
        assert preparing.run(
            "refer", "--root", root, "--dataset", dataset, "--split_by", split_by,
            "--out", shards / name, "--partial", "--workers", 1,
        ) == 0  # fmt: skip
    for refs_name in ("refs", "grefs"):
        if refs_name == "grefs":
            silent = [ref | ({"sentences": []} if ref["ref_id"] in (1, 2) else {}) for ref in refs]
            path.unlink()
            path.with_name("grefs(unc).json").write_text(json.dumps(silent))
        for place in (root, shards):
            each = {name: sets.open_set(str(place), name, partial=True) for name in SETS}
            train = sets.merged_splits(each)["train"]
            assert {train[i].image_id for i in range(len(train))} == {1000000}


def test_merged_sets_have_the_texts_that_are_asked_for(tmp_path, capsys):
    root, out = write_sets(tmp_path / "root"), tmp_path / "out"
    for path in root.glob("[abc]/refs*.json"):
        refs = json.loads(path.read_text())
        for sentence in (said for ref in refs for said in ref["sentences"]):
            sentence["sent"] = f"cleaned {sentence['sent']}"
        path.write_text(json.dumps(refs))
    merge = ("merged", "--root", root, "--sets", ",".join(SETS), "--workers", 1, "--out", out)
    assert preparing.run(*merge, "--text_field", "sent") == 0
    raw, sent = (sets.open_merged(str(root), SETS, "train", field) for field in ("raw", "sent"))
    assert raw[0].sentences != sent[0].sentences
    preparing.assert_same_source(sets.open_merged(str(out), SETS, "train", "sent"), sent)
    with pytest.raises(UserError, match="the texts 'sent' of its sentences, not 'raw'"):
        sets.open_merged(str(out), SETS, "train")
    page = ["--out", str(tmp_path / "page.html")]
    assert inspect.main(["prepared", "--root", str(out), *page]) == 0
    capsys.readouterr()
    within = ["merged", "--root", str(tmp_path / "sets"), "--sets", "a_unc", *page]
    assert preparing.run(
        "refer", "--root", root, "--dataset", "a", "--out", tmp_path / "sets" / "a_unc",
        "--text_field", "sent", "--workers", 1,
    ) == 0  # fmt: skip
    assert inspect.main(within) == 2 and "not 'raw'" in capsys.readouterr().err
    assert inspect.main([*within, "--text_field", "sent"]) == 0


def test_splits_that_hold_nothing_out_are_said_to_be_missing(root, caplog, monkeypatch):
    counts = {("a", "unc"): dict.fromkeys(("train", "val", "testA"), (1, 1, 1))}
    monkeypatch.setattr(sets, "KNOWN_COUNTS", counts)
    merged = sets.open_merged(root, SETS, "train")
    assert merged.absent == ["a_unc/testA"]
    assert "BUT a_unc/testA are not here" in caplog.text
