"""Generated expressions, against a reader that knows nothing but their words and the boxes."""

import collections
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from refseg_jax.data import custom, expressions, grammar
from refseg_jax.data.nouns import Vocabulary, noun
from refseg_jax.data.shards import PreparedSource
from refseg_jax.errors import UserError
from tests import preparing

# A reader of its own: it takes the words apart and looks at the raw boxes, one by one.

_RANKS = {"first": 0, "1st": 0, "second": 1, "2nd": 1, "third": 2, "3rd": 2}
_SORTED = {
    "left": lambda b: b[0] + b[2] / 2,
    "right": lambda b: -(b[0] + b[2] / 2),
    "top": lambda b: b[1] + b[3] / 2,
    "bottom": lambda b: -(b[1] + b[3] / 2),
    "biggest": lambda b: -b[2] * b[3],
    "smallest": lambda b: b[2] * b[3],
}
_WORDS = {"leftmost": "left", "rightmost": "right", "topmost": "top", "lowest": "bottom",
          "largest": "biggest"}  # fmt: skip
_SIDE = "(left|right|top|bottom|upper|lower)"
_ORDINAL = f"({'|'.join(_RANKS)})"


def meant(text, boxes, size):
    """Numbers of the (name, [x, y, w, h]) that a simple mind takes a text to mean."""
    text = re.sub(r"^(the|an?) ", "", text)

    def named(words):
        found = [i for i, (names, _) in enumerate(boxes) if words in names]
        assert found, f"nothing is called {words!r}"
        return found

    def extreme(words, key, rank=0):
        return [sorted(named(words), key=lambda i: _SORTED[key](boxes[i][1]))[rank]]

    def inside(words, sides):
        bounds = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
        found = named(words)
        for side in sides:
            axis, sign = bounds[{"upper": "top", "lower": "bottom"}.get(side, side)]
            found = [i for i in found if sign * (centre(i)[axis] / size[axis] - 0.5) < 0]
        return found

    def centre(i):
        x, y, w, h = boxes[i][1]
        return x + w / 2, y + h / 2

    if match := re.fullmatch("(.+?) (?:to the )?(left|right) of (?:the|an?) (.+)", text):
        words, side, (anchor,) = match[1], match[2], named(match[3])
        sign = 1 if side == "right" else -1
        offsets = {
            i: [(a - b) / s for a, b, s in zip(centre(i), centre(anchor), size, strict=True)]
            for i in named(words)
        }
        return [i for i, (dx, dy) in offsets.items() if sign * dx > abs(dy) / 2]
    if match := re.fullmatch("(.+) (?:nearest|closest to) (?:the|an?) (.+)", text):
        if match[2] not in ("top", "bottom"):
            (anchor,) = named(match[2])
            return [min(named(match[1]), key=lambda i: _gap(boxes[i][1], boxes[anchor][1]))]
        return extreme(match[1], match[2])
    if match := re.fullmatch(f"{_ORDINAL} (.+) from (?:the )?(left|right)", text):
        return extreme(match[2], match[3], _RANKS[match[1]])
    if match := re.fullmatch(f"(.+) {_ORDINAL} from (?:the )?(left|right)", text):
        return extreme(match[1], match[3], _RANKS[match[2]])
    if match := re.fullmatch("(.+) farthest (left|right)", text):
        return extreme(match[1], match[2])
    if match := re.fullmatch("(.+) in the (?:middle|center)", text):
        shares = {i: np.divide(centre(i), size) for i in named(match[1])}
        return [i for i, share in shares.items() if (abs(share - 0.5) < 0.25).all()]
    if match := re.fullmatch(f"(.+) (?:on|at|in) (?:the )?{_SIDE}(?: part| side)?", text):
        return inside(match[1], [match[2]])
    corner = "(top|bottom) (left|right)"
    if match := re.fullmatch(f"(.+) in (?:the )?{corner}(?: corner)?", text):
        return inside(match[1], match.groups()[1:])
    if match := re.fullmatch(f"{corner} (.+)", text):
        return inside(match[3], match.groups()[:2])
    first, _, rest = text.partition(" ")
    if _WORDS.get(first, first) in _SORTED:
        return extreme(rest, _WORDS.get(first, first))
    return named(text)


def _gap(a, b):
    def along(k):
        return max(0, a[k] - b[k] - b[k + 2], b[k] - a[k] - a[k + 2])

    return math.hypot(along(0), along(1))


def check(coco, lines):
    """Every sentence means its line's annotation to the reader. Number of sentences by kind."""
    categories = {c["id"]: c for c in coco["categories"]}
    vocabulary = Vocabulary({c["name"]: c.get("supercategory", "") for c in coco["categories"]})
    images = {image["file_name"]: image for image in coco["images"]}
    on = collections.defaultdict(list)
    for annotation in coco["annotations"]:
        on[annotation["image_id"]].append(annotation)
    counts, texts = collections.Counter(), {}
    for line in lines:
        image = images[line["image"]]
        present = on[image["id"]]
        boxes = [
            (vocabulary.names.get(noun(categories[a["category_id"]]["name"]), ()), a["bbox"])
            for a in present
        ]
        for text, kind in zip(line["sentences"], line["kinds"], strict=True):
            found = meant(text, boxes, (image["width"], image["height"]))
            assert [present[i]["id"] for i in found] == [line["ann_id"]], (text, image["file_name"])
            assert texts.setdefault((image["id"], text), line["ann_id"]) == line["ann_id"]
            counts[kind] += 1
    return counts


# Rectangles for photos.

NAMES = ["apple", "dog", "hot dog", "Traffic_lights", "skis", "dining table"]
WIDTH, HEIGHT = 100, 80


def rectangle(i, image_id, category, x, y, w, h, **more):
    return {
        "id": i,
        "image_id": image_id,
        "category_id": NAMES.index(category) + 1,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        "bbox": [x, y, w, h],
        "iscrowd": 0,
        **more,
    }


def dataset(*photos):
    """A COCO file of photos, each a list of (category, x, y, w, h) and more fields perhaps."""
    found = []
    for image_id, objects in enumerate(photos):
        for category, x, y, w, h, *more in objects:
            fields = more[0] if more else {}
            found.append(rectangle(len(found) + 1, image_id, category, x, y, w, h, **fields))
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH}
            for i in range(len(photos))
        ],
        "annotations": found,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)],
    }


def random_photos(count, seed=0):
    rng = np.random.default_rng(seed)
    photos = []
    for _ in range(count):
        objects = []
        for _ in range(rng.integers(0, 9)):
            w, h = rng.integers(4, 40, 2).tolist()
            x, y = (int(rng.integers(0, side - s + 1)) for side, s in ((WIDTH, w), (HEIGHT, h)))
            objects.append((NAMES[rng.integers(5)], x, y, w, h))
        photos.append(objects)
    return dataset(*photos)


def save(path, coco):
    path.write_text(json.dumps(coco))
    return path


def say(tmp_path, coco, **options):
    """annotation id -> its sentences."""
    generator = expressions.Generator(save(tmp_path / "i.json", coco), **options)
    return {line["ann_id"]: line["sentences"] for line in generator.entries()}


def test_the_reader_finds_the_object_meant_and_no_other(tmp_path):
    coco = random_photos(90)
    generator = expressions.Generator(save(tmp_path / "i.json", coco))
    lines = generator.entries()
    counts = check(coco, lines)
    assert set(counts) == set(grammar.KINDS) and min(counts.values()) >= 10
    report = generator.report()
    assert report["kinds"] == counts and report["sentences"] == counts.total()
    assert report["images"] == len({line["image"] for line in lines}) <= report["of_images"] == 90
    # The reader does object: to every line that is given another object of its image.
    of_image = {a["id"]: a["image_id"] for a in coco["annotations"]}
    wrong = 0
    for line in lines:
        image_id = of_image[line["ann_id"]]
        for other in (i for i in of_image if of_image[i] == image_id and i != line["ann_id"]):
            with pytest.raises(AssertionError):
                check(coco, [{**line, "ann_id": other}])
            wrong += 1
    assert wrong > 300


def test_every_program_means_its_object_however_the_photo_is_seen(tmp_path):
    generator = expressions.Generator(save(tmp_path / "i.json", random_photos(20, seed=1)))
    words = expressions.lexicon(generator.vocabulary)
    for image_id in range(20):
        photo = generator.photo(image_id)
        for region, found in expressions.describe(photo, words, np.random.default_rng(0), 3):
            number = photo.targets.index(region)
            assert len({e.program for e in found}) == len({e.text for e in found}) == len(found)
            for expression in found:
                for things in photo.readings:
                    assert grammar.execute(expression.program, things) == (number,)


def test_the_seed_and_the_image_alone_decide(tmp_path):
    coco = random_photos(12)
    said = say(tmp_path, coco)
    assert say(tmp_path, coco) == said != say(tmp_path, coco, seed=1)
    coco["images"] = coco["images"][5:]
    coco["annotations"] = coco["annotations"][::-1]
    assert say(tmp_path, coco).items() <= said.items()
    assert max(map(len, said.values())) == 3
    assert set(map(len, say(tmp_path, coco, per_object=1).values())) == {1}


BIG, SMALL = (10, 10, 30, 30), (70, 50, 4, 4)


@pytest.mark.parametrize(
    ("objects", "spoken"),
    [
        ([], []),
        ([("dog", *BIG)], [1]),
        ([("dog", *SMALL)], []),  # too small
        ([("dog", *BIG), ("apple", 50, 10, 20, 20)], [1, 2]),
        ([("dog", *BIG), ("dog", 12, 12, 26, 27)], []),  # twice annotated, perhaps
        ([("dog", *BIG), ("apple", 11, 11, 28, 29)], []),  # one thing, and which?
        ([("dog", *BIG), ("hot dog", 11, 11, 27, 28)], []),  # a hot dog may be called a dog
        ([("dog", 0, 10, 5, 30)], []),  # cut off by the border, little is left
        ([("dog", 0, 10, 25, 30)], [1]),
        ([("dog", *BIG), ("dog", 60, 10, 30, 60, {"iscrowd": 1})], []),
        ([("apple", 40, 40, 10, 10), ("dog", *BIG, {"iscrowd": 1})], [1]),
        ([("hot dog", 40, 40, 10, 10), ("dog", *BIG, {"iscrowd": 1})], [1]),
        ([("dog", 40, 40, 10, 10), ("hot dog", *BIG, {"iscrowd": 1})], []),
        ([("apple", x, 8 * (x % 7), 8, 8) for x in range(0, 100, 9)], []),  # too many
        ([("apple", 1, 1, 60, 60), ("apple", 3, 3, 20, 20), ("apple", 35, 35, 20, 20)], []),
        ([("dog", *BIG), ("apple", 5, 5, 9, 9, {"segmentation": []})], [1]),
        ([("dog", *BIG), ("dog", 5, 5, 9, 9, {"segmentation": [[1e9] * 6]})], []),
        ([("dog", *BIG), ("dog", 5, 5, 9, 9, {"category_id": 77})], [1]),
    ],
)
def test_what_is_spoken_of(tmp_path, objects, spoken):
    always = [("dining table", 30, 40, 50, 30)]  # Another photo: one must have something to say.
    said = say(tmp_path, dataset(objects, always))
    assert [i for i in said if i <= len(objects)] == spoken


def test_small_and_similar_things_count_as_possible(tmp_path):
    said = say(tmp_path, dataset([("dog", *BIG), ("dog", *SMALL)]), per_object=9)[1]
    assert re.search("on (the )?left", " ".join(said))
    assert not {"dog", "the dog", "a dog", "biggest dog"} & {*said}
    said = say(tmp_path, dataset([("dog", *BIG), ("hot dog", 60, 15, 30, 30)]), per_object=9)
    assert not {"dog", "the dog", "a dog"} & {*said[1]} and {"hot dog", "the hot dog"} & {*said[2]}
    # The tiny one may or may not be the first: the big ones cannot be counted from the left.
    row = [("dog", x, 20, 15, 15) for x in (20, 45, 70)]
    text = " ".join(
        sum(say(tmp_path, dataset([*row, ("dog", 2, 2, 4, 4)]), per_object=9).values(), [])
    )
    assert "from the right" in text and "from the left" not in text and "leftmost" not in text


def test_near_ties_are_not_decided(tmp_path):
    twins = [("dog", 20, 10, 20, 20), ("dog", 24, 50, 21, 20)]
    said = [" ".join(texts) for texts in say(tmp_path, dataset(twins), per_object=9).values()]
    assert "top" in said[0] and "bottom" in said[1]
    undecided = "leftmost|rightmost|farthest|left dog|on (the )?(left|right)|biggest|largest|small"
    for text in said:
        assert not re.search(undecided, re.sub("(top|bottom) left dog", "", text)), text


def test_splits_are_by_image(tmp_path):
    generator = expressions.Generator(save(tmp_path / "i.json", random_photos(60)))
    splits = collections.defaultdict(set)
    for line in generator.entries(0.2, 0.1):
        splits[line["image"]].add(line["split"])
    assert all(len(found) == 1 for found in splits.values())
    counts = collections.Counter(found.pop() for found in splits.values())
    assert counts == {
        "val": round(0.2 * len(splits)),
        "test": pytest.approx(0.1 * len(splits), abs=1),
        "train": pytest.approx(0.7 * len(splits), abs=1),
    }


@pytest.mark.parametrize(
    ("category", "expected"),
    [
        ("dog", "dog"),
        ("cell_phone", "cell phone"),
        ("Traffic lights", "traffic light"),
        ("trafficLight", "traffic light"),
        ("people", "person"),
        ("berries", "berry"),
        ("boxes", "box"),
        ("glass", "glass"),
        ("buses", "bus"),
        ("cactus", "cactus"),
        ("skis", "pair of skis"),
        ("bow_(decorative_ribbons)", "bow"),
        ("wall-other-merged", "wall"),
        ("automobile, car", "automobile"),
        ("car/van", "car or van"),
        ("café", "café"),
        ("t-shirt", "t-shirt"),
        ("{np}", ""),
        ("7", ""),
        ("", ""),
    ],
)
def test_nouns(category, expected):
    assert noun(category) == expected


@pytest.mark.parametrize(
    ("phrase", "article"),
    [("apple", "an"), ("dog", "a"), ("unicycle", "a"), ("umbrella", "an"), ("hourglass", "an"),
     ("european badger", "a"), ("oven", "an"), ("tv", "a"), ("unusual hat", "an")],
)  # fmt: skip
def test_articles(phrase, article):
    assert grammar.with_a(phrase) == f"{article} {phrase}"


def test_names_that_another_category_has_are_left_to_it():
    words = Vocabulary(
        {"dining table": "furniture", "table": "furniture", "tv": "", "": "", "3": ""}
    )
    assert words.names["dining table"] == ("dining table",)
    assert words.names["tv"] == ("tv", "television")
    assert words.confused["dining table"] == ("table",) and words.confused["table"] == ()
    above = Vocabulary({"poodle": "dog", "dog": "animal"})
    assert above.confused == {"poodle": ("dog",), "dog": ()}


# The two ways to training.


def photos(tmp_path, count=8):
    coco = random_photos(count)
    (tmp_path / "images").mkdir()
    for image in coco["images"]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / image["file_name"])
    return save(tmp_path / "instances.json", coco)


def test_generated_lines_and_the_direct_way_prepare_the_same(tmp_path, capsys):
    instances, said = photos(tmp_path), tmp_path / "said.jsonl"
    assert expressions.main(["--instances", str(instances), "--out", str(said)]) == 0
    report = json.loads(capsys.readouterr().out)
    ways = {"lines": ("--expressions", said), "direct": ()}
    for name, more in ways.items():
        arguments = ("--images", tmp_path / "images", "--instances", instances, "--workers", 1)
        assert preparing.run("coco", *arguments, "--out", tmp_path / name, *more) == 0
    for split in ("train", "val"):
        a, b = (PreparedSource(tmp_path / name, split) for name in ways)
        preparing.assert_same_source(a, b)
    kinds = collections.Counter(
        sentence.kind
        for split in ("train", "val")
        for source in [PreparedSource(tmp_path / "direct", split)]
        for ref in (source[i] for i in range(len(source)))
        for sentence in ref.sentences
    )
    assert kinds == {kind: count for kind, count in report["kinds"].items() if count}
    assert preparing.manifest(tmp_path / "direct")["source"]["expressions"] == "generated"


def test_faults_of_the_user_are_one_line(tmp_path, capsys):
    empty = save(tmp_path / "empty.json", dataset([]))
    odd = dataset([("dog", 0, 0, 9, 9)] * 3)
    odd["annotations"][0]["category_id"] = [1]
    odd["annotations"][1]["image_id"] = 5
    odd["annotations"][2]["segmentation"] = None
    odd = save(tmp_path / "odd.json", odd)
    counts = "3 annotations, 1 of images that are not listed, 0 crowds, 1 without a region, 1 w"
    cases = [
        (odd, tmp_path / "o", f"none of the 1 images .*{counts}"),
        (tmp_path / "none.json", tmp_path / "o", "cannot read .*none.json"),
        (empty, tmp_path / "o", "none of the 1 images has an object"),
        (photos(tmp_path), tmp_path / "no" / "o", "cannot write .*no/o"),
    ]
    for instances, out, message in cases:
        assert expressions.main(["--instances", str(instances), "--out", str(out)]) == 2
        assert re.fullmatch(f"error: {message}.*\n", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        expressions.main(["--instances", "i", "--out", "o", "--val_share", "1"])
    assert preparing.run("coco", "--images", tmp_path, "--out", tmp_path / "o") == 2
    assert "give --expressions, or --instances" in capsys.readouterr().err


def test_real_photographs(tmp_path, test_data):
    folder = test_data / "data" / "coco_photos"
    coco = json.loads((folder / "instances.json").read_text())
    coco["images"] = coco["images"][::4]
    kept = {image["id"] for image in coco["images"]}
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in kept]
    generator = expressions.Generator(save(tmp_path / "i.json", coco))
    lines = generator.entries()
    counts = check(coco, lines)
    assert counts.total() > 500 and min(counts.values()) > 20
    sources = custom.read_entries(lines, folder / "images", tmp_path / "i.json", name="photos")
    assert {split: len(source) > 20 for split, source in sources.items()} == {
        "train": True,
        "val": True,
    }


def test_kinds_that_do_not_fit_their_sentences(tmp_path):
    instances = photos(tmp_path, 1)
    entry = {"image": "0.png", "polygon": [0, 0, 9, 0, 9, 9], "sentences": ["x", "y"]}
    for kinds in (["place"], "place", [1, 2]):
        with pytest.raises(UserError, match="'kinds' are not a list of one text per sentence"):
            custom.read_entries(
                [{**entry, "kinds": kinds}], tmp_path / "images", instances, name="x"
            )
