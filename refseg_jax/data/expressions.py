"""Referring expression generation for any photos with COCO annotations.

python -m refseg_jax.data.expressions --instances instances.json --out said.jsonl

Expressions such as "the dog", "cup on the left", "second giraffe from the right", "biggest boat" or
"person nearest the dog" are written by the grammar of the embedded data (`grammar.py`). Each is a
program that, executed on the photo's annotations, leaves exactly the object that is meant, however
one looks at the picture: by the boxes' centres, by points nearer to their sides, by the masks, and
with or without all that one may or may not count, such as what is tiny, cut off by the border,
annotated twice, or similar. Categories with a crowd in the photo are not spoken of there.

The lines written are what `python -m refseg_jax.data.prepare coco` reads.
"""

import argparse
import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from refseg_jax.data import annotations, custom, grammar, rle
from refseg_jax.data.files import replacing
from refseg_jax.data.grammar import Expression, Thing
from refseg_jax.data.nouns import Vocabulary
from refseg_jax.errors import UserError, command

MIN_AREA = 0.005  # Of the image; what is smaller is no target.
PER_OBJECT = 3

# Shares of the kinds, before it shows which of them are possible for an object.
_KINDS = {"attribute": 0.15, "place": 0.2, "superlative": 0.15, "ordinal": 0.2, "relation": 0.3}
_MAX_COUNT = 9  # More of a category are a crowd.
_CUT_AREA = 4  # What the border cuts off must be so many times larger than what it does not.
_CUT_GROWTH = 2.25  # How much larger it may really be.
_SAME_BOX = 0.7  # Intersection over union from which two boxes may be of one thing,
_ANY_BOX = 0.85  # and if they are of two categories.
_INSIDE = 0.8  # Share of a box that must lie in another to be inside it.
_TRIES = 3  # For each expression, to say something new.

_PLACES = {
    "left": ("{np} on the left", "{np} on the left side", "{np} on left"),
    "right": ("{np} on the right", "{np} on the right side", "{np} on right"),
    "top": ("{np} at the top", "{np} in the upper part"),
    "bottom": ("{np} at the bottom", "{np} in the lower part"),
    **{
        corner: (f"{{np}} in the {corner}", f"{corner} {{np}}", f"{{np}} in {corner} corner")
        for corner in ("top left", "top right", "bottom left", "bottom right")
    },
    "middle": ("{np} in the middle", "{np} in the center"),
}
_SUPERLATIVES = {
    "biggest": ("biggest {np}", "largest {np}"),
    "smallest": ("smallest {np}",),
    "left": ("leftmost {np}", "left {np}", "{np} farthest left"),
    "right": ("rightmost {np}", "right {np}", "{np} farthest right"),
    "top": ("topmost {np}", "{np} closest to the top"),
    "bottom": ("lowest {np}", "bottom {np}", "{np} closest to the bottom"),
}
# Not "above" and "below": in a photo, higher mostly means farther away.
_RELATIONS = {
    "left of": ("{np} left of {anchor}", "{np} to the left of {anchor}"),
    "right of": ("{np} right of {anchor}", "{np} to the right of {anchor}"),
    "nearest": ("{np} nearest {anchor}", "{np} closest to {anchor}"),
}
_ORDINALS = {key: texts for key, texts in grammar.ORDINALS.items() if key[0] in ("left", "right")}


def lexicon(vocabulary: Vocabulary) -> grammar.Lexicon:
    """How photographs are spoken of: things always have their noun, and nothing has adjectives."""
    return grammar.Lexicon(
        nouns=vocabulary.names,
        generic=(),
        places=_PLACES,
        superlatives=_SUPERLATIVES,
        ordinals=_ORDINALS,
        relations=_RELATIONS,
        the=0.5,
        a=0.3,
        uncounted=vocabulary.uncounted,
    )


@dataclasses.dataclass(frozen=True)
class Region:
    """One annotation, measured on its mask. Lengths are fractions of the image's, x to the right.

    `cut`: it touches the border, so there may be more of it.
    """

    ann_id: int
    noun: str
    box: tuple[float, float, float, float]  # x0, y0, x1, y1
    centroid: tuple[float, float]
    area: float
    cut: bool


@dataclasses.dataclass(frozen=True)
class Photo:
    """What an image shows: `targets`, which one can speak of, and what else there may be.

    readings: the ways to see it, as things for the grammar; the targets come first in each, and
    there is nothing else in the first.
    """

    targets: tuple[Region, ...]
    readings: tuple[tuple[Thing, ...], ...]


def measure(annotation: Mapping[str, Any], noun: str, height: int, width: int) -> Region | None:
    """An annotation's region; None if it has no pixel. ValueError: it cannot be drawn."""
    parts = rle.drawable(annotations.segmentation(annotation))
    if not parts:
        return None
    mask = rle.decode_parts(parts, height, width).any(axis=2)
    rows, columns = mask.sum(1), mask.sum(0)
    (at_y,), (at_x,) = rows.nonzero(), columns.nonzero()
    if not len(at_y):
        return None
    box = at_x[0] / width, at_y[0] / height, (at_x[-1] + 1) / width, (at_y[-1] + 1) / height
    pixels = int(rows.sum())
    centroid = (
        float(columns @ (np.arange(width) + 0.5)) / pixels / width,
        float(rows @ (np.arange(height) + 0.5)) / pixels / height,
    )
    slack = 0.005
    cut = min(box[:2]) <= slack or max(box[2:]) >= 1 - slack
    return Region(annotation["id"], noun, tuple(map(float, box)), centroid, pixels / mask.size, cut)


def survey(
    regions: Sequence[Region],
    crowds: set[str],
    vocabulary: Vocabulary,
    min_area: float = MIN_AREA,
) -> Photo:
    """What can be spoken of, with the nouns in `crowds` standing for things without number."""
    counts = collections.Counter(region.noun for region in regions)
    crowds = crowds | {noun for noun, count in counts.items() if count > _MAX_COUNT}
    unsafe = crowds | {noun for crowd in crowds for noun in vocabulary.confused.get(crowd, ())}
    doubtful = {
        region.ann_id
        for region in regions
        if not region.noun
        or region.noun in unsafe
        or region.area < min_area * (_CUT_AREA if region.cut else 1)
        or sum(_holds(region, other) for other in regions) > 1  # A group.
        or any(_holds(other, region) for other in regions)  # A part, perhaps.
    }
    for one, other in itertools.combinations(regions, 2):
        alike = one.noun == other.noun or any(
            a.noun in vocabulary.confused[b.noun] for a, b in ((one, other), (other, one))
        )
        if _overlap(one.box, other.box) > (_SAME_BOX if alike else _ANY_BOX):
            doubtful |= {one.ann_id, other.ann_id}
    targets = tuple(region for region in regions if region.ann_id not in doubtful)
    others = [region for region in regions if region.ann_id in doubtful]
    spoken = {region.noun for region in targets}
    others += [
        dataclasses.replace(region, noun=noun)
        for region in regions
        for noun in vocabulary.confused.get(region.noun, ())
        if noun in spoken
    ]
    # A program that picks the target without the doubtful objects and with all of them does so with
    # any subset of them: an added object can only spoil a match.
    whole = (targets, (*targets, *others)) if others else (targets,)
    return Photo(
        targets,
        tuple(tuple(map(view, seen)) for seen in whole for view in _VIEWS),
    )


def _holds(group: Region, other: Region) -> bool:
    """Whether a box lies in a larger one of its category."""
    if group is other or group.noun != other.noun or _area(group.box) <= _area(other.box):
        return False
    return _intersection(group.box, other.box) >= _INSIDE * _area(other.box)


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _intersection(a: Sequence[float], b: Sequence[float]) -> float:
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, across) * max(0.0, down)


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union."""
    both = _intersection(a, b)
    return both / (_area(a) + _area(b) - both)


def _by_box(region: Region, shift_x: float = 0, shift_y: float = 0, growth: float = 1) -> Thing:
    """Seen at a point that lies so many widths and heights from its box's centre."""
    x0, y0, x1, y1 = region.box
    width, height = x1 - x0, y1 - y0
    return Thing(
        {"category": region.noun},
        (x0 + x1) / 2 + shift_x * width,
        (y0 + y1) / 2 + shift_y * height,
        _size(width * height * (growth if region.cut else 1)),
        width,
        height,
    )


def _by_mask(region: Region) -> Thing:
    return Thing({"category": region.noun}, *region.centroid, _size(region.area))


def _size(area: float) -> float:
    """The square root of a length: things hide each other, so twice the area is a tie here."""
    return area**0.25


_VIEWS = (
    _by_box,
    _by_mask,
    *(
        lambda region, x=x, y=y: _by_box(region, x, y, _CUT_GROWTH)
        for x, y in itertools.product((-0.25, 0.25), repeat=2)
    ),
)


def describe(
    photo: Photo, words: grammar.Lexicon, rng: np.random.Generator, per_object: int = PER_OBJECT
) -> Iterator[tuple[Region, list[Expression]]]:
    """Up to so many expressions for each target, of different programs; those without are left."""
    things, *readings = photo.readings
    for number, region in enumerate(photo.targets):
        found: dict[grammar.Program, Expression] = {}
        for _ in range(per_object * _TRIES):
            taken = [expression.text for expression in found.values()]
            expression = grammar.write(rng, things, number, words, _KINDS, taken, readings)
            if expression is None or len(found) == per_object:
                break
            found.setdefault(expression.program, expression)
        if found:
            yield region, list(found.values())


class Generator:
    """Expressions for the photos of a COCO file. UserError: it cannot be read.

    Attributes:
      vocabulary: the nouns of its categories.
      counts: what has been seen and said so far, for a report.
    """

    def __init__(
        self,
        instances: str | os.PathLike[str],
        *,
        seed: int = 0,
        per_object: int = PER_OBJECT,
        min_area: float = MIN_AREA,
    ):
        self._tables = annotations.instance_tables(pathlib.Path(instances))
        self.vocabulary = Vocabulary(
            {
                category["name"]: str(category.get("supercategory", ""))
                for category in self._tables["categories"].values()
            }
        )
        self._words = lexicon(self.vocabulary)
        self._seed, self._per_object, self._min_area = seed, per_object, min_area
        self._of_image = collections.defaultdict(list)
        for annotation in self._tables["annotations"].values():
            self._of_image[annotation["image_id"]].append(annotation)
        self.counts: collections.Counter[str] = collections.Counter()

    def photo(self, image_id: int) -> Photo:
        """What an image shows."""
        record = self._tables["images"][image_id]
        regions, crowds = [], set()
        for annotation in sorted(self._of_image[image_id], key=lambda a: a["id"]):
            known, category = self._tables["categories"], annotation.get("category_id")
            category = known.get(category if isinstance(category, int) else None, {"name": ""})
            noun = self.vocabulary.nouns.get(category["name"], "")
            if annotation.get("iscrowd") or annotation.get("ignore"):
                crowds.add(noun)
                self.counts["crowds"] += 1
                continue
            try:
                region = measure(annotation, noun, record["height"], record["width"])
            except ValueError:
                region = None
            if region is None:  # There is one, but where?
                crowds.add(noun)
                self.counts["without_region"] += 1
            elif noun:
                regions.append(region)
            else:
                self.counts["without_noun"] += 1
        return survey(regions, crowds, self.vocabulary, self._min_area)

    def describe(self, image_id: int) -> list[tuple[Region, list[Expression]]]:
        """Expressions for an image's objects, by the seed and its id alone."""
        photo = self.photo(image_id)
        digest = hashlib.sha256(f"{self._seed} {image_id}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        return list(describe(photo, self._words, rng, self._per_object))

    def entries(
        self, val_share: float = custom.VAL_SHARE, test_share: float = 0.0
    ) -> list[dict[str, Any]]:
        """Lines for `custom.read_lines`; so many of the images become "val" and "test".

        Raises:
          UserError: nothing can be said of any image.
        """
        images = self._tables["images"]
        found = {i: described for i in sorted(images) if (described := self.describe(i))}
        if not found:
            elsewhere = sum(len(of) for i, of in self._of_image.items() if i not in images)
            why = {
                "annotations": len(self._tables["annotations"]),
                "of images that are not listed": elsewhere,
                "crowds": self.counts["crowds"],
                "without a region": self.counts["without_region"],
                "without a category that has a noun": self.counts["without_noun"],
            }
            raise UserError(
                f"none of the {len(images)} images has an object of {self._min_area:.1%} of it or "
                "more that can be told from the others "
                f"({', '.join(f'{count} {name}' for name, count in why.items())})"
            )
        uses = collections.Counter(record["file_name"] for record in images.values())
        splits = {images[i]["file_name"]: "train" for i in found}
        for split, share in (("val", val_share), ("test", test_share / (1 - val_share))):
            rest = {name for name, taken in splits.items() if taken == "train"}
            splits |= dict.fromkeys(custom.held_out(rest, share) if share else (), split)
        lines = []
        for image_id, described in found.items():
            name = images[image_id]["file_name"]
            for region, expressions in described:
                self.counts["objects"] += 1
                self.counts.update(expression.kind for expression in expressions)
                lines.append(
                    {
                        "image": name if uses[name] == 1 else image_id,
                        "ann_id": region.ann_id,
                        "sentences": [expression.text for expression in expressions],
                        "kinds": [expression.kind for expression in expressions],
                        "split": splits[name],
                    }
                )
        self.counts["images"] = len(found)
        return lines

    def report(self) -> dict[str, Any]:
        """What `entries` found, as plain data: how much of what there is, and sentences by kind."""
        kinds = {kind: self.counts[kind] for kind in grammar.KINDS}
        left_out = ("crowds", "without_region", "without_noun")
        return {
            "images": self.counts["images"],
            "of_images": len(self._tables["images"]),
            "objects": self.counts["objects"],
            "of_annotations": len(self._tables["annotations"]),
            "sentences": sum(kinds.values()),
            "kinds": kinds,
            **{name: self.counts[name] for name in left_out},
        }


def _write_lines(args: argparse.Namespace) -> dict[str, Any]:
    generator = Generator(
        args.instances, seed=args.seed, per_object=args.per_object, min_area=args.min_area
    )
    lines = generator.entries(args.val_share, args.test_share)
    try:
        with replacing(args.out) as temporary:
            text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
            temporary.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror}") from error
    return {"out": str(args.out), **generator.report()}


@command
def main(argv: list[str] | None = None) -> int:
    """Writes expressions for annotated photos; prints how many of each kind as one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m refseg_jax.data.expressions", description=main.__doc__
    )
    parser.add_argument("--instances", required=True, help="COCO file")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="JSON lines to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per_object", type=int, default=PER_OBJECT, help="most expressions")
    parser.add_argument(
        "--min_area", type=float, default=MIN_AREA, help="of an object, as a share of the image"
    )
    parser.add_argument("--val_share", type=float, default=custom.VAL_SHARE, help="of the images")
    parser.add_argument("--test_share", type=float, default=0.0)
    args = parser.parse_args(argv)
    shares = args.val_share, args.test_share
    if min(shares) < 0 or sum(shares) >= 1:
        parser.error("--val_share and --test_share are shares of the images, less than 1 together")
    print(json.dumps(_write_lines(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
