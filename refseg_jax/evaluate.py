"""Sweeps a model over every sentence of a split and scores it.

Two protocols are in use and their scores differ, so every result names its own:

* `original`: the probabilities are warped back to the image's own size and compared there with
  the mask as annotated (CRIS);
* `input`: the comparison is made at the model's input size, with the mask resized by nearest
  neighbour (LAVT, CrossVLT). What surrounds a letterboxed picture belongs to no mask.

Where some expressions of a split fit nothing (gRefCOCO), its scores are the generalized ones.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from refseg_jax.data import transforms
from refseg_jax.data.files import write_whole
from refseg_jax.data.pipeline import EvalBatches, train_iterator
from refseg_jax.data.records import Sentence, Source
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.errors import UserError
from refseg_jax.metrics import Counts, overlap
from refseg_jax.predict import INPUTS, PredictFn

PROTOCOLS = ("original", "input")
CASES = ("best", "worst", "middle")
# Scores named in the one-line summary, by `generalized`; the first two are those of SELECTORS.
SELECTORS = ("mean", "overall")
HEADLINES = {False: ("mIoU", "oIoU"), True: ("gIoU", "cIoU", "N-acc", "T-acc")}


@dataclasses.dataclass(frozen=True)
class Example:
    """One scored sentence, to look at. The three arrays share H x W.

    Attributes:
      case: why it was picked, one of CASES.
      image: uint8 [H, W, 3].
      truth, prediction: bool [H, W].
    """

    case: str
    index: int
    text: str
    kind: str
    iou: float
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of one sweep, the same on every process.

    Attributes:
      counts: pixel counts of the M sentences, in source order.
      kinds: the kind of each of the M expressions ("" = unknown); in the control, of the one
        that belongs to the sample.
      truncated: how many expressions were longer than the model reads.
      shuffled: each image was given another one's expression (the control).
      examples: cases to look at, from this process's share of the sentences.
      generalized: some expressions of the split fit nothing, hence gRefCOCO's scores.
      no_target_area: a prediction of fewer pixels counted as empty.
    """

    name: str
    split: str
    protocol: str
    threshold: float
    shuffled: bool
    truncated: int
    seconds: float
    counts: Counts
    kinds: tuple[str, ...]
    examples: tuple[Example, ...] = ()
    generalized: bool = False
    no_target_area: int = 0

    @property
    def sentences(self) -> int:
        return len(self.counts)

    @property
    def metrics(self) -> dict[str, float]:
        """Scores by name in 0 .. 1, see `Counts.metrics`."""
        return self.counts.metrics(self.generalized)

    @property
    def headline(self) -> dict[str, float]:
        """The few scores that sum it up.

        Those are left out that are about no sentence of it.
        """
        scores = self.metrics
        names = HEADLINES[self.generalized]
        return {name: scores[name] for name in names if not math.isnan(scores[name])}

    @property
    def score(self) -> float:
        """The first of the headline: mIoU or gIoU."""
        return self.metrics[self.score_name]

    @property
    def score_name(self) -> str:
        return HEADLINES[self.generalized][0]

    def selected_by(self, selector: str) -> float:
        """What checkpoints are chosen by, of SELECTORS: mIoU or gIoU, oIoU or cIoU."""
        return self.metrics[HEADLINES[self.generalized][SELECTORS.index(selector)]]

    @property
    def by_kind(self) -> dict[str, Counts]:
        return self.counts.by_kind(self.kinds)


def sentence(source: Source, j: int) -> Sentence:
    """The j-th sentence of a source."""
    i, k = source.locate(j)
    return source[i].sentences[k]


def local_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is split over devices along its first axis only."""
    if array.is_fully_addressable:
        return np.asarray(array)
    # Devices may hold the same rows (replicas): keep one of each.
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def evaluate(
    predict_fn: PredictFn,
    variables: Any,
    source: Source,
    tokenizer: Tokenizer,
    *,
    image_size: int,
    max_tokens: int,
    batch_size: int,
    letterbox: bool = False,
    bicubic: bool = False,
    protocol: str = "original",
    threshold: float = 0.5,
    no_target_area: int = 0,
    shuffle_text: bool = False,
    limit: int | None = None,
    keep_examples: int = 0,
    put: Callable[[Mapping[str, np.ndarray]], Any] = jax.device_put,
    workers: int = 0,
    threads: int = 2,
    verbose: bool = True,
) -> Result:
    """Scores `predict_fn` on every sentence of every ref of `source`.

    With several processes, each sweeps its own share of the sentences, and the counts of all are
    gathered at the end; call it on all of them.

    Args:
      predict_fn: (variables, batch) -> probability [B, image_size, image_size], see
        `predict.make_predict_step`.
      source: the split to score on.
      batch_size: sentences per step, over all processes.
      letterbox: pictures keep their shape in the square, see `transforms.place`.
      bicubic: how probabilities get to the pictures' own size; else bilinear.
      protocol: "original" or "input", see the head of this file.
      threshold: a pixel is foreground if its probability is above this.
      no_target_area: a prediction of fewer pixels, where the comparison is made, is taken as
        empty (gRefCOCO: 50); 0: every pixel counts.
      shuffle_text: give each image another one's expression (the control).
      limit: score only so many sentences, evenly spread; None or 0: all.
      keep_examples: how many examples to keep of each case: best, worst, middle. None are kept
        of shuffled expressions.
      put: host batch -> device batch.
      workers, threads: load batches ahead, see `pipeline.train_iterator`; as many threads score.
      verbose: print a line with the scores to stderr. (A bar is drawn wherever that is a
        terminal.)

    Raises:
      UserError: unknown protocol, an unreadable image or annotation, a batch size that the
        processes do not divide, or expressions that cannot be shuffled.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"unknown scoring protocol {protocol!r}: use one of {', '.join(PROTOCOLS)}")
    begun = time.monotonic()
    batches = EvalBatches(
        source=source,
        tokenizer=tokenizer,
        image_size=image_size,
        max_tokens=max_tokens,
        batch_size=batch_size,
        letterbox=letterbox,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        limit=limit or None,
        shuffle_text_seed=0 if shuffle_text else None,
    )
    label = f"{source.name}/{source.split}{' (shuffled expressions)' if shuffle_text else ''}"
    keep_examples = 0 if shuffle_text else keep_examples
    first_process = jax.process_index() == 0
    score = _Scorer(
        *(source, protocol, threshold, no_target_area, image_size, letterbox, bicubic),
        keep=keep_examples > 0,
    )
    rows, kept = [], {}
    with (
        contextlib.closing(train_iterator(batches, workers=workers, threads=threads)) as loaded,
        concurrent.futures.ThreadPoolExecutor(max(1, threads)) as pool,
        tqdm(
            total=len(batches),
            desc=label,
            unit="batch",
            leave=False,
            disable=not (first_process and sys.stderr.isatty()),
        ) as bar,
    ):
        for batch, probability in _predictions(predict_fn, variables, loaded, put):
            each = zip(batch["index"].tolist(), batch["mask"], probability, strict=True)
            of_refs = [tuple(those) for _, those in itertools.groupby(each, score.ref_of)]
            for scored in pool.map(score, of_refs):
                rows += [row for row, _ in scored]
                kept |= {row[0]: mask for row, mask in scored if mask}
            bar.update()

    counts = Counts.from_rows(_gather(np.asarray(rows, np.int32).reshape(-1, 5)))
    square = (image_size, letterbox) if protocol == "input" else None
    sentences = [sentence(source, j) for j in counts.index.tolist()]
    result = Result(
        name=source.name,
        split=source.split,
        protocol=protocol,
        threshold=threshold,
        shuffled=shuffle_text,
        truncated=sum(tokenizer.encode(s.text, max_tokens)[2] for s in sentences),
        seconds=time.monotonic() - begun,
        counts=counts,
        kinds=tuple(s.kind for s in sentences),
        examples=tuple(_examples(source, counts, kept, keep_examples, square)),
        # Of the whole split, so that a part of it has the same scores.
        generalized=any(not source[i].ann_ids for i in range(len(source))),
        no_target_area=no_target_area,
    )
    if first_process and verbose:
        tqdm.write(_summary(label, result), file=sys.stderr)
    return result


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """Compares predictions with what was annotated; the fields are `evaluate`'s arguments."""

    source: Source
    protocol: str
    threshold: float
    no_target_area: int
    image_size: int
    letterbox: bool
    bicubic: bool
    keep: bool

    def ref_of(self, row: tuple[int, np.ndarray, np.ndarray]) -> int:
        """The index of the ref of a row as `__call__` takes it; -1 of padding."""
        return self.source.locate(row[0])[0] if row[0] >= 0 else -1

    def __call__(
        self, rows: Sequence[tuple[int, np.ndarray, np.ndarray]]
    ) -> list[tuple[tuple[int, ...], bytes]]:
        """Rows of `Counts` of one ref's sentences, each with its mask, packed, if it is to `keep`.

        `rows`: sentence number, mask and probability at the input's size.
        """
        i = self.ref_of(rows[0])
        if i < 0:
            return [((j, 0, 0, 0, 0), b"") for j, *_ in rows]
        to_original = self.protocol == "original"
        whole = self.source.mask(self.source[i]) if to_original or self.letterbox else None
        found = []
        for j, truth, values in rows:
            if to_original:
                truth = whole
                values = transforms.resize_map(values, *whole.shape, self.letterbox, self.bicubic)
            mask = values > self.threshold
            if self.letterbox and not to_original:  # Around the picture there is nothing.
                place = transforms.place(*whole.shape, self.image_size, True)
                mask &= _within(place, self.image_size)
            mask &= np.count_nonzero(mask) >= self.no_target_area
            has_target = bool(self.source[i].ann_ids)
            counts = j, *overlap(mask, truth), np.count_nonzero(mask), has_target
            found.append((counts, zlib.compress(np.packbits(mask), 1) if self.keep else b""))
        return found


def _within(place: tuple[int, int, int, int], size: int) -> np.ndarray:
    """bool [size, size], True inside of (left, top, right, bottom)."""
    left, top, right, bottom = place
    rows, columns = np.ogrid[:size, :size]
    return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)


def _predictions(predict_fn, variables, batches, put) -> Iterator[tuple[dict, np.ndarray]]:
    """(batch, probabilities), with the next batch dispatched before the last one is fetched."""
    waiting = None
    for batch in batches:
        dispatched = predict_fn(variables, put({name: batch[name] for name in INPUTS}))
        if waiting is not None:
            yield waiting[0], local_rows(waiting[1])
        waiting = batch, dispatched
    if waiting is not None:
        yield waiting[0], local_rows(waiting[1])


def _gather(rows: np.ndarray) -> np.ndarray:
    """int32 [n, 5] of this process -> those of all. n is the same on all: batches are padded."""
    if jax.process_count() == 1:
        return rows
    return np.asarray(multihost_utils.process_allgather(rows)).reshape(-1, rows.shape[1])


def _examples(
    source: Source,
    counts: Counts,
    kept: Mapping[int, bytes],
    number: int,
    square: tuple[int, bool] | None,
) -> Iterator[Example]:
    """Best, worst, and random ones from between the quartiles, of different images if possible.

    They are in the `square` of such a side and `letterbox`, or at the images' own size.
    The best have a target: a prediction that is rightly empty shows nothing.
    """
    at_hand = counts.select(np.isin(counts.index, list(kept)))
    # Ties (many sentences score 0) are broken at random, the same way every time.
    order = np.random.default_rng(0).permutation(len(at_hand))
    order = order[np.argsort(at_hand.iou[order], kind="stable")]
    quarter = len(order) // 4
    middle = np.random.default_rng(1).permutation(order[quarter : len(order) - quarter])
    taken, seen = set(), set()
    best = order[::-1][at_hand.target[order[::-1]] == 1]
    for case, ranking in zip(CASES, (best, order, middle), strict=True):
        picked = []
        for repeat_images in (False, True):
            for position in ranking:
                j = int(at_hand.index[position])
                image_id = source[source.locate(j)[0]].image_id
                if len(picked) == number:
                    break
                if j in taken or (image_id in seen and not repeat_images):
                    continue
                picked.append((j, float(at_hand.iou[position])))
                taken.add(j)
                seen.add(image_id)
        for j, iou in picked:
            ref = source[source.locate(j)[0]]
            image, truth = source.image(ref), source.mask(ref)
            if square:
                image = transforms.resize_image(image, *square)
                truth = transforms.resize_mask(truth, *square)
            bits = np.frombuffer(zlib.decompress(kept[j]), np.uint8)
            mask = np.unpackbits(bits, count=truth.size).astype(bool).reshape(truth.shape)
            said = sentence(source, j)
            yield Example(case, j, said.text, said.kind, iou, image, truth, mask)


def _summary(label: str, result: Result) -> str:
    text = (
        f"{label}: {result.sentences} sentences in {result.seconds:.1f} s, "
        f"{spell(result.headline)} ({result.protocol} size)"
    )
    return text + (f", {result.truncated} expressions truncated" if result.truncated else "")


def spell(scores: Mapping[str, float]) -> str:
    """{"mIoU": 0.62134, ...} -> "mIoU 0.6213, ..."."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def columns(results: Mapping[str, Result]) -> tuple[str, ...]:
    """Names of all scores that the results have."""
    return tuple(dict.fromkeys(name for result in results.values() for name in result.metrics))


def table_rows(results: Mapping[str, Result]) -> Iterator[tuple[str, str, int, dict[str, float]]]:
    """(split, kind, sentences, metrics): a row with kind "" per result, its kinds beneath it."""
    for split, result in results.items():
        yield split, "", result.sentences, result.metrics
        for kind, counts in result.by_kind.items():
            yield split, kind, len(counts), counts.metrics(result.generalized)


def percent(value: float | None) -> str:
    """0.6213 -> "62.13"; no number -> "-"."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def format_table(results: Mapping[str, Result]) -> str:
    """Plain-text table, scores in percent: one row per split, its kinds of expression beneath."""
    names = columns(results)
    lines = [("split", "sentences", *names)]
    for split, kind, count, scores in table_rows(results):
        label = f"  {kind}" if kind else split
        lines.append((label, str(count), *(percent(scores.get(name)) for name in names)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def to_json(result: Result) -> dict[str, Any]:
    """Everything of a result but the pictures and the single sentences."""

    area = result.no_target_area

    def scores(counts: Counts) -> dict[str, Any]:
        # JSON has no NaN.
        metrics = counts.metrics(result.generalized)
        values = {k: None if math.isnan(v) else v for k, v in metrics.items()}
        return {"sentences": len(counts), **values}

    return {
        "dataset": result.name,
        "split": result.split,
        "protocol": result.protocol,
        "threshold": result.threshold,
        **({"no_target_area": area} if result.generalized or area else {}),
        "shuffled": result.shuffled,
        "truncated": result.truncated,
        "seconds": round(result.seconds, 2),
        **scores(result.counts),
        "by_kind": {kind: scores(counts) for kind, counts in result.by_kind.items()},
    }


def write_json(path: str | os.PathLike, results: Mapping[str, Result], **more: Any) -> None:
    """Writes {"results": {split: ...}, **more} as one JSON object."""
    content = {**more, "results": {split: to_json(r) for split, r in results.items()}}
    write_whole(path, json.dumps(content, indent=2) + "\n")
