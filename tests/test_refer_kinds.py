"""What not every dataset of the `refer` layout has: several targets or none, other images, gaps."""

import json
import shutil

import numpy as np
import pytest

from refseg_jax.data.refer import ReferSource
from refseg_jax.data.shards import PreparedSource
from refseg_jax.errors import UserError
from tests import preparing
from tests.test_refer import HEIGHT, WIDTH, box_mask, load, small_set, write


def test_several_targets_or_none(tmp_path, caplog, capsys):
    """gRefCOCO: the mask is the union of all targets, and empty where there is none."""
    refs, instances = small_set()
    instances["annotations"][1]["category_id"] = 2
    instances["categories"].append({"id": 2, "name": "corner"})
    refs[0] |= {"ann_id": [100, 101, 102], "category_id": [1, 2, 1]}
    refs[1] |= {"ann_id": [-1], "category_id": [-1], "no_target": True}
    refs[2] |= {"ann_id": [102], "category_id": [1]}
    folder = write(tmp_path, refs, instances) / "mine"
    (folder / "refs(unc).json").rename(folder / "grefs(unc).json")
    source = load(tmp_path)
    assert [source[i].ann_ids for i in range(3)] == [(100, 101, 102), (), (102,)]
    assert [source[i].category for i in range(3)] == ["", "", "box"]
    union = box_mask((2, 2, 12, 12), (8, 8, 18, 18), (3, 4, 9, 15))
    np.testing.assert_array_equal(source.mask(source[0]), union)
    assert source.mask(source[1]).shape == (HEIGHT, WIDTH) and not source.mask(source[1]).any()
    np.testing.assert_array_equal(source.mask(source[2]), box_mask((3, 4, 9, 15)))

    assert preparing.run(
        "refer", "--root", tmp_path, "--dataset", "mine", "--out", tmp_path / "out", "--workers", 1
    ) == 0  # fmt: skip
    preparing.assert_same_source(PreparedSource(tmp_path / "out", "train"), source)
    manifest = preparing.manifest(tmp_path / "out")
    assert manifest["splits"]["train"]["without_target"] == 1 and manifest["blank"] == {}
    assert "without_sentences" not in manifest["source"]

    # The published file has refs without sentences, which are for nothing.
    refs[2]["sentences"] = []
    (folder / "grefs(unc).json").write_text(json.dumps(refs))
    shorter = load(tmp_path)
    assert [shorter[i] for i in range(len(shorter))] == [source[0], source[1]]
    assert "grefs(unc).json: 1 refs without sentences are left out" in caplog.text
    shutil.rmtree(tmp_path / "out")
    assert preparing.run(
        "refer", "--root", tmp_path, "--dataset", "mine", "--out", tmp_path / "out", "--workers", 1
    ) == 0  # fmt: skip
    assert "1 refs without sentences are left out\n" in capsys.readouterr().err
    assert preparing.manifest(tmp_path / "out")["source"]["without_sentences"] == 1


@pytest.mark.parametrize("ann_id", [[], ["1"], [[100]], [True], [100, -1]])
def test_targets_that_cannot_be(tmp_path, ann_id):
    refs, instances = small_set()
    refs[0]["ann_id"] = ann_id
    with pytest.raises(UserError, match="ref 10: (its ann_id|annotation -1)"):
        load(write(tmp_path, refs, instances))


def test_referit_has_its_own_images(tmp_path):
    refs, instances = small_set()
    instances["images"][0]["file_name"] = "01/images/7.jpg"
    write(tmp_path, refs, instances)
    (tmp_path / "mine").rename(tmp_path / "refclef")
    (tmp_path / "refclef" / "refs(unc).json").rename(tmp_path / "refclef" / "refs(berkeley).json")
    folder = tmp_path / "images" / "saiapr_tc-12" / "01" / "images"
    folder.mkdir(parents=True)
    (tmp_path / "images" / "mscoco" / "train2014" / "seven.jpg").rename(folder / "7.jpg")
    source = ReferSource(tmp_path, "refclef", "berkeley", "train")
    assert source.image(source[0]).shape == (HEIGHT, WIDTH, 3)


def test_an_id_that_stands_for_two_things_is_named(tmp_path):
    refs, instances = small_set()
    instances["annotations"].append(instances["annotations"][0])  # The same thing again.
    assert len(load(write(tmp_path, refs, instances))) == 3
    instances["annotations"].append(instances["annotations"][1] | {"id": 100})
    with pytest.raises(UserError, match="annotations: id 100 stands for two different records"):
        load(write(tmp_path, refs, instances))


def test_one_annotation_of_minus_one_is_no_target_in_grefcoco_alone(tmp_path):
    refs, instances = small_set()
    refs[0]["ann_id"] = [-1]
    assert load(write(tmp_path / "list", refs, instances))[0].ann_ids == ()
    refs[0]["ann_id"] = -1
    root = write(tmp_path, refs, instances)
    with pytest.raises(UserError, match="ref 10: annotation -1 is not in instances.json"):
        load(root)
    (root / "mine" / "refs(unc).json").rename(root / "mine" / "grefs(unc).json")
    assert [ref.ann_ids for ref in load(root)][0] == ()


def test_refs_that_cannot_be_used_are_left_out_on_request(tmp_path):
    refs, instances = small_set()
    del instances["annotations"][0]
    source = load(write(tmp_path, refs, instances), partial=True)
    assert [source[i].ref_id for i in range(2)] == [11, 12]
    assert source.faults == ("ref 10: annotation 100 is not in instances.json",)
