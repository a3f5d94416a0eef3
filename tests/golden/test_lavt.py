"""LAVT against the authors' released code, over every folder of its outputs."""

import json

import numpy as np
import pytest

from configs import lavt
from refseg_jax.models.lavt import LAVT, LAVTConfig
from refseg_jax.models.layers.activations import gelu
from refseg_jax.weights.released import LAVT_TABLE, lavt_from_released
from tests.golden import released

FEATURES = {
    r"bert\.embeddings": "bert/embeddings",
    r"bert\.layer(\d+)\.out": "bert/blocks_{j}",
    r"v(\d)\.pwam\.vis_project_ncl": ("fusions_{i}/vision", gelu),
    r"v(\d)\.pwam\.image_lang_att": "fusions_{i}/attention",
    r"v(\d)\.pwam": "fusions_{i}",
    r"v(\d)\.gate": ("gates_{i}/fc2", np.tanh),
    r"dec_feat\.c(\d)_nchw": "decoder/stage_norm{n}",
    **released.SHARED_FEATURES,
}


@pytest.fixture(scope="module", params=released.folders("lavt"), ids=lambda folder: folder.name)
def case(request):
    config = json.loads((request.param / "config.json").read_text())
    model = LAVT(
        LAVTConfig(
            **released.encoder_sizes(config, config["bert"]["num_hidden_layers"]),
            fusion_heads=tuple(config["fusion_heads"]),
        )
    )
    return released.Case(request.param, model, LAVT_TABLE, lavt_from_released)


def test_evaluation(case):
    outputs, captured = case.evaluate()
    expected = case.arrays("eval_outputs")
    released.check_logits(outputs, expected["logits"])
    np.testing.assert_array_equal(outputs["logits"] > 0, expected["argmax"] > 0)
    released.check_features(case.arrays("eval_features"), captured, FEATURES)
    np.testing.assert_allclose(case.loss(outputs)[0], expected["loss"], rtol=1e-5)


def test_odd_size(case):
    outputs, captured = case.evaluate("_odd")
    expected = case.arrays("eval_odd_size")
    released.check_logits(outputs, expected.pop("logits"))
    released.check_features(expected, captured, FEATURES)


def test_training(case):
    loss, _, stats, grads = released.train_step(case)
    np.testing.assert_allclose(loss, case.arrays("train_nodrop")["loss"], rtol=1e-5)
    released.check_statistics(case, stats)
    released.check_gradient_norms(case, grads)


def test_optimiser_groups(case):
    layers = case.model.config.bert.layers
    trained = {
        name.split(".")[3]
        for name, group in case.json("param_groups").items()
        if name.startswith("text_encoder.encoder.layer.") and group["optimised"]
    }
    groups = lavt.released_groups(layers, len(trained))
    released.check_groups(case, groups, lavt.get_config("refcoco").optim.weight_decay)
    # At the released size that is what the config says.
    assert lavt.get_config("refcoco").optim.groups == lavt.released_groups(12, 10)
