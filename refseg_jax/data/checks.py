"""What a dataset is like, and what is wrong with it: for `inspect.py`.

Every check goes on after a fault and hands it to `report(sort, line)`.
"""

import collections
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from refseg_jax.data import annotations, rle, sets
from refseg_jax.data.records import Ref, Source
from refseg_jax.data.refer import ReferFiles, ReferSource
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.errors import UserError

SPREAD = ("mean", "min", "5 %", "median", "95 %", "max")

# The sorts of faults.
UNUSABLE = "what cannot be used"
IDS = "ids that occur twice"
BLANK = "blank sentences"
LONG = "sentences over the token limit"
IMAGE = "images that cannot be read"
MASK = "masks that cannot be drawn"
EMPTY = "masks without a pixel, of refs with a target"
WHOLE = "masks of a whole image"
BEYOND = "masks that reach beyond their image"
LEAK = "images of train that are in another split"

_TOKENS = 512  # Longer sentences count as that long.
_SLIP = 1.0  # px by which annotators may slip over an image's edge.
_WORD = re.compile(r"[\w']+")

Report = Callable[[str, str], None]
T = TypeVar("T")


def look(
    split: str,
    source: Source,
    report: Report,
    tokenizer: Tokenizer | None = None,
    max_tokens: int = 20,
    advance: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Reads every image, mask and sentence of a split; returns statistics as plain data.

    Words are runs of letters, digits and apostrophes, in lower case. Tokens include both marks;
    without a tokenizer words stand for them, so some sentences over the limit are not found.
    `advance` is called after each ref.
    """
    values, words = collections.defaultdict(list), set()
    objects, last = collections.defaultdict(set), None
    for ref in sorted(refs(source), key=lambda ref: ref.image_id):
        where = f"{split}: ref {ref.ref_id}"
        if (image := _picture(source, ref)) != last:  # Every image is decoded once.
            last = image
            origin = source.origin(ref) if hasattr(source, "origin") else ""
            _try(report, IMAGE, f"{where} ({origin})" if origin else where, source.image, ref)
        mask = _try(report, MASK, where, source.mask, ref)
        if mask is not None and ref.ann_ids:
            values["mask_share"].append(mask.mean())
            if not mask.any():
                report(EMPTY, where)
            elif mask.all():
                report(WHOLE, where)
        objects[image].update(ref.ann_ids)
        values["sentences_per_ref"].append(len(ref.sentences))
        for sentence in ref.sentences:
            found = _WORD.findall(sentence.text.lower())
            words.update(found)
            values["words"].append(len(found))
            if not tokenizer and len(found) + 2 > max_tokens:  # A word is one token at least.
                said = f"{where}: sentence {sentence.sent_id}"
                report(LONG, f"{said}: {len(found)} words and two marks, {max_tokens} are read")
            if tokenizer:
                said = f"{where}: sentence {sentence.sent_id}"
                encoded = _try(report, BLANK, said, tokenizer.encode, sentence.text, _TOKENS)
                if encoded is not None:
                    values["tokens"].append(length := int(encoded[1].sum()))
                    if length > max_tokens:
                        report(LONG, f"{said}: {length} tokens, {max_tokens} are read")
        advance()
    values["objects_per_image"] = [len(ids) for ids in objects.values()]
    return {
        "refs": len(source),
        "images": len(objects),
        "sentences": source.num_sentences,
        "without_target": sum(not ref.ann_ids for ref in refs(source)),
        "vocabulary": len(words),
        **{name: _spread(numbers) for name, numbers in values.items()},
    }


def _picture(source: Source, ref: Ref) -> Any:
    """Equal for two refs in whose image the same is to be found."""
    file = source.image_file(ref) if hasattr(source, "image_file") else None
    return ref.image_id, file


def refs(source: Source) -> list[Ref]:
    """All refs of a split."""
    return [source[i] for i in range(len(source))]


def _try(report: Report, sort: str, where: str, read: Callable[..., T], *args: Any) -> T | None:
    """read(*args), or None where that is a fault of the data, which is reported."""
    try:
        return read(*args)
    except UserError as error:
        report(sort, f"{where}: {error}")
        return None


def _spread(numbers: Sequence[float]) -> dict[str, float]:
    values = (np.mean(numbers), *np.percentile(numbers, (0, 5, 50, 95, 100)))
    return dict(zip(SPREAD, map(float, values), strict=True))


def check_ids(sources: Mapping[str, Source], report: Report) -> None:
    """Reports ids that two refs or sentences of a set share, and objects that have two refs.

    Several targets of one ref do not count, nor does a merged set: its ids come from several.
    """
    owners = collections.defaultdict(list)
    for split, source in sources.items():
        for ref in refs(source) if source.name != sets.MERGED else ():
            ids = [("ref_id", ref.ref_id), *(("sent_id", s.sent_id) for s in ref.sentences)]
            if len(ref.ann_ids) == 1:
                # Where a set makes up some of them, they are unique within an image only.
                ids.append(("ann_id", ref.ann_ids[0], ref.image_id))
            for key in ids:
                # Of refcoco_unc/val, the set.
                owners[split.rpartition("/")[0], *key].append(f"{split}: ref {ref.ref_id}")
    for (_, kind, number, *_), shared in owners.items():
        if len(shared) > 1:
            where = "; ".join(dict.fromkeys(shared))
            report(IDS, f"{kind} {number}, {len(shared)} times: {where}")


def check_leaks(sources: Mapping[str, Source], report: Report) -> None:
    """Reports every image that is in the training split and in another."""
    images = {split: {} for split in sources}
    for split, source in sources.items():
        for ref in refs(source):
            file = source.image_file(ref) if hasattr(source, "image_file") else None
            key = sets.image_key(file) if file else ref.image_id
            images[split][key] = file.name if file else f"image {ref.image_id}"
    train = images.pop(sets.TRAIN, {})
    for split, others in images.items():
        for key in filter(train.__contains__, others):
            report(LEAK, f"{split}: {others[key]}")


def drop_blank(entries: list[dict], text_field: str, split: str, report: Report) -> None:
    """Takes blank sentences out of the entries of a refs file, so that the rest can be read."""
    for entry in entries:
        kept = []
        for said in entry["sentences"]:
            text = said.get(text_field) if isinstance(said, dict) else None
            if isinstance(text, str) and annotations.is_blank(text):
                report(BLANK, f"{split}: ref {entry['ref_id']}: sentence {said.get('sent_id')}")
            else:
                kept.append(said)
        entry["sentences"] = kept


def check_edges(source: ReferSource, files: ReferFiles, report: Report) -> None:
    """Reports polygons that reach over the edge of their image, where they are cut off."""
    for ref in refs(source):
        size = source.image_file(ref)
        for ann_id in ref.ann_ids:
            parts = rle.drawable(annotations.segmentation(files.tables["annotations"][ann_id]))
            by = max((_beyond(part, size.height, size.width) for part in parts), default=0.0)
            if by > _SLIP:
                where = f"{source.split}: ref {ref.ref_id}, annotation {ann_id}"
                report(BEYOND, f"{where}: by {by:.1f} px" if by < 1e9 else f"{where}: beyond count")


def _beyond(part: Any, height: int, width: int) -> float:
    """By how many pixels a polygon [x0, y0, ...] reaches over the edge; 0 for what is none."""
    try:
        points = np.asarray(part, np.float64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        return 0.0  # Drawing it will say what it is.
    return float(np.max([-points, points - (width, height)], initial=0.0))
