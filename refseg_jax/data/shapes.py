"""The embedded dataset: drawn scenes with referring expressions, nothing stored or downloaded.

`python -m refseg_jax.data.shapes --out DIR` writes it out in the layout of RefCOCO.
"""

import argparse
import functools
import json
import pathlib
import pickle
import sys
from collections.abc import Mapping

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from refseg_jax.data import scenes
from refseg_jax.data.records import Ref, Sentence
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.errors import UserError, command

NAME = "shapes"
REFS_PER_SCENE = 3
SENTENCES_PER_REF = 3
NUM_SCENES = {"train": 20_000, "val": 150, "testA": 100, "testB": 100}

_SEED = 20_240
# Shares of the kinds, before it shows which of them are possible for an object: in the sentences
# they come out at about 45, 20, 10, 10 and 15 percent.
_ALL_KINDS = {
    "attribute": 0.42,
    "place": 0.17,
    "superlative": 0.09,
    "ordinal": 0.13,
    "relation": 0.2,
}
_KINDS = {
    "train": _ALL_KINDS,
    "val": _ALL_KINDS,
    "testA": {"attribute": 0.75, "place": 0.25},
    "testB": {"ordinal": 0.4, "relation": 0.6},
}
_SPLITS = tuple(NUM_SCENES)
# Ids are decimal: split, scene (6 digits), then one digit each for annotation or ref, and sentence.
_SCENES_PER_SPLIT = 1_000_000


def tokenizer() -> Tokenizer:
    """WordPiece over the words that the expressions are made of."""
    return Tokenizer.from_words(scenes.LEXICON.words)


@functools.lru_cache(maxsize=8192)
def _scene(split: str, index: int) -> scenes.Scene:
    seed = (_SEED, _SPLITS.index(split), index, 0)
    return scenes.compose(seed, REFS_PER_SCENE, SENTENCES_PER_REF, _KINDS[split])


@functools.cache
def _drawings(size: int):
    """(split, index) -> image and owners, read-only since callers share them.

    Keeps a quarter of a gigabyte of drawings: an epoch comes by every scene nine times.
    """

    @functools.lru_cache(maxsize=2**28 // (4 * size * size))
    def drawn(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
        arrays = scenes.draw(_scene(split, index), (_SEED, _SPLITS.index(split), index, 1), size)
        for array in arrays:
            array.setflags(write=False)
        return arrays

    return drawn


class ShapesSource:
    """One split of the embedded dataset (see `records.Source`).

    Scene i of a split is always the same, whatever `num_scenes`; every scene has `REFS_PER_SCENE`
    refs of `SENTENCES_PER_REF` sentences, so that any sample can be reached without drawing any
    other. The sentences do not depend on `size`, the side of the square images in pixels.
    """

    name = NAME

    def __init__(self, split: str, *, num_scenes: int | None = None, size: int = 128):
        """Raises UserError for an unknown split or a size or number that cannot be drawn."""
        if split not in NUM_SCENES:
            raise UserError(f"{NAME} has no split {split!r}: take one of {', '.join(_SPLITS)}")
        self.split = split
        self.num_scenes = NUM_SCENES[split] if num_scenes is None else num_scenes
        self.size = size
        if not 0 < self.num_scenes <= _SCENES_PER_SPLIT:
            raise UserError(f"{NAME}: num_scenes is {num_scenes}, give 1 to {_SCENES_PER_SPLIT}")
        if size < 32:
            raise UserError(f"{NAME}: size is {size}, shapes are not recognisable below 32 pixels")
        self.num_sentences = len(self) * SENTENCES_PER_REF

    def __len__(self) -> int:
        return self.num_scenes * REFS_PER_SCENE

    def locate(self, j: int) -> tuple[int, int]:
        if not 0 <= j < self.num_sentences:
            raise IndexError(f"sentence {j} of {self.num_sentences}")
        return divmod(j, SENTENCES_PER_REF)

    def _ids(self, index: int) -> int:
        return (_SPLITS.index(self.split) + 1) * _SCENES_PER_SPLIT + index

    def __getitem__(self, i: int) -> Ref:
        if not 0 <= i < len(self):
            raise IndexError(f"ref {i} of {len(self)}")
        index, number = divmod(i, REFS_PER_SCENE)
        scene = _scene(self.split, index)
        target, expressions = scene.refs[number]
        image_id = self._ids(index)
        ref_id = image_id * 10 + number
        return Ref(
            ref_id=ref_id,
            image_id=image_id,
            ann_ids=(image_id * 10 + target,),
            category=scene.shapes[target].category,
            split=self.split,
            sentences=tuple(
                Sentence(expression.text, ref_id * 10 + k, expression.kind)
                for k, expression in enumerate(expressions)
            ),
        )

    def scene(self, ref: Ref) -> scenes.Scene:
        """The scene that a ref of this split belongs to."""
        return _scene(self.split, ref.image_id % _SCENES_PER_SPLIT)

    def _draw(self, ref: Ref) -> tuple[np.ndarray, np.ndarray]:
        return _drawings(self.size)(self.split, ref.image_id % _SCENES_PER_SPLIT)

    def image(self, ref: Ref) -> np.ndarray:
        return self._draw(ref)[0]

    def object_mask(self, ref: Ref, k: int) -> np.ndarray:
        """bool [H, W]: the visible part of shape k of the ref's scene."""
        return self._draw(ref)[1] == k

    def mask(self, ref: Ref) -> np.ndarray:
        return self.object_mask(ref, ref.ann_ids[0] % 10)


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Polygons [x0, y0, x1, y1, ...] along pixel edges whose union is exactly bool [H, W] `mask`.

    Each polygon is a stack of row runs in which every run touches one run above and one below, so
    none has a hole: a ring becomes a cap, two sides and a base.
    """
    stacks: list[list[tuple[int, int, int]]] = []
    above: list[list[tuple[int, int, int]]] = []
    for y, row in enumerate(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)):
        edges = np.flatnonzero(np.diff(row)).tolist()
        runs = [(y, *run) for run in zip(edges[::2], edges[1::2], strict=True)]
        current = []
        for run in runs:
            touching = [stack for stack in above if _touch(stack[-1], run)]
            if len(touching) == 1 and sum(_touch(touching[0][-1], r) for r in runs) == 1:
                stack = touching[0]
            else:
                stacks.append(stack := [])
            stack.append(run)
            current.append(stack)
        above = current
    return [_outline(stack) for stack in stacks]


def _touch(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether two runs (y, start, stop) in neighbouring rows share an edge."""
    return a[1] < b[2] and b[1] < a[2]


def _outline(stack: list[tuple[int, int, int]]) -> list[float]:
    """The corners of a stack of runs: down its left side and up its right side."""
    left = [point for y, x, _ in stack for point in ((x, y), (x, y + 1))]
    right = [point for y, _, x in reversed(stack) for point in ((x, y + 1), (x, y))]
    corners: list[tuple[int, int]] = []
    for point in left + right:
        # A point on a straight line between its neighbours is no corner.
        if len(corners) > 1 and corners[-2][0] == corners[-1][0] == point[0]:
            corners.pop()
        if not corners or corners[-1] != point:
            corners.append(point)
    return [float(value) for corner in corners for value in corner]


def _segmentation(mask: np.ndarray) -> list[list[float]] | dict:
    """COCO polygons where pycocotools turns them back into the very mask, otherwise an RLE."""
    polygons = mask_to_polygons(mask)
    if np.array_equal(coco.decode(coco.merge(coco.frPyObjects(polygons, *mask.shape))), mask):
        return polygons
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def write_refer(
    root: str | pathlib.Path, *, num_scenes: Mapping[str, int] = NUM_SCENES, size: int = 128
) -> dict[str, int]:
    """Writes the splits in `num_scenes` in the layout of RefCOCO, as dataset "shapes", "unc".

    Images are PNG, so the samples and masks read back are the very ones drawn. Annotations hold
    every object of a scene, referred to or not. Returns how many images, annotations, refs,
    sentences and masks that no polygons could hold exactly (kept as RLE) were written.
    """
    root = pathlib.Path(root)
    image_dir, folder = root / "images" / "mscoco" / "train2014", root / NAME
    image_dir.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    category_ids = {name: i + 1 for i, name in enumerate(sorted(scenes.SILHOUETTES))}
    images, annotations, refs = [], [], []
    for split, count in num_scenes.items():
        source = ShapesSource(split, num_scenes=count, size=size)
        for i, ref in enumerate(source):
            stem = f"{NAME}_{ref.image_id:07d}"
            (ann_id,) = ref.ann_ids
            if i % REFS_PER_SCENE == 0:
                Image.fromarray(source.image(ref)).save(image_dir / f"{stem}.png")
                images.append(
                    {"id": ref.image_id, "file_name": f"{stem}.png", "height": size, "width": size}
                )
                annotations += _annotations(source, ref, category_ids)
            refs.append(
                {
                    "ref_id": ref.ref_id,
                    "ann_id": ann_id,
                    "category_id": category_ids[ref.category],
                    "image_id": ref.image_id,
                    "split": split,
                    "file_name": f"{stem}_{ann_id}.png",  # RefCOCO's habit; no such file exists
                    "sent_ids": [sentence.sent_id for sentence in ref.sentences],
                    "sentences": [
                        {
                            "tokens": sentence.text.split(),
                            "raw": sentence.text,
                            "sent": sentence.text,
                            "sent_id": sentence.sent_id,
                            "kind": sentence.kind,
                        }
                        for sentence in ref.sentences
                    ],
                }
            )
    instances = {
        "info": {"description": f"{NAME}: drawn scenes"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": [
            {"supercategory": "shape", "id": i, "name": name} for name, i in category_ids.items()
        ],
    }
    (folder / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    return {
        "images": len(images),
        "annotations": len(annotations),
        "refs": len(refs),
        "sentences": sum(len(ref["sentences"]) for ref in refs),
        "rle": sum(isinstance(a["segmentation"], dict) for a in annotations),
    }


def _annotations(source: ShapesSource, ref: Ref, category_ids: Mapping[str, int]) -> list[dict]:
    """COCO annotations of all objects of the scene that a ref belongs to."""
    found = []
    for k, shape in enumerate(source.scene(ref).shapes):
        mask = source.object_mask(ref, k)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y = int(columns[0]), int(rows[0])
        found.append(
            {
                "id": ref.image_id * 10 + k,
                "image_id": ref.image_id,
                "category_id": category_ids[shape.category],
                "segmentation": _segmentation(mask),
                "area": int(mask.sum()),
                "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
                "iscrowd": 0,
            }
        )
    return found


@command
def main() -> int:
    """Command line: writes the dataset out and prints what was written as one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m refseg_jax.data.shapes", description=main.__doc__
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder to write to")
    parser.add_argument("--scenes", type=int, help="scenes per split (default: all of them)")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    args = parser.parse_args()
    num_scenes = NUM_SCENES if args.scenes is None else dict.fromkeys(_SPLITS, args.scenes)
    try:
        written = write_refer(args.out, num_scenes=num_scenes, size=args.size)
    except OSError as error:
        raise UserError(f"cannot write to --out {args.out}: {error}") from error
    print(json.dumps(written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
