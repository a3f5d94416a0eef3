"""The sweep: every sentence once, both protocols, the control, one process and two."""

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
from refseg_jax.metrics import NAMES, Counts, overlap
from refseg_jax.predict import make_predict_step

SIZE = 16
TOKENIZER = Tokenizer.from_words(["left", "right", "the", "thing"])


@dataclasses.dataclass(frozen=True)
class Halves:
    """Refs whose object, painted red, is the left or the right half; two sentences each."""

    num_refs: int = 5
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
        return Ref(i, i, (i,), "half", self.split, sentences)

    def image(self, ref):
        red = self.mask(ref) * np.uint8(255)
        return np.stack([red, 0 * red, 0 * red], -1)

    def mask(self, ref):
        width = 20 + 2 * ref.ref_id  # every image has its own size
        return np.broadcast_to((np.arange(width) >= width // 2) == ref.ref_id % 2, (24, width))


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
            rows.append((j, *overlap(truth, truth)))  # the border lies in the middle at each size
        expected = Counts.from_rows(rows)
        result = sweep(step, source, variables, protocol=protocol)
        assert result.protocol == protocol
        # After the resizes, the column at the border may fall to either side.
        assert np.abs(result.counts.intersection - expected.intersection).max() <= 24
        assert result.metrics["mIoU"] > 0.9


def test_shuffled_expressions_are_a_control():
    assert sweep(reading).metrics["mIoU"] == 1
    shuffled = sweep(reading, shuffle_text=True, keep_examples=2)
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
    some = sweep(reading, Halves(20), batch_size=4, limit=10)
    np.testing.assert_array_equal(some.counts.index, [*range(4), *range(12, 16), *range(24, 28)])
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
    assert lines[0].split() == ["split", "sentences", *NAMES]
    assert lines[1].split() == ["val", "10", *["100.00"] * 7]
    assert lines[2].split()[:2] == ["long", "5"]
    write_json(tmp_path / "r.json", results, steps=3)
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["steps"] == 3
    assert stored["results"]["val"]["mIoU"] == 1 and stored["results"]["control"]["shuffled"]
    assert stored["results"]["val"]["by_kind"]["short"]["sentences"] == 5


def test_real_refs(test_data):
    """The truth itself, seen at the input's resolution, scores near 1 on real photographs."""
    source = ReferSource(test_data / "data" / "refcoco_smoke", "refcoco", "unc", "testA")
    order = iter(range(source.num_sentences))

    def truth(variables, batch):
        seen = np.zeros((len(batch["image"]), 96, 96), np.float32)
        for row, j in zip(seen, order, strict=False):
            row[:] = resize_mask(source.mask(source[source.locate(j)[0]]), 96)
        return jnp.asarray(seen)

    result = sweep(truth, source, image_size=96)
    assert result.sentences == source.num_sentences
    assert result.metrics["mIoU"] > 0.85 and result.metrics["P@0.5"] == 1


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
result = sweep(step, Halves(7), {"params": {"bias": jnp.float32(0)}}, keep_examples=1,
               put=lambda batch: to_device(batch, mesh))
with open(sys.argv[3], "w") as file:
    json.dump([result.sentences, result.metrics, len(result.examples)], file)
"""


def test_two_processes_agree_with_one(tmp_path):
    variables = {"params": {"bias": jnp.float32(0)}}
    alone = sweep(make_predict_step(Seeing()), Halves(7), variables)
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
