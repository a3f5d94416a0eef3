"""The sweep: every sentence once, both protocols, the control, one process and two."""

import collections
import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from refseg_jax.data.records import Ref, Sentence
from refseg_jax.data.refer import ReferSource
from refseg_jax.data.tokenizer import Tokenizer
from refseg_jax.data.transforms import resize_mask
from refseg_jax.errors import UserError
from refseg_jax.evaluate import PROTOCOLS, evaluate, format_table, write_json
from refseg_jax.metrics import Counts, overlap
from refseg_jax.predict import make_predict_step
from tests.test_refer import small_set, write

SIZE = 16
TOKENIZER = Tokenizer.from_words(["left", "right", "the", "thing"])


@dataclasses.dataclass(frozen=True)
class Halves:
    """Refs whose object, painted red, is the left or the right half; two sentences each.

    Every `missing`-th ref has no object.
    """

    num_refs: int = 5
    missing: int = 1000
    name: str = "halves"
    split: str = "val"

    @property
    def num_sentences(self):
        return 2 * self.num_refs

    def __len__(self):
        return self.num_refs

    def locate(self, j):
        return divmod(j, 2)

    def __getitem__(self, i):
        side = ("left", "right")[i % 2]
        sentences = (
            Sentence(side, 2 * i, "short"),
            Sentence(f"the {side} thing", 2 * i + 1, "long"),
        )
        ann_ids = () if (i + 1) % self.missing == 0 else (i,)
        return Ref(i, i, ann_ids, "half", self.split, sentences)

    def image(self, ref):
        red = self.mask(ref) * np.uint8(255)
        return np.stack([red, 0 * red, 0 * red], -1)

    def mask(self, ref):
        width = 20 + 2 * ref.ref_id  # every image has its own size
        half = (np.arange(width) >= width // 2) == ref.ref_id % 2
        return np.broadcast_to(half & bool(ref.ann_ids), (24, width))


class Seeing(nn.Module):
    """Finds the red, ignores the words; logits at half the image's size."""

    @nn.compact
    def __call__(self, image, tokens, token_mask, train):
        bias = self.param("bias", nn.initializers.zeros, ())
        red = image[..., 0].reshape(*image.shape[:1], SIZE // 2, 2, SIZE // 2, 2).mean((2, 4))
        return {"logits": red + bias}


def reading(variables, batch):
    """A predict function that only reads: the half that the words name, in every image."""
    (left,) = TOKENIZER.encode("left", 3)[0][1:2]
    is_left = (np.asarray(batch["tokens"]) == left).any(1)
    columns = np.arange(SIZE) < SIZE // 2
    mask = columns[None, None] == is_left[:, None, None]
    return jnp.asarray(np.broadcast_to(mask, (len(is_left), SIZE, SIZE)), jnp.float32)


def sweep(predict_fn, source=None, variables=None, **kwargs):
    kwargs = {"batch_size": 4, "max_tokens": 8, "image_size": SIZE, "verbose": False} | kwargs
    return evaluate(predict_fn, variables, source or Halves(), TOKENIZER, **kwargs)


def test_every_sentence_is_scored_once_whatever_the_batch_size():
    results = [sweep(reading, batch_size=b, protocol="input") for b in (1, 4, 16)]
    for result in results:
        np.testing.assert_array_equal(result.counts.index, np.arange(10))
        assert result.metrics == results[0].metrics
    assert results[0].metrics["mIoU"] == 1
    assert {kind: len(counts) for kind, counts in results[0].by_kind.items()} == {
        "long": 5,
        "short": 5,
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_the_sentences_of_a_ref_share_is_read_once(protocol):
    """A picture and a mask for the batch, and the mask once more where it is scored."""
    seen = []

    class Counting(Halves):
        def image(self, ref):
            seen.append(("image", ref.ref_id))
            return np.zeros((24, 20, 3), np.uint8)

        def mask(self, ref):
            seen.append(("mask", ref.ref_id))
            return super().mask(ref)

    plain = sweep(reading, letterbox=True, protocol=protocol)
    counted = sweep(reading, Counting(), letterbox=True, protocol=protocol)
    np.testing.assert_array_equal(counted.counts.intersection, plain.counts.intersection)
    np.testing.assert_array_equal(counted.counts.union, plain.counts.union)
    assert collections.Counter(seen) == {
        (kind, i): times for i in range(5) for kind, times in (("image", 1), ("mask", 2))
    }


def test_a_model_and_both_protocols_against_a_plain_loop():
    source, model = Halves(3), Seeing()
    variables = {"params": {"bias": jnp.float32(0)}}
    step = make_predict_step(model)
    for protocol in PROTOCOLS:
        rows = []
        for j in range(source.num_sentences):
            ref = source[j // 2]
            truth = source.mask(ref)
            if protocol == "input":
                truth = resize_mask(truth, SIZE)
            # The border lies in the middle at each size.
            rows.append((j, *overlap(truth, truth), truth.sum(), 1))
        expected = Counts.from_rows(rows)
        result = sweep(step, source, variables, protocol=protocol)
        assert result.protocol == protocol
        # After the resizes, the column at the border may fall to either side.
        assert np.abs(result.counts.intersection - expected.intersection).max() <= 24
        assert result.metrics["mIoU"] > 0.9


def test_around_a_letterboxed_picture_there_is_no_mask():
    """A prediction of everything is one of the picture: its half is right, at either size."""

    def everything(variables, batch):
        return jnp.ones(batch["image"].shape[:3])

    source = Halves(1)  # 24 x 20
    for protocol in PROTOCOLS:
        result = sweep(everything, source, protocol=protocol, letterbox=True, keep_examples=1)
        assert result.metrics["mIoU"] == pytest.approx(0.5, abs=0.04)
    (best, *_) = result.examples
    assert best.prediction.sum() == 16 * 13 and not best.prediction[:, :1].any()


def test_shuffled_expressions_are_a_control():
    assert sweep(reading).metrics["mIoU"] == 1
    shuffled = sweep(reading, shuffle_text=True, keep_examples=2)
    assert shuffled.selected_by("mean") == shuffled.metrics["mIoU"]
    assert shuffled.selected_by("overall") == shuffled.metrics["oIoU"]
    assert shuffled.shuffled and shuffled.sentences == 10 and not shuffled.examples
    assert shuffled.metrics["mIoU"] < 0.8  # five refs, three of one side: some words still fit
    # A model that does not read loses nothing.
    step, variables = make_predict_step(Seeing()), {"params": {"bias": jnp.float32(0)}}
    plain = sweep(step, variables=variables).metrics
    assert sweep(step, variables=variables, shuffle_text=True).metrics == plain


def test_threshold_limit_and_truncation():
    def half_sure(variables, batch):
        return jnp.full((len(batch["image"]), SIZE, SIZE), 0.5)

    assert sweep(half_sure).metrics["mIoU"] == 0  # a probability of 0.5 is not above 0.5
    assert sweep(half_sure, threshold=0.35).metrics["mIoU"] == pytest.approx(0.5)
    for batch_size in (3, 4, 16):  # Which follows from the devices.
        some = sweep(reading, Halves(20), batch_size=batch_size, limit=10)
        np.testing.assert_array_equal(some.counts.index, range(0, 40, 4))
    assert sweep(reading, limit=11).sentences == 10
    assert sweep(reading, limit=0).sentences == 10
    assert sweep(reading, max_tokens=8).truncated == 0
    assert sweep(reading, max_tokens=4).truncated == 5  # [CLS] the left thing [SEP]


def test_examples_are_best_worst_and_middle():
    def uneven(variables, batch):
        """Sees the red, but less of it the less of the image there is; blind for 'the'."""
        (the,) = TOKENIZER.encode("the", 3)[0][1:2]
        reads = (np.asarray(batch["tokens"]) == the).any(1)
        seen = np.asarray(batch["image"])[..., 0] / 255.0
        return jnp.asarray(seen * ~reads[:, None, None], jnp.float32)

    for protocol in PROTOCOLS:
        result = sweep(uneven, Halves(8), keep_examples=2, protocol=protocol)
        assert [e.case for e in result.examples] == ["best"] * 2 + ["worst"] * 2 + ["middle"] * 2
        assert len({e.index for e in result.examples}) == 6
        iou = dict(zip(result.counts.index.tolist(), result.counts.iou, strict=True))
        for example in result.examples:
            assert example.iou == iou[example.index]
            assert example.image.shape[:2] == example.truth.shape == example.prediction.shape
            intersection, union = overlap(example.prediction, example.truth)
            assert example.iou == intersection / union
        assert result.examples[0].iou == result.counts.iou.max()
        assert result.examples[2].iou == 0 and result.examples[2].text.startswith("the ")


def test_unknown_protocol_is_an_error():
    with pytest.raises(UserError, match="input"):
        sweep(reading, protocol="orginal")


def test_table_and_json(tmp_path):
    results = {"val": sweep(reading), "control": sweep(reading, shuffle_text=True)}
    lines = format_table(results).splitlines()
    assert len({len(line) for line in lines}) == 1
    precision = ["P@0.5", "P@0.6", "P@0.7", "P@0.8", "P@0.9"]
    assert lines[0].split() == ["split", "sentences", "oIoU", "mIoU", *precision]
    assert lines[1].split() == ["val", "10", *["100.00"] * 7]
    assert lines[2].split()[:2] == ["long", "5"]
    write_json(tmp_path / "r.json", results, steps=3)
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["steps"] == 3
    assert stored["results"]["val"]["mIoU"] == 1 and stored["results"]["control"]["shuffled"]
    assert stored["results"]["val"]["by_kind"]["short"]["sentences"] == 5
    assert not {"gIoU", "no_target_area"} & set(stored["results"]["val"])
    write_json(tmp_path / "r.json", {"val": sweep(reading, no_target_area=3)})
    assert json.loads((tmp_path / "r.json").read_text())["results"]["val"]["no_target_area"] == 3


@pytest.fixture(scope="module")
def grefcoco(tmp_path_factory):
    """A tiny gRefCOCO: one target, two, none (two sentences), and a target of few pixels."""
    refs, instances = small_set()
    instances["annotations"][2]["segmentation"] = [[4, 4, 6, 4, 6, 7, 4, 7]]  # 6 pixels.
    for ref, ann_id in zip(refs, ([100], [-1], [102], [100, 101]), strict=True):
        ref |= {"ann_id": ann_id, "category_id": [1], "split": "val"}
    root = write(tmp_path_factory.mktemp("root"), refs, instances)
    (root / "mine").rename(root / "grefcoco")
    (root / "grefcoco" / "refs(unc).json").rename(root / "grefcoco" / "grefs(unc).json")
    return ReferSource(root, "grefcoco", "unc", "val")


def drawing(source, bar):
    """A predict function that draws the truth, and where there is none `bar` pixels in a row."""
    order = iter(range(source.num_sentences))

    def predict(variables, batch):
        drawn = np.zeros((len(batch["image"]), 60, 60), np.float32)
        for row, j in zip(drawn, order, strict=False):
            mask = source.mask(source[source.locate(j)[0]])
            mask[0, :bar] |= not mask.any()
            row[:] = resize_mask(mask, 60)
        return jnp.asarray(drawn)

    return predict


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_gref_split_from_end_to_end(grefcoco, tmp_path, protocol):
    def scored(bar, no_target_area, **options):
        # At the input's size, 60 x 60, every pixel of the 20 x 30 counts six times.
        area = no_target_area * (6 if protocol == "input" else 1)
        return sweep(
            drawing(grefcoco, bar), grefcoco, image_size=60, protocol=protocol,
            no_target_area=area, **options,
        )  # fmt: skip

    off = scored(5, 0, keep_examples=1)
    assert off.generalized and off.sentences == 6
    np.testing.assert_array_equal(off.counts.target, [1, 0, 0, 1, 1, 1])
    # Sentences 1 and 2 have no target, and a bar is predicted.
    assert off.metrics["N-acc"] == 0 and off.metrics["T-acc"] == off.metrics["P@0.5"] == 1
    assert off.score == off.metrics["gIoU"] == off.counts.iou.mean() < 4 / 6 + 1e-9
    assert list(off.headline) == ["gIoU", "cIoU", "N-acc", "T-acc"]
    assert off.examples[0].truth.any() and not off.examples[1].truth.any()
    on = scored(5, 6)  # The small target has 6 pixels, and stays.
    assert on.metrics["N-acc"] == on.metrics["T-acc"] == 1
    assert on.score == pytest.approx(off.score + 2 / 6)
    assert (on.selected_by("mean"), on.selected_by("overall")) == (on.score, on.metrics["cIoU"])
    assert on.metrics["cIoU"] > off.metrics["cIoU"]
    off = scored(0, 0)
    assert off.metrics["N-acc"] == 1 and off.score == on.score
    too_much = scored(0, 7).metrics
    assert (too_much["N-acc"], too_much["T-acc"]) == (1, 0.75)

    write_json(tmp_path / "r.json", {"val": on})
    stored = json.loads((tmp_path / "r.json").read_text())["results"]["val"]
    assert (
        stored["gIoU"] == on.score and stored["no_target_area"] in (6, 36) and "mIoU" not in stored
    )
    lines = [
        line.split() for line in format_table({"gref": on, "plain": sweep(reading)}).split("\n")
    ]
    assert lines[0][2:6] == ["gIoU", "cIoU", "N-acc", "T-acc"] and lines[0][-2:] == ["oIoU", "mIoU"]
    assert lines[1][:2] == ["gref", "6"] and lines[1][-2:] == ["-", "-"]
    assert lines[2][2:6] == ["-"] * 4 and lines[2][-2:] == ["100.00"] * 2


def test_a_target_is_one_without_a_pixel_too_and_the_best_examples_have_one(grefcoco):
    def nothing(variables, batch):
        return jnp.zeros((len(batch["image"]), 2, 2))

    for protocol in PROTOCOLS:  # At 2 x 2 the targets of two sentences lose all their pixels.
        result = sweep(nothing, grefcoco, image_size=2, protocol=protocol, keep_examples=1)
        np.testing.assert_array_equal(result.counts.target, [1, 0, 0, 1, 1, 1])
        assert (result.metrics["N-acc"], result.metrics["T-acc"]) == (1, 0)
        assert result.score == 2 / 6 and result.examples[0].iou == 0


def test_a_part_of_a_split_keeps_the_names_of_its_scores(grefcoco):
    part = sweep(drawing(grefcoco, 0), grefcoco, image_size=60, batch_size=1, limit=1)
    assert part.sentences == 1 and part.generalized
    assert list(part.headline) == ["gIoU", "cIoU", "T-acc"]  # N-acc is about none of it.


@pytest.mark.parametrize("letterbox", [False, True])
def test_real_refs(test_data, letterbox):
    """The truth itself, seen at the input's resolution, scores near 1 on real photographs."""
    source = ReferSource(test_data / "data" / "refcoco_smoke", "refcoco", "unc", "testA")
    order = iter(range(source.num_sentences))

    def truth(variables, batch):
        seen = np.zeros((len(batch["image"]), 96, 96), np.float32)
        for row, j in zip(seen, order, strict=False):
            row[:] = resize_mask(source.mask(source[source.locate(j)[0]]), 96, letterbox)
        return jnp.asarray(seen)

    result = sweep(truth, source, image_size=96, letterbox=letterbox, bicubic=letterbox)
    assert result.sentences == source.num_sentences
    assert result.metrics["mIoU"] > 0.85 and result.metrics["P@0.5"] == 1
    order = iter(range(source.num_sentences))
    exact = sweep(truth, source, image_size=96, letterbox=letterbox, protocol="input")
    assert exact.metrics["mIoU"] == 1


_WORKER = """
import sys, json
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
port, rank = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"localhost:{port}", 2, rank)
from tests.test_evaluate import Halves, Seeing, sweep
from refseg_jax.predict import make_predict_step
from refseg_jax.sharding import batch_sharding, make_mesh, to_device
mesh = make_mesh(-1, 1)
step = make_predict_step(Seeing(), batch_sharding(mesh))
result = sweep(step, Halves(7, 3), {"params": {"bias": jnp.float32(0)}}, keep_examples=1,
               put=lambda batch: to_device(batch, mesh))
with open(sys.argv[3], "w") as file:
    json.dump([result.sentences, result.metrics, len(result.examples)], file)
"""


def test_two_processes_agree_with_one(tmp_path):
    variables = {"params": {"bias": jnp.float32(0)}}
    alone = sweep(make_predict_step(Seeing()), Halves(7, 3), variables)
    assert alone.metrics["N-acc"] == alone.metrics["T-acc"] == 1
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, port, str(rank), str(tmp_path / str(rank))],
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
            cwd=pathlib.Path(__file__).resolve().parents[1],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, worker in enumerate(workers):
        _, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        sentences, scores, examples = json.loads((tmp_path / str(rank)).read_text())
        assert (sentences, scores, examples) == (14, alone.metrics, 3)
