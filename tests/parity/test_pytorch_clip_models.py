"""The PyTorch models that the benchmarks take as the time to beat: CRIS and JMCELN."""

import functools

import jax
import numpy as np
import pytest
import torch

from benchmarks.pytorch import cris, jmceln
from benchmarks.pytorch.load import load
from refseg_jax.models.cris import CRIS, CRISConfig
from refseg_jax.models.encoders.clip import ClipTextConfig, ClipVisionConfig
from refseg_jax.models.jmceln import JMCELN, JMCELNConfig
from tests.equations import draw, normal
from tests.parity.hf_models import relative_error

VISION = dict(width=4, depths=(1, 2, 1, 1), embed_dim=12)
TEXT = ClipTextConfig(vocab_size=50, hidden=16, layers=1, heads=2, max_positions=9, embed_dim=12)
MODELS = {
    "cris": (
        cris.CRIS,
        CRIS(
            CRISConfig(
                ClipVisionConfig(**VISION, pool_grid=3),
                TEXT,
                neck_dims=(8, 16, 12),
                decoder_layers=1,
                heads=2,
                ffn=24,
                dropout=0.0,
            )
        ),
    ),
    "jmceln": (
        jmceln.JMCELN,
        JMCELN(
            JMCELNConfig(
                ClipVisionConfig(**VISION, pool=False),
                TEXT,
                dim=16,
                heads=2,
                window=3,
                dilations=(1, 2),
                stages=2,
                queries=3,
                doublings=2,
            )
        ),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_running_statistics(name):
    """In evaluation the logits; in training, without dropout, the loss and what it records."""
    theirs, ours = MODELS[name]
    image, rng = normal(2, 64, 96, 3), np.random.default_rng(0)
    tokens, mask = rng.integers(50, size=(2, 7)).astype(np.int32), rng.random((2, 64, 96)) < 0.3
    token_mask = np.arange(7) < np.array([[7], [4]])
    variables = draw(ours, image, tokens, token_mask, train=False)

    @functools.partial(jax.jit, static_argnums=0)
    def run(train):
        outputs, updated = ours.apply(
            variables, image, tokens, token_mask, train=train, mutable="batch_stats"
        )
        loss, _ = ours.loss(outputs, mask, np.ones(2, bool), jax.random.key(0))
        return outputs["logits"], loss, updated

    model = theirs(ours.config)
    load(model, variables)
    inputs = torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
    inputs = *inputs, torch.from_numpy(token_mask)
    for train in (False, True):
        model.train(train)
        logits, loss, updated = run(train)
        assert relative_error(logits, model(*inputs)) < 1e-4
        load(model, variables)
        assert relative_error(loss, model.loss(*inputs, torch.from_numpy(mask))) < 1e-4
    after = theirs(ours.config)
    load(after, {"params": variables["params"], **updated})
    for expected, (key, recorded) in zip(after.buffers(), model.named_buffers(), strict=True):
        if not key.endswith("num_batches_tracked"):
            assert relative_error(expected, recorded) < 1e-4, key
