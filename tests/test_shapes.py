"""The embedded dataset: deterministic, true to what it says, and the same after a round trip."""

import collections
import json
import math
import pickle
import pickletools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from refseg_jax.data import grammar, scenes, shapes
from refseg_jax.errors import UserError

SPLITS = tuple(shapes.NUM_SCENES)


def _first(split, num_scenes, **kwargs):
    source = shapes.ShapesSource(split, num_scenes=num_scenes, **kwargs)
    return source, [source[i] for i in range(len(source))]


def _forget():
    shapes._scene.cache_clear()
    shapes._drawings.cache_clear()


def test_same_seed_same_samples():
    source, refs = _first("train", 4)
    drawn = [(source.image(ref), source.mask(ref)) for ref in refs]
    _forget()
    again = pickle.loads(pickle.dumps(shapes.ShapesSource("train", num_scenes=9)))
    for i in reversed(range(len(refs))):  # in another order, from a longer source
        assert again[i] == refs[i]
        np.testing.assert_array_equal(again.image(refs[i]), drawn[i][0])
        np.testing.assert_array_equal(again.mask(refs[i]), drawn[i][1])


def test_splits_are_disjoint():
    layouts, ids = set(), []
    for split in SPLITS:
        source, refs = _first(split, 30)
        layouts |= {source.scene(ref).shapes for ref in refs}
        ids += [ref.ref_id for ref in refs]
        assert {ref.split for ref in refs} == {split}
    assert len(layouts) == 30 * len(SPLITS)
    assert len(set(ids)) == len(ids) == 30 * len(SPLITS) * shapes.REFS_PER_SCENE


def test_source_arithmetic():
    source, refs = _first("val", 5)
    assert len(refs) == 5 * shapes.REFS_PER_SCENE
    assert source.num_sentences == sum(len(ref.sentences) for ref in refs)
    flat = [(i, k) for i, ref in enumerate(refs) for k in range(len(ref.sentences))]
    assert [source.locate(j) for j in range(source.num_sentences)] == flat
    for call, j in ((source.locate, source.num_sentences), (source.__getitem__, len(source))):
        for index in (j, -1):
            with pytest.raises(IndexError):
                call(index)


@pytest.mark.parametrize(
    ("split", "kwargs"), [("test", {}), ("val", {"num_scenes": 0}), ("val", {"size": 8})]
)
def test_bad_arguments(split, kwargs):
    with pytest.raises(UserError, match="shapes"):
        shapes.ShapesSource(split, **kwargs)


@pytest.mark.parametrize("split", SPLITS)
def test_every_expression_means_its_ref_and_nothing_else(split):
    source, refs = _first(split, 40)
    said = {}
    for ref in refs:
        scene = source.scene(ref)
        things = [shape.thing for shape in scene.shapes]
        meant, expressions = scene.refs[ref.ref_id % 10]
        assert ref.category == scene.shapes[meant].category
        assert len({sentence.text for sentence in ref.sentences}) == shapes.SENTENCES_PER_REF
        for expression in expressions:
            assert grammar.execute(expression.program, things) == (meant,), expression
            assert said.setdefault((ref.image_id, expression.text), meant) == meant
            # A second opinion that shares no code with the grammar: what the words say is true.
            _check_words(expression, scene, meant)
        texts = [(s.text, s.kind) for s in ref.sentences]
        assert texts == [(e.text, e.kind) for e in expressions]


def _check_words(expression, scene, meant):
    shape = scene.shapes[meant]
    if expression.kind in ("attribute", "place"):
        words = set(expression.text.split())
        assert not (words & set(scenes.COLORS)) - {shape.color}
        assert not (words & {"small", "little"}) or shape.size == "small"
        assert "left" not in words or shape.x < 0.45
        assert "right" not in words or shape.x > 0.55
        assert not (words & {"top", "upper"}) or shape.y < 0.45
        assert not (words & {"bottom", "lower"}) or shape.y > 0.55
    if expression.kind == "place":  # It is the only such thing there.
        facts = set(expression.program.among.facts)
        assert not [
            other
            for other in scene.shapes
            if other is not shape
            and facts <= other.thing.facts.items()
            and ("left" not in words or other.x < 0.45)
            and ("right" not in words or other.x > 0.55)
            and (not words & {"top", "upper"} or other.y < 0.45)
            and (not words & {"bottom", "lower"} or other.y > 0.55)
            and (
                not words & {"middle", "center"}
                or max(abs(other.x - 0.5), abs(other.y - 0.5)) < 0.2
            )
        ]
    if expression.kind in ("superlative", "ordinal"):
        among = [
            other
            for other in scene.shapes
            if set(expression.program.among.facts) <= other.thing.facts.items()
        ]
        key, rank = expression.program.key, expression.program.rank
        by = {
            "left": lambda s: s.x,
            "right": lambda s: -s.x,
            "top": lambda s: s.y,
            "bottom": lambda s: -s.y,
            "biggest": lambda s: -s.radius,
            "smallest": lambda s: s.radius,
        }[key]
        among.sort(key=by)
        assert among[rank] is shape
        for other in among:  # margins: a tenth of the side, a fifth in size
            if other is not shape and key in ("biggest", "smallest"):
                assert abs(math.log(other.radius / shape.radius)) > math.log(1.15)
                areas = [scenes.AREAS[s.category] * s.radius**2 for s in (other, shape)]
                assert (areas[0] < areas[1]) == (key == "biggest")
            elif other is not shape:
                assert abs(by(other) - by(shape)) >= 0.1 - 1e-9
    if expression.kind == "relation":
        things = [s.thing for s in scene.shapes]
        anchor = scene.shapes[grammar.execute(expression.program.anchor, things)[0]]
        assert anchor is not shape
        relation = expression.program.relation
        dx, dy = shape.x - anchor.x, shape.y - anchor.y
        checks = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
        assert checks.get(relation, 0.4 - math.hypot(dx, dy)) > 0.04


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", dict(zip(grammar.KINDS, (0.45, 0.2, 0.1, 0.1, 0.15), strict=True))),
        ("testA", {"attribute": 0.7, "place": 0.3}),
        ("testB", {"ordinal": 0.4, "relation": 0.6}),
    ],
)
def test_kinds(split, expected):
    _, refs = _first(split, 80)
    counts = collections.Counter(s.kind for ref in refs for s in ref.sentences)
    shares = {kind: count / counts.total() for kind, count in counts.items()}
    assert shares == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("size", [48, 128, 200])
def test_masks_are_the_visible_parts(size):
    source, refs = _first("train", 25, size=size)
    hidden = 0
    for ref in refs:
        image, mask, scene = source.image(ref), source.mask(ref), source.scene(ref)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert mask.shape == (size, size) and mask.dtype == bool
        k = ref.ann_ids[0] % 10
        full = np.zeros_like(mask)
        box, alpha = scenes._coverage(scene.shapes[k], size)
        full[box] = alpha > 0.5
        assert 0 < mask.sum() <= full.sum() and not np.any(mask & ~full)
        assert mask.sum() >= 0.5 * full.sum()
        hidden += mask.sum() < full.sum() - 2
        others = [source.object_mask(ref, j) for j in range(len(scene.shapes)) if j != k]
        assert not np.any(mask & np.any(others, axis=0))
    assert hidden >= 3  # some shapes lie behind others


def test_colours_are_where_the_masks_say():
    source, refs = _first("val", 30)
    for ref in refs:
        shape = source.scene(ref).shapes[ref.ann_ids[0] % 10]
        if shape.texture == "plain":
            seen = np.median(source.image(ref)[source.mask(ref)], axis=0)
            distance = {
                name: np.abs(seen - np.array(color)).sum() for name, color in scenes.COLORS.items()
            }
            assert min(distance, key=distance.get) == shape.color


@pytest.mark.parametrize("category", sorted(scenes.SILHOUETTES))
def test_silhouettes_have_the_areas_of_the_table(category):
    at = np.linspace(-1.2, 1.2, 481)
    area = (scenes.SILHOUETTES[category](at[None, :], at[:, None]) < 0).mean() * 2.4**2
    assert scenes.AREAS[category] == pytest.approx(area, rel=0.01)


@pytest.mark.parametrize("category", sorted(scenes.SILHOUETTES))
def test_silhouettes_are_distances(category):
    """Within the radius (and the drawn box), and with unit slope where anti-aliasing reads them."""
    at = np.linspace(-1.3, 1.3, 521, dtype=np.float32)
    x, y = np.meshgrid(at, at)
    distance = scenes.SILHOUETTES[category](x, y)
    assert np.hypot(x, y)[distance <= 0].max() < 1.19
    slopes = np.hypot(*np.gradient(distance, at, at))[np.abs(distance) < 0.02]
    assert abs(np.median(slopes) - 1) < 0.02
    assert 0.25 < (distance <= 0).mean() * 2.6**2 / math.pi < 0.95  # of the disc's area


# The grammar by itself, on things of which nothing but the category is known.


def _thing(category, x, y, size=0.2):
    return grammar.Thing({"category": category}, x, y, size)


THREE = [_thing("teddy bear", 0.2, 0.5), _thing("teddy bear", 0.5, 0.5), _thing("dog", 0.8, 0.5)]
BEARS = grammar.Filter((("category", "teddy bear"),))
DOG = grammar.Filter((("category", "dog"),))


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (grammar.Filter(), (0, 1, 2)),
        (BEARS, (0, 1)),
        (grammar.Pick(BEARS, "left"), (0,)),
        (grammar.Pick(BEARS, "right"), (1,)),
        (grammar.Pick(BEARS, "right", limit=0.4), ()),  # the right bear is not on the right
        (grammar.Pick(BEARS, "left", rank=2), ()),
        (grammar.Pick(grammar.Filter(), "left", rank=1), (1,)),
        (grammar.Pick(grammar.Filter(), "top"), (0, 1, 2)),  # a tie
        (grammar.Pick(grammar.Filter(), "biggest"), (0, 1, 2)),
        (grammar.Relate(BEARS, "left of", DOG), (0, 1)),
        (grammar.Relate(BEARS, "next to", DOG), (1,)),
        (grammar.Relate(DOG, "right of", BEARS), ()),  # which bear?
        (grammar.Relate(BEARS, "above", DOG), ()),
    ],
)
def test_execute(program, expected):
    assert grammar.execute(program, THREE) == expected


def test_writes_for_things_without_adjectives():
    rng = np.random.default_rng(0)
    lexicon = grammar.Lexicon()
    kinds = dict.fromkeys(grammar.KINDS, 1.0)
    found = [grammar.write(rng, THREE, i % 3, lexicon, kinds) for i in range(60)]
    assert {expression.kind for expression in found} == set(grammar.KINDS)
    for i, expression in enumerate(found):
        assert grammar.execute(expression.program, THREE) == (i % 3,)
    spoken = {word for expression in found for word in expression.text.split()}
    assert spoken <= {*lexicon.words, "teddy", "bear", "dog"}
    twins = [_thing("dog", 0.5, 0.5), _thing("dog", 0.52, 0.5)]
    assert grammar.write(rng, twins, 0, lexicon, kinds) is None


# Writing out.


def _masks_for_polygons():
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (1, 7), (9, 5), (24, 31)):
        for density in (0.1, 0.5, 0.9, 1):
            yield rng.random(shape) < density
    ring = np.ones((9, 9), bool)
    ring[3:6, 2:5] = False
    yield ring


def test_polygons_are_exact():
    for mask in _masks_for_polygons():
        if mask.any():
            polygons = shapes.mask_to_polygons(mask)
            assert all(len(polygon) >= 8 for polygon in polygons)
            covered = shapes.coco.decode(
                shapes.coco.merge(shapes.coco.frPyObjects(polygons, *mask.shape))
            )
            np.testing.assert_array_equal(covered, mask)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("refer")
    counts = {"train": 6, "val": 3, "testA": 2, "testB": 2}
    return root, counts, shapes.write_refer(root, num_scenes=counts)


def test_pycocotools_reads_the_same_masks_and_images(written):
    root, counts, summary = written
    instances = COCO(root / "shapes" / "instances.json")
    refs = pickle.loads((root / "shapes" / "refs(unc).p").read_bytes())
    assert summary["rle"] == 0
    assert summary["images"] == sum(counts.values()) == len(instances.imgs)
    assert summary["refs"] == len(refs) == sum(counts.values()) * shapes.REFS_PER_SCENE
    records = {record["ref_id"]: record for record in refs}
    for split, count in counts.items():
        source, drawn = _first(split, count)
        for ref in drawn:
            record = records[ref.ref_id]
            assert (record["image_id"], record["split"]) == (ref.image_id, split)
            assert [s["sent"] for s in record["sentences"]] == [s.text for s in ref.sentences]
            assert record["sent_ids"] == [s.sent_id for s in ref.sentences]
            file_name = instances.imgs[ref.image_id]["file_name"]
            with Image.open(root / "images" / "mscoco" / "train2014" / file_name) as image:
                np.testing.assert_array_equal(np.asarray(image), source.image(ref))
            annotation = instances.anns[record["ann_id"]]
            np.testing.assert_array_equal(instances.annToMask(annotation), source.mask(ref))
            assert instances.cats[annotation["category_id"]]["name"] == ref.category
            assert len(instances.imgToAnns[ref.image_id]) == len(source.scene(ref).shapes)
    for annotation in instances.anns.values():
        mask = instances.annToMask(annotation)
        x, y, w, h = annotation["bbox"]
        assert annotation["area"] == mask.sum() == mask[y : y + h, x : x + w].sum()


def test_pickle_holds_plain_containers_only(written):
    data = (written[0] / "shapes" / "refs(unc).p").read_bytes()
    names = {opcode.name for opcode, _, _ in pickletools.genops(data)}
    assert not names & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "NEWOBJ"}


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "refseg_jax.data.shapes", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--scenes=1", "--size=48"], capture_output=True, check=True)
    assert json.loads(done.stdout)["images"] == len(SPLITS)
    failed = subprocess.run([*command, "--scenes=0"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: shapes")
    assert "Traceback" not in failed.stderr
