import collections
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from jax._src import xla_bridge
from PIL import Image

from refseg_jax.data import pipeline
from refseg_jax.data.pipeline import EvalBatches, TrainBatches, train_iterator
from refseg_jax.data.records import Ref, Sentence
from refseg_jax.data.refer import ReferSource
from refseg_jax.data.shapes import ShapesSource, tokenizer
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.data.transforms import read_image, resize_image, resize_mask
from refseg_jax.errors import UserError

WORDS = Tokenizer.from_words(["left", "right", *map(str, range(50))])
COUNTS = (1, 3, 2, 1, 4)  # sentences per ref: 11


class ToySource:
    """Refs whose image, mask and sentences tell which they are."""

    name, split = "toy", "train"

    def __init__(self, counts=COUNTS, size=(10, 14), broken_image=None):
        self.size, self.broken_image = size, broken_image
        self.pairs = [(i, k) for i, count in enumerate(counts) for k in range(count)]
        self.num_sentences = len(self.pairs)
        self.refs = [
            Ref(
                i,
                *(i, (i,), "toy", "train"),
                tuple(
                    Sentence(f"left {j}", j) for j, (ref, _) in enumerate(self.pairs) if ref == i
                ),
            )
            for i in range(len(counts))
        ]

    def __len__(self):
        return len(self.refs)

    def __getitem__(self, i):
        return self.refs[i]

    def locate(self, j):
        return self.pairs[j]

    def image(self, ref):
        if self.broken_image is not None:
            return read_image(self.broken_image)
        return np.full((*self.size, 3), 10 * ref.ref_id, np.uint8)

    def mask(self, ref):
        mask = np.zeros(self.size, bool)
        mask[: 1 + ref.ref_id] = True
        return mask


class NoDeviceSource(ToySource):
    """Fails where JAX has been given a device to hold."""

    def image(self, ref):
        assert not xla_bridge._backends, "an input worker started a JAX backend"
        return super().image(ref)


def train_batches(source=None, **changes):
    settings = {"image_size": 8, "max_tokens": 6, "batch_size": 4, "num_steps": 9, "seed": 3}
    return TrainBatches(source or ToySource(), WORDS, **settings | changes)


def eval_batches(source=None, **changes):
    settings = {"image_size": 8, "max_tokens": 6, "batch_size": 4}
    return EvalBatches(source or ToySource(), WORDS, **settings | changes)


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            assert batch[key].dtype == other[key].dtype
            np.testing.assert_array_equal(batch[key], other[key])


def numbers(batches):
    return np.concatenate([batch["index"] for batch in batches]).tolist()


def test_a_batch_holds_what_its_index_says():
    source = ToySource()
    batch = train_batches(source)[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((4, 8, 8, 3), "uint8"),
        "mask": ((4, 8, 8), "bool"),
        "tokens": ((4, 6), "int32"),
        "token_mask": ((4, 6), "bool"),
        "valid": ((4,), "bool"),
        "index": ((4,), "int32"),
    }
    assert batch["valid"].all()
    for row, j in enumerate(batch["index"]):
        ref = source[source.locate(j)[0]]
        ids, token_mask, _ = WORDS.encode(f"left {j}", 6)
        np.testing.assert_array_equal(batch["image"][row], resize_image(source.image(ref), 8))
        np.testing.assert_array_equal(batch["mask"][row], resize_mask(source.mask(ref), 8))
        np.testing.assert_array_equal(batch["tokens"][row], ids)
        np.testing.assert_array_equal(batch["token_mask"][row], token_mask)


def test_sentence_sampling_takes_every_pair_once_per_epoch():
    batches = train_batches(num_steps=11)
    assert batches.samples_per_epoch == 11
    drawn = np.reshape(numbers(batches), (4, 11))
    assert (np.sort(drawn, axis=1) == np.arange(11)).all()
    assert len({tuple(epoch) for epoch in drawn}) == 4
    assert numbers(train_batches(seed=4)) != numbers(train_batches(seed=3))


def test_ref_sampling_takes_every_ref_once_and_its_sentences_evenly():
    source = ToySource()
    batches = train_batches(source, num_steps=500, sampling="ref", image_size=1)
    assert batches.samples_per_epoch == 5
    drawn = numbers(batches)
    refs = np.reshape([source.locate(j)[0] for j in drawn], (400, 5))
    assert (np.sort(refs, axis=1) == np.arange(5)).all()
    for j, count in collections.Counter(drawn).items():
        expected = 400 / COUNTS[source.locate(j)[0]]
        assert abs(count - expected) <= 4 * np.sqrt(expected), (j, count)
    assert len(set(drawn)) == 11


@pytest.mark.parametrize("sampling", pipeline.SAMPLINGS)
def test_processes_split_the_global_batch(sampling):
    whole = train_batches(sampling=sampling)
    halves = [train_batches(sampling=sampling, process_index=p, process_count=2) for p in range(2)]
    for step in range(len(whole)):
        parts = [half[step] for half in halves]
        joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        assert_same([joined], [whole[step]])


def test_settings_that_cannot_be_met():
    with pytest.raises(UserError, match="batch size 4 .* 3 processes"):
        train_batches(process_count=3)
    with pytest.raises(UserError, match="unknown sampling 'refs'; there is sentence, ref"):
        train_batches(sampling="refs")


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("start", [0, 4, 9])
def test_iterator_starts_anywhere(threads, start):
    batches = train_batches(sampling="ref")
    expected = [batches[step] for step in range(start, 9)]
    assert_same(train_iterator(batches, start, threads=threads), expected)


@pytest.mark.parametrize(("workers", "start"), [(1, 4), (2, 0)])
def test_worker_processes_change_nothing_and_start_no_device(workers, start):
    batches = train_batches(NoDeviceSource(), sampling="ref")
    expected = [train_batches(sampling="ref")[step] for step in range(start, 9)]
    iterator = train_iterator(batches, start, workers=workers, threads=2)
    assert_same([next(iterator) for _ in expected], expected)
    assert len(multiprocessing.active_children()) == workers
    iterator.close()
    assert not multiprocessing.active_children()


def test_workers_leave_signals_to_the_run():
    """A terminal sends Ctrl-C to all of them; the run has yet to save."""
    iterator = train_iterator(train_batches(NoDeviceSource()), workers=1)

    def tell():
        for child in multiprocessing.active_children():
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(child.pid, number)

    starting = threading.Timer(0.5, tell)  # While it still imports what it needs.
    starting.start()
    next(iterator)
    starting.join()
    tell()
    time.sleep(0.2)
    assert len(list(iterator)) == 8
    iterator.close()
    assert not multiprocessing.active_children()


ORPHANED = """
import multiprocessing, os
from tests.test_pipeline import NoDeviceSource, train_batches, train_iterator

if __name__ == "__main__":
    iterator = train_iterator(train_batches(NoDeviceSource()), workers=1)
    next(iterator)
    (child,) = multiprocessing.active_children()
    print(child.pid, flush=True)
    os._exit(2)
"""


def test_workers_do_not_outlive_the_run(tmp_path):
    (tmp_path / "orphaned.py").write_text(ORPHANED)
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, tmp_path / "orphaned.py"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    deadline = time.monotonic() + 60
    while pathlib.Path(f"/proc/{int(done.stdout)}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_caller_as_they_are(tmp_path, workers):
    path = tmp_path / "broken.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    batches = train_batches(ToySource(broken_image=path))
    with pytest.raises(UserError, match=r"^cannot read .*broken.jpg as an image") as error:
        next(train_iterator(batches, workers=workers))
    assert type(error.value) is UserError and "\n" not in str(error.value)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_evaluation_takes_every_sentence_in_order(batch_size):
    batches = list(eval_batches(batch_size=batch_size))
    assert len(batches) == -(-11 // batch_size)
    index = np.array(numbers(batches))
    assert index[:11].tolist() == list(range(11)) and (index[11:] == -1).all()
    last = batches[-1]
    np.testing.assert_array_equal(last["valid"], last["index"] >= 0)
    padding = {key: value[~last["valid"]] for key, value in last.items()}
    assert not padding["image"].any() and not padding["mask"].any()
    assert (padding["tokens"] == WORDS.pad_id).all() and not padding["token_mask"].any()


def test_a_picture_that_refs_share_is_read_once_for_a_batch():
    read = []

    class OfPairs(ToySource):
        def image(self, ref):
            read.append(ref.ref_id)
            return np.full((*self.size, 3), ref.ref_id // 2, np.uint8)

    class Placed(OfPairs):
        def image_place(self, ref):
            return str(ref.ref_id // 2)

    expected = list(eval_batches(OfPairs()))
    read.clear()
    assert_same(list(eval_batches(Placed())), expected)
    assert read == [0, 2, 4, 4]  # Batches of four sentences, of refs 0111 2234 444.


def test_evaluation_has_as_many_batches_on_every_process():
    whole = list(eval_batches())
    parts = [list(eval_batches(process_index=p, process_count=4)) for p in range(4)]
    assert {len(part) for part in parts} == {3}
    joined = [
        {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for batches in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_evaluation_batches_iterate_ahead():
    assert_same(
        train_iterator(eval_batches(shuffle_text_seed=0)), eval_batches(shuffle_text_seed=0)
    )


@pytest.mark.parametrize("counts", [COUNTS, (1, 1), (2, 1, 1), (3, 3), (1, 2, 5, 2)])
def test_shuffled_text_is_a_derangement_over_refs(counts):
    source = ToySource(counts)
    plain = list(eval_batches(source))
    for seed in range(5):
        shuffled = list(eval_batches(source, shuffle_text_seed=seed))
        assert_same(shuffled, eval_batches(source, shuffle_text_seed=seed))
        said = []
        for batch, original in zip(shuffled, plain, strict=True):
            for key in ("image", "mask", "valid", "index"):
                np.testing.assert_array_equal(batch[key], original[key])
            said += batch["tokens"][batch["valid"]].tolist()
        texts = [WORDS.encode(f"left {j}", 6)[0].tolist() for j in range(source.num_sentences)]
        others = [texts.index(tokens) for tokens in said]
        assert sorted(others) == list(range(source.num_sentences))
        for j, other in enumerate(others):
            assert source.locate(j)[0] != source.locate(other)[0]


def test_shuffling_one_refs_expressions_is_refused():
    with pytest.raises(UserError, match="more than half"):
        eval_batches(ToySource((3, 1)), shuffle_text_seed=0)[0]


def test_truncated_expressions_are_counted():
    source = ToySource()  # "left 3": 4 tokens with [CLS] and [SEP]
    assert pipeline.count_truncated(source, WORDS, 4) == 0
    assert pipeline.count_truncated(source, WORDS, 3) == 11
    assert pipeline.count_truncated(source, WORDS, 3, limit=5) == 5


def test_the_embedded_data_makes_batches():
    source = ShapesSource("train", num_scenes=4, size=64)
    batches = TrainBatches(
        source, tokenizer(), image_size=64, max_tokens=20, batch_size=6, num_steps=6, seed=0
    )
    drawn = list(train_iterator(batches))
    assert sorted(numbers(drawn)) == list(range(source.num_sentences))
    assert all(batch["mask"].any(axis=(1, 2)).all() for batch in drawn)


def test_real_photographs_make_batches(test_data):
    root = test_data / "data" / "refcoco_smoke"
    source = ReferSource(root, "refcoco", "unc", "train")
    batches = TrainBatches(
        source, WORDS, image_size=96, max_tokens=20, batch_size=8, num_steps=4, seed=0
    )
    drawn = list(train_iterator(batches))
    assert_same(drawn[2:], train_iterator(batches, 2, workers=2))
    for image, j in zip(drawn[0]["image"], drawn[0]["index"], strict=True):
        whole = source.image(source[source.locate(j)[0]])
        np.testing.assert_array_equal(image, resize_image(whole, 96))
    assert all(batch["mask"].any(axis=(1, 2)).all() for batch in drawn)
