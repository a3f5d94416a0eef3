"""Writes prepared datasets (see `shards.py`): planned first, then shard by shard.

Which image goes into which shard is fixed by the plan alone. A shard gets its name when it is
whole, with its checksum beside it; index and manifest come last. So a preparation that was killed
goes on with the shards that are missing, and what comes out does not depend on kills or workers.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import pathlib
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from refseg_jax.data import rle
from refseg_jax.data.files import (
    checksum,
    left_over,
    locked,
    read_json,
    replacing,
    sha256,
    write_json,
)
from refseg_jax.data.records import FileSource, ImageFile, RefList
from refseg_jax.data.refer import KNOWN_COUNTS, count_differences
from refseg_jax.data.shards import (
    FORMAT,
    INDEX,
    MANIFEST,
    PLAN,
    VERSION,
    Header,
    index_records,
    pack,
    ref_fields,
)
from refseg_jax.data.transforms import read_image
from refseg_jax.data.workers import end_with_parent
from refseg_jax.errors import UserError

# Single records, to be read at random; pictures are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_FAULTS_SHOWN = 5

Place = tuple[str, int]  # A ref: its split and number.
ShardState = dict[str, Any]  # Of one shard, with these fields:
# left_out: [[split, number, why], ...], blank: [[split, number], ...].
_STATE_FIELDS = {"file", "records", "bytes", "sha256", "left_out", "blank"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be written.

    Attributes:
      sources: the splits, in order.
      about: what the manifest says of the origin: source, licence, ...
      partial: leave out what cannot be used, and list it, where that is an error otherwise.
    """

    dataset: str
    split_by: str
    sources: Mapping[str, FileSource]
    about: Mapping[str, Any]
    images_per_shard: int = 256
    partial: bool = False

    @functools.cached_property
    def images(self) -> dict[ImageFile, list[Place]]:
        """Every image once, in the order of first use, with the refs that lie on it."""
        images: dict[ImageFile, list[Place]] = {}
        for split, source in self.sources.items():
            for i in range(len(source)):
                images.setdefault(source.image_file(source[i]), []).append((split, i))
        return images

    @functools.cached_property
    def shards(self) -> list[tuple[ImageFile, ...]]:
        images, size = tuple(self.images), self.images_per_shard
        return [images[start : start + size] for start in range(0, len(images), size)]

    def file(self, k: int) -> str:
        return f"images-{k:05d}-of-{len(self.shards):05d}.array_record"

    def digest(self) -> str:
        """Of all that determines what is written, but for the pictures and masks themselves."""
        head = [FORMAT, VERSION, self.dataset, self.split_by, self.images_per_shard]
        digest = hashlib.sha256(pack([*head, dict(self.about)]))
        for split, source in self.sources.items():
            for ref in (source[i] for i in range(len(source))):
                file = dataclasses.astuple(source.image_file(ref))
                try:
                    digest.update(pack([split, file, ref_fields(ref)]))
                except ValueError as error:
                    raise UserError(f"ref {ref.ref_id} of split {split!r}: {error}") from error
        return digest.hexdigest()


def write(plan: Plan, out: str | os.PathLike[str], workers: int = 1) -> dict[str, Any]:
    """Writes what `plan` says into the folder `out`, with so many processes; returns the manifest.

    Shards that are there already, from a run that was killed or has finished, are verified by
    their checksums and kept; damaged ones are written again.

    Raises:
      UserError: `out` holds something else, another process is writing to it, it cannot be
        written, or images or masks are damaged (a few are named) and the plan is not `partial`.
    """
    out = pathlib.Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, "preparation"):
            finished = read_json(out / MANIFEST) if (out / MANIFEST).exists() else None
            states = _adopt(plan, out)
            states = list(_shards(plan, out, states, workers))
            _refuse_faults(plan, out, states, finished)
            return _finish(plan, out, states)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error}") from error
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "a worker process died, perhaps of too little memory: run the same command again to "
            "go on from here, with fewer --workers"
        ) from error


def _adopt(plan: Plan, out: pathlib.Path) -> dict[int, ShardState]:
    """States of the shards that lie in `out`, which is made this plan's if it is empty."""
    digest = plan.digest()
    manifest, begun = out / MANIFEST, out / PLAN
    known = next((read_json(path) for path in (manifest, begun) if path.exists()), None)
    parts = left_over(out)
    if known is None and len(parts) < len(list(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no preparation: give another --out")
    if known is not None and known.get("plan") != digest:
        same = known.get("dataset") == plan.dataset and known.get("split_by") == plan.split_by
        if same and known.get("refused"):  # What was wrong has been mended, it seems.
            _begin_anew(out)
            return _adopt(plan, out)
        raise UserError(
            f"{out} holds another preparation, of {known.get('dataset')!r}, of other annotations "
            "or options, or of an earlier version: give another --out, or delete it"
        )
    for path in parts:
        path.unlink()
    states = (known or {}).get("shards", [])
    if not begun.exists():
        of = {"dataset": plan.dataset, "split_by": plan.split_by}
        write_json(begun, {"plan": digest, **of, "shards": states})
    manifest.unlink(missing_ok=True)  # Not to be believed until all is verified.
    asides = [out / f"{plan.file(k)}.json" for k in range(len(plan.shards))]
    states = [*states, *(read_json(aside) for aside in asides if aside.exists())]
    by_file = {state["file"]: state for state in states if state.keys() == _STATE_FIELDS}
    return {k: by_file[plan.file(k)] for k in range(len(plan.shards)) if plan.file(k) in by_file}


def _begin_anew(out: pathlib.Path) -> None:
    """Deletes a preparation that was refused for its faults."""
    for path in out.glob("images-*-of-*.array_record*"):
        path.unlink()
    (out / INDEX).unlink(missing_ok=True)
    (out / PLAN).unlink()


def _shards(
    plan: Plan, out: pathlib.Path, states: Mapping[int, ShardState], workers: int
) -> Iterator[ShardState]:
    """Sees to it that every shard is there, in parallel; their states, in order."""
    jobs = [(k, states.get(k)) for k in range(len(plan.shards))]
    with tqdm(
        total=len(plan.images),
        desc=f"{plan.dataset} {plan.split_by}".strip(),
        unit="image",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        if workers <= 1 or len(jobs) == 1:
            for k, state in jobs:
                yield _make_shard(plan, out, k, state)
                bar.update(len(plan.shards[k]))
            return
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, len(jobs)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(plan, out),
        )
        try:
            numbers = {pool.submit(_work, *job): job[0] for job in jobs}
            done = {}
            for future in concurrent.futures.as_completed(numbers):
                done[numbers[future]] = future.result()
                bar.update(len(plan.shards[numbers[future]]))
            yield from (done[k] for k, _ in jobs)
        finally:
            pool.shutdown(cancel_futures=True)


_task: tuple[Plan, pathlib.Path]  # A worker's.


def _start_worker(plan: Plan, out: pathlib.Path) -> None:
    global _task
    _task = plan, out
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle.
    end_with_parent()


def _work(k: int, state: ShardState | None) -> ShardState:
    return _make_shard(*_task, k, state)


def _make_shard(plan: Plan, out: pathlib.Path, k: int, state: ShardState | None) -> ShardState:
    """Writes shard k, unless it is there as `state` says. Faulty ones only if `plan.partial`."""
    path = out / plan.file(k)
    if (
        state
        and path.exists()
        and sha256(path) == state["sha256"]
        and (not state["left_out"] or plan.partial and _faults_of(plan, state) == state["left_out"])
    ):
        return state
    left_out: list[list] = []
    blank: list[list] = []
    records = 0

    def usable() -> Iterator[bytes]:
        nonlocal records
        for image in plan.shards[k]:
            record, faults = _record(plan, image, blank)
            left_out.extend(faults)
            if record is not None:
                records += 1
                yield record

    with replacing(path) as temporary:
        _write_records(temporary, usable())
        if left_out and not plan.partial:
            temporary.unlink()
            return {"left_out": left_out}
        state = {"file": path.name, "records": records, **checksum(temporary)}
        state |= {"left_out": left_out, "blank": blank}
    write_json(out / f"{path.name}.json", state)
    return state


def _faults_of(plan: Plan, state: ShardState) -> list[list]:
    """What `state` would leave out today, of the same images: some may have been mended."""
    refs = ((plan.sources[split], i) for split, i, _ in state["left_out"])
    images = dict.fromkeys(source.image_file(source[i]) for source, i in refs)
    return [fault for image in images for fault in _record(plan, image, [])[1]]


def _write_records(path: pathlib.Path, records: Iterable[bytes]) -> None:
    try:
        writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _record(plan: Plan, image: ImageFile, blank: list[list]) -> tuple[bytes | None, list[list]]:
    """The record of one image, and [split, number, why] for every ref that is left out.

    To `blank` go those, [split, number], that have a target but no pixel of it.
    """
    places, size = plan.images[image], (image.height, image.width)
    split, first = places[0]
    source = plan.sources[split]
    try:
        picture = source.image_bytes(source[first])
        read_image(picture, size, image.name)
    except UserError as error:
        return None, [[split, i, str(error)] for split, i in places]
    entries, faults = [], []
    # Sets that are merged may have a photograph in common, or only its name.
    same = {source.image_place(source[first]): True}
    for split, i in places:
        source = plan.sources[split]
        ref = source[i]
        try:
            place = source.image_place(ref)
            if place not in same:
                same[place] = source.image_bytes(ref) == picture
            if not same[place]:
                raise UserError(
                    f"{place} is another picture than that of {_named(plan, *places[0])}, of the "
                    "same name and size: rename one, where its set is prepared from"
                )
            mask = source.mask(ref)
            if mask.shape != size:
                raise UserError(f"mask and image {image.name} differ in size")
        except UserError as error:
            faults.append([split, i, str(error)])
            continue
        if ref.ann_ids and not mask.any():
            blank.append([split, i])
        entries.append({"split": split, **ref_fields(ref), "mask": rle.encode(mask)})
    if not entries:
        return None, faults
    record = {"name": image.name, "height": image.height, "width": image.width}
    return pack({**record, "image": picture, "refs": entries}), faults


def _refuse_faults(
    plan: Plan, out: pathlib.Path, states: list[ShardState], finished: dict[str, Any] | None
) -> None:
    """UserError: there are faults. What was `finished` without them stays so, if it can."""
    faults = [_fault(plan, *fault) for state in states for fault in state["left_out"]]
    if faults and not plan.partial:
        if finished and all(
            now in (was, {"left_out": was["left_out"]}) and (out / was["file"]).exists()
            for was, now in zip(finished["shards"], states, strict=True)
        ):
            write_json(out / MANIFEST, finished)
            (out / PLAN).unlink()
        else:
            # Once annotations or masks are mended it is another plan, which may take its place.
            write_json(out / PLAN, {**read_json(out / PLAN), "refused": True})
        raise UserError(
            f"{len(faults)} refs cannot be prepared: {'; '.join(faults[:_FAULTS_SHOWN])}"
            f"{'; ...' * (len(faults) > _FAULTS_SHOWN)} (mend them and run this again, or leave "
            "them out with --partial)"
        )


def missing_splits(plan: Plan) -> list[str]:
    """Splits that are published of its dataset, and not among its sources."""
    known = KNOWN_COUNTS.get((plan.dataset, plan.split_by), {})
    return [split for split in known if split not in plan.sources]


def _fault(plan: Plan, split: str, i: int, why: str) -> str:
    source = plan.sources[split]
    origin = source.origin(source[i])
    return ": ".join([_named(plan, split, i), *([origin] if origin not in why else []), why])


def _named(plan: Plan, split: str, i: int) -> str:
    return f"ref {plan.sources[split][i].ref_id} of {split}"


def _finish(plan: Plan, out: pathlib.Path, states: list[ShardState]) -> dict[str, Any]:
    """Writes index and manifest, and tidies up."""
    left_out = {(split, i) for state in states for split, i, _ in state["left_out"]}
    images, places = [], {}
    for image in plan.images:
        kept = [place for place in plan.images[image] if place not in left_out]
        if kept:
            places |= {place: (len(images), j) for j, place in enumerate(kept)}
            images.append(image)
    refs = {
        split: [(source[i], *places[split, i]) for i in range(len(source)) if (split, i) in places]
        for split, source in plan.sources.items()
    }
    skipped = {split: list(source.faults) for split, source in plan.sources.items()}
    for state in states:
        for fault in state["left_out"]:
            skipped[fault[0]].append(_fault(plan, *fault))
    empty = [split for split, rows in refs.items() if not rows]
    if empty:
        why = [line for split in empty for line in skipped[split]]
        raise UserError(
            f"nothing usable is left of split {', '.join(empty)}: {'; '.join(why[:_FAULTS_SHOWN])}"
            f"{f'; ... ({len(why)} refs)' if len(why) > _FAULTS_SHOWN else ''}"
        )
    others = dict.fromkeys(
        (split, image) for split, source in plan.sources.items() for image in source.other_images
    )
    for split, i, _ in (fault for state in states for fault in state["left_out"]):
        source = plan.sources[split]
        others[split, source.image_file(source[i])] = None
    header = Header(
        plan.dataset,
        plan.split_by,
        tuple((state["file"], state["records"]) for state in states if state["records"]),
        tuple(refs),
        plan.about.get("text_field", ""),
        # A name that cannot be encoded is no file's.
        tuple(
            (split, file.name.encode("utf-8", "replace").decode(), file.height, file.width)
            for split, file in others
        ),
    )
    with replacing(out / INDEX) as temporary:
        _write_records(temporary, index_records(header, images, refs.values()))
        index = {"file": INDEX, **checksum(temporary)}
    kept = {split: RefList(plan.dataset, split, [r[0] for r in refs[split]]) for split in refs}
    differences = {
        split: count_differences(source, plan.split_by) for split, source in kept.items()
    }
    differences |= {split: ["it is missing"] for split in missing_splits(plan)}
    blank: dict[str, list[str]] = {}
    for split, i in (place for state in states for place in state["blank"]):
        blank.setdefault(split, []).append(_named(plan, split, i))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dataset": plan.dataset,
        "split_by": plan.split_by,
        **plan.about,
        "splits": {
            split: {
                "refs": len(source),
                "images": len({number for _, number, _ in refs[split]}),
                "sentences": source.num_sentences,
                "without_target": sum(not ref.ann_ids for ref, *_ in refs[split]),
            }
            for split, source in kept.items()
        },
        "images": len(images),
        "differences": {split: lines for split, lines in differences.items() if lines},
        "skipped": {split: lines for split, lines in skipped.items() if lines},
        "blank": blank,
        "index": index,
        "shards": states,
        "plan": read_json(out / PLAN)["plan"],
    }
    write_json(out / MANIFEST, manifest)
    for path in (*(out / f"{state['file']}.json" for state in states), out / PLAN):
        path.unlink(missing_ok=True)
    return manifest
