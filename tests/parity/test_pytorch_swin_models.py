"""The PyTorch models that the benchmarks run against ours: same logits, same loss.

The samples of AlignFormer's contrast are random; here they are all there are, on both sides.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks.pytorch import alignformer, coupalign, crossvlt, lavt
from benchmarks.pytorch.load import load
from refseg_jax.models.alignformer import AlignFormer, AlignFormerConfig
from refseg_jax.models.coupalign import CoupAlign, CoupAlignConfig
from refseg_jax.models.crossvlt import CrossVLT, CrossVLTConfig
from refseg_jax.models.encoders.bert import BertConfig
from refseg_jax.models.encoders.swin import SwinConfig
from refseg_jax.models.lavt import LAVT, LAVTConfig
from tests.equations import draw
from tests.parity.hf_models import relative_error

HEIGHT, WIDTH, TOKENS, VOCABULARY = 44, 58, 6, 40  # Maps, windows and merging are padded.
SWIN = SwinConfig(embed_dim=8, depths=(2, 1, 1), num_heads=(1, 2, 2), window=4)
TWO_STAGES = dataclasses.replace(SWIN, depths=(2, 1), num_heads=(1, 2))
BERT = BertConfig(VOCABULARY, hidden=16, layers=2, heads=2, intermediate=24, max_positions=8)
MODELS = {
    "alignformer": (
        AlignFormer,
        AlignFormerConfig(
            SWIN,
            BERT,
            fuse_hidden=2.0,
            dim=16,
            heads=2,
            points=2,
            pixel_layers=1,
            pixel_ffn=24,
            decoder_layers=2,
            decoder_ffn=24,
            cmic_samples=1000,
        ),
        alignformer.AlignFormer,
    ),
    "coupalign": (
        CoupAlign,
        CoupAlignConfig(
            swin=TWO_STAGES,
            bert=BERT,
            wpa_stages=(1, 2),
            joint_dim=12,
            heads=2,
            position_grid=3,
            queries=5,
            generator_dim=16,
            generator_layers=1,
            generator_ffn=24,
            seg_dim=12,
        ),
        coupalign.CoupAlign,
    ),
    "crossvlt": (
        CrossVLT,
        CrossVLTConfig(
            TWO_STAGES,
            dataclasses.replace(BERT, layers=1),
            language_depths=(2,),
            fusion_stages=(1, 2),
            align_stages=(1, 2),
            align_dim=12,
            head_dim=8,
        ),
        crossvlt.CrossVLT,
    ),
    "lavt": (LAVT, LAVTConfig(SWIN, BERT, fusion_heads=(1, 2, 2)), lavt.LAVT),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """Both models, with the same weights, and a batch: image, tokens, token_mask, mask."""
    ours, config, theirs = MODELS[request.param]
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    batch = (
        rng.normal(size=(2, HEIGHT, WIDTH, 3)).astype(np.float32),
        rng.integers(VOCABULARY, size=(2, TOKENS)).astype(np.int32),
        np.arange(TOKENS) < np.array([[TOKENS], [4]]),
        np.stack([rows > 20, rows + columns > 70]),
    )
    module, model = ours(config), theirs(config).eval()
    variables = draw(module, *batch[:3])
    load(model, variables)
    return module, variables, model, batch


def to_torch(batch):
    image, *rest = (torch.from_numpy(x) for x in batch)
    return image.permute(0, 3, 1, 2), *rest


def test_logits_and_loss(case):
    module, variables, model, batch = case

    @jax.jit
    def run(variables, image, tokens, token_mask, mask):
        outputs = module.apply(variables, image, tokens, token_mask)
        loss, _ = module.loss(outputs, mask, jnp.ones(len(mask), bool), jax.random.key(0))
        return outputs["logits"], loss

    logits, loss = run(variables, *batch)
    image, tokens, token_mask, mask = to_torch(batch)
    with torch.no_grad():
        assert relative_error(logits, model(image, tokens, token_mask)) <= 1e-4
        assert relative_error(loss, model.loss(image, tokens, token_mask, mask)) <= 1e-4


def test_training_in_bfloat16(case):
    _, _, model, batch = case
    batch = to_torch(batch)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, again = model.loss(*batch), model.loss(*batch)
    loss.backward()
    assert loss != again  # Dropout and stochastic depth.
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    # Nothing reads what the last gate makes.
    last_gate = f"gates_{len(model.config.swin.depths) - 1}"
    assert all(name.startswith(last_gate) for name, grad in gradients.items() if grad is None)
    assert all(grad.isfinite().all() for grad in gradients.values() if grad is not None)
    model.eval()
