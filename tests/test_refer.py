import copy
import json
import logging
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from configs import cris, lavt
from refseg_jax import data
from refseg_jax.data import annotations, refer, shapes
from refseg_jax.data.refer import ReferSource
from refseg_jax.errors import UserError

HEIGHT, WIDTH = 20, 30
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]  # x 2..12, y 2..12
OVERLAPPING = [8, 8, 18, 8, 18, 18, 8, 18]


def box_mask(*boxes):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


def uncompressed(mask):
    """COCO's uncompressed run-length code: column-major, the first run is background."""
    pixels = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(pixels, prepend=False)).tolist()
    return {
        "size": list(mask.shape),
        "counts": np.diff([0, *edges, pixels.size]).tolist(),
    }


def compressed(mask):
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": code["counts"].decode()}


def small_set():
    """Refs and instances: one image, a ref per kind of segmentation, five sentences."""
    rle = box_mask((3, 4, 9, 15))
    segmentations = [
        [SQUARE],
        [SQUARE, OVERLAPPING],
        uncompressed(rle),
        compressed(rle),
    ]
    refs = [
        {
            "ref_id": 10 + i,
            "ann_id": 100 + i,
            "image_id": 7,
            "category_id": 1,
            "split": "testA" if i == 3 else "train",
            "file_name": "COCO_not_the_image_name_0.jpg",
            "sent_ids": [],
            "sentences": [
                {"sent_id": 1000 + 10 * i + k, "raw": f" Box {i} {k}", "sent": f"box {i} {k}"}
                for k in range(1 + i % 2)
            ],
        }
        for i in range(len(segmentations))
    ]
    instances = {
        "images": [{"id": 7, "file_name": "seven.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": 100 + i, "image_id": 7, "category_id": 1, "segmentation": segmentation}
            for i, segmentation in enumerate(segmentations)
        ],
        "categories": [{"id": 1, "name": "box"}],
    }
    return refs, instances


def write(root, refs, instances, suffix="json"):
    folder = root / "mine"
    images = root / "images" / "mscoco" / "train2014"
    folder.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    (folder / "instances.json").write_text(json.dumps(instances))
    content = json.dumps(refs).encode() if suffix == "json" else pickle.dumps(refs, protocol=2)
    (folder / f"refs(unc).{suffix}").write_bytes(content)
    Image.new("RGB", (WIDTH, HEIGHT), (0, 0, 255)).save(images / "seven.jpg")
    return root


def test_what_a_file_is_its_contents_say(tmp_path):
    for name, contents in (("a.JSON", b"[1]"), ("b.p", b" [1]"), ("c.json", b"[1]")):
        (tmp_path / name).write_bytes(contents)
        assert annotations.read(tmp_path / name) == [1]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value in ([1], {"a": [2]}, []):
            (tmp_path / "refs.p").write_bytes(pickle.dumps(value, protocol))
            assert annotations.read(tmp_path / "refs.p") == value


def load(root, split="train", **options):
    return ReferSource(root, "mine", "unc", split, **options)


@pytest.mark.parametrize("suffix", ["json", "p"])
def test_reads_refs_sentences_and_images(tmp_path, suffix, caplog):
    source = load(write(tmp_path, *small_set(), suffix))
    assert (source.name, source.split, len(source)) == ("mine", "train", 3)
    assert source.num_sentences == 4
    assert [source.locate(j) for j in range(4)] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    for j in (-1, 4):
        with pytest.raises(IndexError):
            source.locate(j)
    ref = source[1]
    assert (ref.ref_id, ref.image_id, ref.ann_ids, ref.category, ref.split) == (
        *(11, 7, (101,)),
        *("box", "train"),
    )
    assert [(s.text, s.sent_id) for s in ref.sentences] == [("Box 1 0", 1010), ("Box 1 1", 1011)]
    assert load(tmp_path, text_field="sent")[1].sentences[0].text == "box 1 0"
    for recipe, text in ((lavt, "Box 1 0"), (cris, "box 1 0")):
        config = recipe.get_config("refcoco").data
        config.update(root=str(tmp_path), dataset="mine", split_by="unc")
        assert data.open_source(config, "train")[1].sentences[0].text == text
    image = source.image(ref)
    assert image.shape == (HEIGHT, WIDTH, 3) and image.dtype == np.uint8
    assert image[0, 0].argmax() == 2
    assert not caplog.records  # nothing is known about this dataset's counts


def test_masks_of_every_kind(tmp_path):
    write(tmp_path, *small_set())
    source = load(tmp_path)
    assert source.mask(source[0]).dtype == bool
    np.testing.assert_array_equal(source.mask(source[0]), box_mask((2, 2, 12, 12)))
    both = box_mask((2, 2, 12, 12), (8, 8, 18, 18))
    np.testing.assert_array_equal(source.mask(source[1]), both)
    for ref_source, i in ((source, 2), (load(tmp_path, "testA"), 0)):
        rle = ref_source.mask(ref_source[i])
        np.testing.assert_array_equal(rle, box_mask((3, 4, 9, 15)))
    summed = load(tmp_path, compat_sum_polygons=True)
    np.testing.assert_array_equal(summed.mask(summed[1]), both & ~box_mask((8, 8, 12, 12)))


def test_degenerate_polygons_are_no_boxes(tmp_path):
    refs, instances = small_set()
    instances["annotations"][0]["segmentation"] = [[0, 0, 25, 19], SQUARE]
    source = load(write(tmp_path, refs, instances))
    np.testing.assert_array_equal(source.mask(source[0]), box_mask((2, 2, 12, 12)))


def test_split_names_are_exact(tmp_path):
    refs, instances = small_set()
    refs[0]["split"] = "testAB"
    write(tmp_path, refs, instances)
    assert [ref.ref_id for ref in map(load(tmp_path, "testA").__getitem__, [0])] == [13]
    assert len(load(tmp_path, "testA")) == len(load(tmp_path, "testAB")) == 1
    with pytest.raises(UserError, match=r"'test'.*testA \(1 refs\), testAB \(1 refs\), train"):
        load(tmp_path, "test")


@pytest.mark.parametrize(
    "missing", ["mine", "mine/instances.json", "mine/refs(unc).json", "images/mscoco/train2014"]
)
def test_missing_files_are_named_with_where_to_get_them(tmp_path, missing):
    path = write(tmp_path, *small_set()) / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError) as error:
        load(tmp_path)
    for part in (missing, "is missing", "cocodataset.org", "github.com/lichengunc/refer"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def without_image(refs, instances):
    instances["images"].clear()


def without_annotation(refs, instances):
    del instances["annotations"][0]


def on_another_image(refs, instances):
    instances["annotations"][0]["image_id"] = 8


def without_polygons(refs, instances):
    instances["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]


def without_sentences(refs, instances):
    refs[0]["sentences"] = []


def with_an_empty_sentence(refs, instances):
    refs[1]["sentences"][1]["raw"] = " \t"


def without_image_file(refs, instances):
    instances["images"][0]["file_name"] = "eight.jpg"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_image, "3 of 3 refs .*ref 10: image 7 is not in.*; ref 12: image 7"),
        (without_annotation, "1 of 3 refs .*ref 10: annotation 100 is not in"),
        (on_another_image, "ref 10: annotation 100 belongs to another image than 7"),
        (without_polygons, "ref 10: annotation 100 has no polygon"),
        (without_sentences, "ref 10: it has no sentences"),
        (with_an_empty_sentence, "ref 11: sentence 1011 is empty"),
        (without_image_file, "ref 10: image file eight.jpg is missing.*cocodataset.org"),
    ],
)
def test_faulty_annotations_are_gathered(tmp_path, spoil, message):
    refs, instances = small_set()
    spoil(refs, instances)
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, refs, instances))


def test_many_faults_are_counted_and_the_first_listed(tmp_path):
    refs, instances = small_set()
    refs = [copy.deepcopy(refs[0]) | {"ref_id": i, "image_id": -1} for i in range(50)]
    with pytest.raises(UserError, match=r"50 of 50 refs.*ref 4: image -1 .*; \.\.\.") as error:
        load(write(tmp_path, refs, instances))
    assert "ref 5:" not in str(error.value)


def test_damaged_images_are_named(tmp_path):
    source = load(write(tmp_path, *small_set()))
    path = tmp_path / "images" / "mscoco" / "train2014" / "seven.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="seven.jpg"):
        source.image(source[0])
    Image.new("RGB", (WIDTH, WIDTH)).save(path)
    with pytest.raises(UserError, match="seven.jpg is 30 x 30 .* 20 x 30"):
        source.image(source[0])
    path.unlink()
    with pytest.raises(UserError, match="no image file .*seven.jpg"):
        source.image(source[0])


@pytest.mark.parametrize(
    "segmentation",
    [
        compressed(np.eye(99, dtype=bool)) | {"size": [HEIGHT, WIDTH]},
        {"size": [HEIGHT, WIDTH], "counts": [5, 5]},
        {"size": [5, 5], "counts": [5, 20]},
        {"counts": [5, 20]},
        [["a"] * 6],
    ],
)
def test_undecodable_segmentations_are_named(tmp_path, segmentation):
    refs, instances = small_set()
    instances["annotations"][0]["segmentation"] = segmentation
    source = load(write(tmp_path, refs, instances))
    with pytest.raises(UserError, match="annotation 100"):
        source.mask(source[0])


class _Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_run_no_code(tmp_path, protocol):
    refs, instances = small_set()
    write(tmp_path, refs, instances, "p")
    path = tmp_path / "mine" / "refs(unc).p"
    touched = tmp_path / "touched"

    path.write_bytes(pickle.dumps([*refs, _Malice(touched)], protocol))
    with pytest.raises(UserError, match=rf"refs\(unc\).p .*{os.name}.system.*not plain data"):
        load(tmp_path)
    assert not touched.exists()

    for content, what in ((pickle.dumps(bytearray(b"a"), 5), "a bytearray"), (b"}}b.", "state")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"it holds .*{what}, which is not plain data"):
            load(tmp_path)

    pairs = b"]}(" + b")" + b"2\x86" * 60 + b"K\x01u."  # A name whose hash takes for ever.
    path.write_bytes(b"\x80\x02" + pairs)
    with pytest.raises(UserError, match="tuples within tuples"):
        load(tmp_path)

    refs[0]["extra"] = [((1, 2), 3), {1}, frozenset({2}), b"\xff\x00", 1.5, None, (True, 1 << 70)]
    path.write_bytes(pickle.dumps(refs, protocol))
    assert annotations.read(path) == refs


def test_python_2_strings_are_text(tmp_path):
    # {'caf\xc3\xa9': u'caf\xe9'} as Python 2 wrote it at protocol 2, then the same as latin-1.
    path = tmp_path / "refs.p"
    path.write_bytes(b"\x80\x02}U\x05caf\xc3\xa9X\x05\x00\x00\x00caf\xc3\xa9s.")
    assert annotations.read(path) == {"café": "café"}
    path.write_bytes(b"\x80\x02U\x04caf\xe9.")
    assert annotations.read(path) == "café"


def nested(depth):
    """A list that would be 10 ** depth numbers long if it were written out."""
    value = [1] * 10
    for _ in range(depth):
        value = [value] * 10
    return value


@pytest.mark.parametrize(
    "value", [10**5000, -(2**63) - 1, nested(10)], ids=["long", "wide", "deep"]
)
@pytest.mark.parametrize("field", ["ann_id", "image_id", "sent_id", "kind"])
def test_values_that_cannot_be_written_out(tmp_path, field, value):
    refs, instances = small_set()
    (refs[0]["sentences"][0] if field in ("sent_id", "kind") else refs[0])[field] = value
    root = write(tmp_path, refs, instances, "p")
    if field == "kind":  # Of no use, and no harm.
        assert load(root)[0].sentences[0].kind == ""
        return
    with pytest.raises(UserError) as error:
        load(root)
    assert len(str(error.value)) < 1000


def test_an_annotation_without_an_outline_is_no_reason_to_stop(tmp_path):
    refs, instances = small_set()
    instances["annotations"] += [
        {"id": 900, "image_id": 7, "bbox": [1, 2, 3, 4]},
        {"id": 901, "image_id": 7, "segmentation": None},
    ]
    del instances["categories"]
    assert load(write(tmp_path, refs, instances))[0].category == ""
    refs[0]["ann_id"] = 900
    with pytest.raises(UserError, match="annotation 900 has no polygon and no run-length code"):
        load(write(tmp_path, refs, instances))


def test_image_folders_may_be_links(tmp_path):
    refs, instances = small_set()
    instances["images"][0]["file_name"] = "00/seven.jpg"
    root = write(tmp_path, refs, instances)
    images = root / "images" / "mscoco" / "train2014"
    (root / "elsewhere").mkdir()
    (images / "seven.jpg").rename(root / "elsewhere" / "seven.jpg")
    (images / "00").symlink_to(root / "elsewhere")
    (images / "back").symlink_to(images)  # Leads nowhere new.
    source = load(root)
    assert source.image(source[0]).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("refs(unc).json", b"[{"),
        ("refs(unc).json", b"\xff\xfe\x00"),
        ("refs(unc).json", b"{}"),
        ("refs(unc).json", b"[1, 2]"),
        ("refs(unc).json", b'[{"ref_id": 1, "ann_id": [3]}]'),
        ("refs(unc).json", b"[" * 100_000),
        ("refs(unc).json", b"[]"),
        ("instances.json", b""),
        ("instances.json", b"[]"),
        ("instances.json", b'{"images": 3}'),
        ("instances.json", b'{"images": [], "annotations": [{"id": 1}], "categories": []}'),
    ],
)
def test_garbage_is_named(tmp_path, name, content):
    (write(tmp_path, *small_set()) / "mine" / name).write_bytes(content)
    with pytest.raises(UserError, match=name.replace("(", r"\(").replace(")", r"\)")):
        load(tmp_path)


def test_damaged_pickles_are_named(tmp_path):
    path = write(tmp_path, *small_set(), "p") / "mine" / "refs(unc).p"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:n] for n in rng.integers(0, len(whole), 20)]
    damaged += [rng.bytes(200) for _ in range(100)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"refs\(unc\).p"):
            load(tmp_path)


def test_only_partial_splits_warn(tmp_path, caplog, monkeypatch):
    write(tmp_path, *small_set())
    with caplog.at_level(logging.WARNING):
        monkeypatch.setitem(refer.KNOWN_COUNTS, ("mine", "unc"), {"train": (3, 1, 4)})
        load(tmp_path)
        monkeypatch.setitem(refer.KNOWN_COUNTS, ("mine", "unc"), {"train": (3, 1, None)})
        load(tmp_path)
        assert not caplog.records
        monkeypatch.setitem(refer.KNOWN_COUNTS, ("mine", "unc"), {"train": (9, 1, 12)})
        load(tmp_path)
    (record,) = caplog.records
    assert record.getMessage().endswith("it has 3 of 9 refs, 4 of 12 sentences")


def test_the_embedded_data_written_out_reads_back_the_same(tmp_path):
    shapes.write_refer(tmp_path, num_scenes={"train": 3, "testB": 2}, size=96)
    for split, num_scenes in (("train", 3), ("testB", 2)):
        drawn = shapes.ShapesSource(split, num_scenes=num_scenes, size=96)
        read = ReferSource(tmp_path, shapes.NAME, "unc", split)
        assert (read.name, read.split) == (drawn.name, drawn.split)
        assert (len(read), read.num_sentences) == (len(drawn), drawn.num_sentences)
        pairs = range(read.num_sentences)
        assert [read.locate(j) for j in pairs] == [drawn.locate(j) for j in pairs]
        for i in range(len(read)):
            assert read[i] == drawn[i]
            np.testing.assert_array_equal(read.image(read[i]), drawn.image(drawn[i]))
            np.testing.assert_array_equal(read.mask(read[i]), drawn.mask(drawn[i]))


SPLITS = {"train": 26, "val": 16, "testA": 6, "testB": 11}


def smoke(test_data, split, **options):
    return ReferSource(test_data / "data" / "refcoco_smoke", "refcoco", "unc", split, **options)


def test_real_photographs(test_data, caplog):
    folder = test_data / "data" / "refcoco_smoke" / "refcoco"
    raw = {ref["ref_id"]: ref for ref in json.loads((folder / "refs(unc).json").read_text())}
    instances = json.loads((folder / "instances.json").read_text())
    areas = {annotation["id"]: annotation["area"] for annotation in instances["annotations"]}
    sources = [smoke(test_data, split) for split in SPLITS]
    assert [len(source) for source in sources] == list(SPLITS.values())
    assert sum(source.num_sentences for source in sources) == 129
    assert len(caplog.records) == 4 and "26 of 42404 refs" in caplog.text
    for source in sources:
        for ref in (source[i] for i in range(len(source))):
            entry = raw.pop(ref.ref_id)
            assert (ref.image_id, ref.ann_ids) == (entry["image_id"], (entry["ann_id"],))
            assert [s.text for s in ref.sentences] == [s["raw"] for s in entry["sentences"]]
            image, mask = source.image(ref), source.mask(ref)
            assert image.shape == (*mask.shape, 3)
            assert mask.sum() == pytest.approx(areas[ref.ann_ids[0]], rel=0.06, abs=20)
    assert not raw


def test_real_crowds_are_run_length_codes(test_data, tmp_path):
    real = test_data / "data" / "refcoco_smoke"
    instances = json.loads((real / "refcoco" / "instances.json").read_text())
    crowds = [a for a in instances["annotations"] if isinstance(a["segmentation"], dict)]
    assert len(crowds) == 3
    refs, _ = small_set()
    refs = [
        refs[0] | {"ann_id": a["id"], "image_id": a["image_id"], "category_id": a["category_id"]}
        for a in crowds
    ]
    write(tmp_path, refs, instances)
    shutil.copytree(real / "images", tmp_path / "images", dirs_exist_ok=True)
    source = load(tmp_path)
    for i, crowd in enumerate(crowds):
        mask = source.mask(source[i])
        assert mask.sum() == sum(crowd["segmentation"]["counts"][1::2])
        assert source.image(source[i]).shape == (*mask.shape, 3)
