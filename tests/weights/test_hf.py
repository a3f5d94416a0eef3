"""Filling BERT from a checkpoint: what is left out, what is refused, and what the message says."""

import dataclasses

import jax
import numpy as np
import pytest

from refseg_jax.errors import UserError
from refseg_jax.models.encoders.bert import Bert, BertConfig
from refseg_jax.weights.hf import BERT, bert_from_hf
from refseg_jax.weights.tables import convert_variables

TINY = BertConfig(vocab_size=9, hidden=8, layers=1, heads=2, intermediate=12, max_positions=6)


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    """A BERT checkpoint as published: prefix, old norm names, half precision, pretraining heads."""
    D, I = TINY.hidden, TINY.intermediate  # noqa: E741
    shapes = {
        "embeddings.word_embeddings.weight": (TINY.vocab_size, D),
        "embeddings.position_embeddings.weight": (TINY.max_positions, D),
        "embeddings.token_type_embeddings.weight": (2, D),
        "embeddings.LayerNorm.gamma": (D,),
        "embeddings.LayerNorm.beta": (D,),
        "encoder.layer.0.attention.self.query.weight": (D, D),
        "encoder.layer.0.attention.self.query.bias": (D,),
        "encoder.layer.0.attention.self.key.weight": (D, D),
        "encoder.layer.0.attention.self.key.bias": (D,),
        "encoder.layer.0.attention.self.value.weight": (D, D),
        "encoder.layer.0.attention.self.value.bias": (D,),
        "encoder.layer.0.attention.output.dense.weight": (D, D),
        "encoder.layer.0.attention.output.dense.bias": (D,),
        "encoder.layer.0.attention.output.LayerNorm.gamma": (D,),
        "encoder.layer.0.attention.output.LayerNorm.beta": (D,),
        "encoder.layer.0.intermediate.dense.weight": (I, D),
        "encoder.layer.0.intermediate.dense.bias": (I,),
        "encoder.layer.0.output.dense.weight": (D, I),
        "encoder.layer.0.output.dense.bias": (D,),
        "encoder.layer.0.output.LayerNorm.gamma": (D,),
        "encoder.layer.0.output.LayerNorm.beta": (D,),
        "pooler.dense.weight": (D, D),
    }
    rng = np.random.default_rng(0)
    state = {f"bert.{k}": rng.normal(size=s).astype(np.float16) for k, s in shapes.items()}
    return state | {"cls.predictions.bias": np.zeros(TINY.vocab_size, np.float16)}


def test_published_spelling(state):
    params = bert_from_hf(state, TINY)
    tokens = np.zeros((1, 3), np.int32)
    fresh = jax.eval_shape(Bert(TINY).init, jax.random.key(0), tokens, tokens == 0)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), fresh
    )
    query = state["bert.encoder.layer.0.attention.self.query.weight"]
    np.testing.assert_array_equal(params["blocks_0"]["qkv"]["kernel"][:, : TINY.hidden], query.T)


def test_first_layers_of_a_deeper_model(state):
    deeper = dict(state)
    for key in state:
        if ".layer.0." in key:
            deeper |= {key.replace(".0.", f".{i}."): state[key] + i for i in (1, 2)}
    jax.tree.map(
        np.testing.assert_array_equal, bert_from_hf(deeper, TINY), bert_from_hf(state, TINY)
    )
    loaded = convert_variables(deeper, {"params": bert_from_hf(state, TINY)}, BERT)
    assert loaded.notes == ["layers 0-0 of 3"]
    assert sorted(loaded.dropped) == ["cls.predictions.bias", "pooler.dense.weight"]


def test_every_missing_name_is_said(state):
    gone = [name for name in state if "layer.0." in name]
    for name in gone:
        del state[name]
    with pytest.raises(UserError) as error:
        bert_from_hf(state, TINY)
    assert f"{len(gone)} missing: " in str(error.value)
    for name in gone:
        assert name.removeprefix("bert.").replace("gamma", "weight").replace("beta", "bias") in str(
            error.value
        )
    deep = dataclasses.replace(TINY, layers=20)
    with pytest.raises(UserError, match=r"encoder\.layer\.\*\.output\.dense\.weight \(20\)"):
        bert_from_hf(state, deep)


def test_all_problems_in_one_error(state):
    del state["bert.embeddings.LayerNorm.gamma"]
    state["bert.encoder.norm.bias"] = np.zeros(8)
    state["bert.encoder.layer.0.output.dense.weight"] = np.zeros((8, 13))
    state["bert.encoder.layer.0.intermediate.dense.weight"] = np.zeros(8)
    state["encoder.layer.0.output.dense.bias"] = np.zeros(8)
    state["bert.embeddings.LayerNorm.beta"] = np.full(8, np.nan)
    with pytest.raises(UserError) as error:
        bert_from_hf(state, TINY)
    message = str(error.value)
    assert "1 missing: embeddings.LayerNorm.weight" in message
    assert "1 unexpected: bert.encoder.norm.bias" in message
    assert "1 there twice: encoder.layer.0.output.dense.bias and bert." in message
    assert "2 of another shape: " in message
    assert "1 not finite: embeddings.LayerNorm.bias" in message
    assert "encoder.layer.0.output.dense.weight (8, 13) for our blocks_0/fc2/kernel" in message
    assert "\n" not in message


def test_another_kind_of_checkpoint_is_a_short_message():
    state = {f"layer.{i}.weight": np.zeros(3) for i in range(500)}
    with pytest.raises(UserError, match=r"500 unexpected: layer\.\*\.weight \(500\)") as error:
        bert_from_hf(state, TINY)
    assert len(str(error.value)) < 2000
