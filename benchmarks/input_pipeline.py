"""How many images a second does the input pipeline load on one core, and what takes the time?

    python -m benchmarks.input_pipeline [--root DIR] [--image_size 480]

`--root` is a prepared dataset, or a folder in the `refer` layout (with `--dataset`, `--split_by`);
without it, 640 x 480 JPEGs of drawn scenes with noise are made, and read both raw and prepared.

JSON lines: `part` are the CPU milliseconds of each step for one sample, and of the whole, `rest`
being what no step accounts for. `yardstick` is decoding and resizing alone, by Pillow, with the
picture in memory; it takes turns with the whole. `loader` is what `train_iterator` yields, by the
clock, with so many worker processes of one thread each (0: a thread of this process, whose CPU
seconds are counted too: they mean something on a busy machine as well).
"""

import argparse
import contextlib
import gc
import io
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from benchmarks.paper import integers, positive
from refseg_jax.data import custom, prepare, scenes, sets, shapes
from refseg_jax.data.pipeline import TrainBatches, train_iterator
from refseg_jax.data.records import FileSource
from refseg_jax.data.shards import is_prepared
from refseg_jax.data.transforms import resize_mask
from refseg_jax.errors import command

WIDTH, HEIGHT = 640, 480


def make_photos(folder: pathlib.Path, count: int) -> dict[str, FileSource]:
    """Drawn scenes with noise as JPEGs, raw and prepared: as large as a photo, and as detailed.

    One sentence is about each: what rows of a batch share is read once.
    """
    (folder / "images").mkdir()
    source = shapes.ShapesSource("train", num_scenes=count, size=WIDTH)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(0, len(source), shapes.REFS_PER_SCENE):
        ref, name = source[i], f"{i:05d}.jpg"
        noise = rng.normal(0, 14, (HEIGHT // 2, WIDTH // 2, 1)).repeat(2, 0).repeat(2, 1)
        pixels = source.image(ref)[:HEIGHT] + noise + rng.normal(0, 4, (HEIGHT, WIDTH, 1))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / "images" / name, quality=90)
        shape = source.scene(ref).shapes[ref.ann_ids[0] % 10]
        lines.append(
            {
                "image": name,
                "polygon": _outline(shape),
                "sentences": [ref.sentences[0].text],
                "split": "train",
            }
        )
    said = folder / "said.jsonl"
    said.write_text("\n".join(map(json.dumps, lines)))
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main(
            ["coco", "--images", str(folder / "images"), "--expressions", str(said),
             "--out", str(folder / "prepared"), "--workers", "1"]
        )  # fmt: skip
    raw = custom.read_lines(said, folder / "images", name="drawn")
    return {"raw": raw["train"], "prepared": sets.open_set(folder / "prepared", sets.ANY)["train"]}


def _outline(shape: scenes.Shape, corners: int = 30) -> list[float]:
    """About as many corners as annotators give an object; the image is cut, this is squeezed."""
    points = []
    for angle in np.linspace(0, 2 * math.pi, corners, endpoint=False):
        radius = shape.radius * (0.9 + 0.1 * math.cos(5 * angle))
        points.append(WIDTH * min(max(shape.x + radius * math.cos(angle), 0), 1))
        points.append(HEIGHT * min(max(shape.y + radius * math.sin(angle), 0), 1))
    return points


def resize(picture: Image.Image, size: int) -> np.ndarray:
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def cpu_ms(
    steps: dict[str, Callable[[int], object]], samples: int, repeats: int
) -> dict[str, float]:
    """CPU milliseconds of each step for one sample: the best mean over all; they take turns."""
    best = dict.fromkeys(steps, math.inf)
    for _ in range(repeats):
        for name, step in steps.items():
            begun = time.process_time()
            for k in range(samples):
                step(k)
            best[name] = min(best[name], 1e3 * (time.process_time() - begun) / samples)
    return best


def measure_parts(name: str, batches: TrainBatches, samples: int, repeats: int) -> None:
    """Prints what each step costs, of the same samples one after the other."""
    source, size = batches.source, batches.image_size
    # Of each picture one, as in `make_photos`.
    places = (source.image_place(source[source.locate(j)[0]]) for j in range(source.num_sentences))
    first = {place: j for j, place in reversed(list(enumerate(places)))}
    numbers = np.random.default_rng(0).permutation(list(first.values()))[:samples].tolist()
    samples, rows = len(numbers), batches.batch_size
    refs = [source[source.locate(j)[0]] for j in numbers]
    texts = [source[i].sentences[k].text for i, k in map(source.locate, numbers)]
    pictures = [source.image_bytes(ref) for ref in refs]
    masks = [source.mask(ref) for ref in refs]

    def decode(k: int) -> Image.Image:
        picture = Image.open(io.BytesIO(pictures[k]))
        picture.load()
        return picture

    def decode_and_resize(k: int) -> np.ndarray:
        return resize(decode(k), size)

    def load(k: int) -> None:
        if k % rows == 0:
            batches._load(numbers[k : k + rows], numbers[k : k + rows])

    decoded = [decode(k).convert("RGB") for k in range(min(8, len(refs)))]
    load(0)
    steps = {
        "read": lambda k: source.image_bytes(refs[k]),
        "decode": decode,
        "resize": lambda k: resize(decoded[k % len(decoded)], size),
        "mask": lambda k: source.mask(refs[k]),
        "resize mask": lambda k: resize_mask(masks[k], size),
        "tokenise": lambda k: batches.tokenizer.encode(texts[k], batches.max_tokens),
    }
    parts = cpu_ms(steps, samples, repeats)
    yardstick, whole = cpu_ms({"": decode_and_resize, "whole": load}, samples, repeats).values()
    seen = sum(ms for step, ms in parts.items() if step != "tokenise")  # Kept, once encoded.
    for step, ms in {**parts, "rest": whole - seen, "whole": whole}.items():
        emit(benchmark="part", source=name, part=step, ms=round(ms, 3))
    emit(
        benchmark="yardstick",
        source=name,
        ms=round(yardstick, 3),
        images_per_s=round(1e3 / yardstick, 1),
        whole_images_per_s=round(1e3 / whole, 1),
        whole_over_yardstick=round(whole / yardstick, 3),
    )


def measure_loader(name: str, batches: TrainBatches, workers: int) -> None:
    """Prints images a second of the iterator itself, after its first two batches."""
    iterator: Iterator = train_iterator(batches, workers=workers, threads=1)
    for _ in range(2):
        next(iterator)
    begun, cpu_begun, count = time.perf_counter(), time.process_time(), 0
    for batch in iterator:
        count += len(batch["index"])
    rate = count / (time.perf_counter() - begun)
    cpu_rate = count / (time.process_time() - cpu_begun)
    del iterator, batch
    gc.collect()  # Lets go of memory shared with workers: Python would call it leaked.
    emit(
        benchmark="loader",
        source=name,
        image_size=batches.image_size,
        workers=workers,
        images_per_s=round(rate, 1),
        per_core=round(rate / max(1, workers), 1),
        per_cpu_s=None if workers else round(cpu_rate, 1),
    )


def emit(**line) -> None:
    print(json.dumps(line), flush=True)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", help="prepared, or in the refer layout")
    parser.add_argument("--dataset", default="refcoco")
    parser.add_argument("--split_by", default="unc")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image_size", type=positive, default=480)
    parser.add_argument("--samples", type=positive, default=192)
    parser.add_argument("--steps", type=positive, default=40, help="batches of 16 for the loader")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--workers", type=integers, default=(0, 1, 2), help="0: none")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.root:
            name = sets.set_name(args.dataset, args.split_by)
            name = sets.ANY if is_prepared(args.root) else name
            sources = {
                args.root: sets.open_set(args.root, name, [args.split], text_field=None)[args.split]
            }
        else:
            sources = make_photos(pathlib.Path(folder), 96)
        for name, source in sources.items():
            batches = TrainBatches(
                source, shapes.tokenizer(), image_size=args.image_size, max_tokens=20,
                batch_size=16, num_steps=2 + args.steps, seed=0,
            )  # fmt: skip
            measure_parts(name, batches, args.samples, args.repeats)
            for workers in args.workers:
                measure_loader(name, batches, workers)
    return 0


if __name__ == "__main__":
    sys.exit(command(main)())
