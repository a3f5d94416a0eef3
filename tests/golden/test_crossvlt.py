"""CrossVLT against the authors' released code, over every folder of its outputs."""

import json

import numpy as np
import pytest

from configs import crossvlt
from refseg_jax.models.crossvlt import CrossVLT, CrossVLTConfig
from refseg_jax.weights.released import CROSSVLT_TABLE, crossvlt_from_released
from tests.golden import released

FEATURES = {
    r"v(\d)\.fuse1": "fusions_{i}",
    r"v(\d)\.gate1": ("gates_{i}/fc2", np.tanh),
    r"v(\d)\.fuse2": "merged_fusions_{i}",
    r"v(\d)\.gate2": ("merged_gates_{i}/fc2", np.tanh),
    r"v(\d)\.align_proj": "alignments_{i}/vision",
    r"v(\d)\.dec_feat_nchw": "decoder/stage_norm{n}",
    r"v4\.out": "gates_3",
    r"v(\d)\.out": "merged_gates_{i}",
    r"l1\.embeddings": "bert/embeddings",
    r"l1\.hidden": "bert",
    r"l(\d)\.crossattn\.out": "language_stages_{k}/fusion/norm1",
    r"l(\d)\.fusion_layer_out": "language_stages_{k}/fusion",
    r"l(\d)\.hidden": "language_stages_{k}",
    r"l(\d)\.cls_proj": "alignments_{i}/language",
    **released.SHARED_FEATURES,
}


@pytest.fixture(scope="module", params=released.folders("crossvlt"), ids=lambda folder: folder.name)
def case(request):
    config = json.loads((request.param / "config.json").read_text())
    first, *plain = config["bert"]["plain_layers_per_stage"]
    fused = config["bert"]["fusion_layer_in_stage"]
    model = CrossVLT(
        CrossVLTConfig(
            **released.encoder_sizes(config, first),
            language_depths=tuple(a + b for a, b in zip(plain, fused[1:], strict=True)),
            align_dim=config["align_dim"],
        )
    )
    return released.Case(request.param, model, CROSSVLT_TABLE, crossvlt_from_released)


def test_evaluation(case):
    outputs, captured = case.evaluate()
    expected = case.arrays("eval_outputs")
    released.check_logits(outputs, expected["logits"])
    np.testing.assert_array_equal(outputs["logits"] > 0, expected["argmax"] > 0)
    for i, logits in enumerate(outputs["stage_logits"], 1):
        assert released.relative_error(logits, expected[f"sim{i}"][:, 0]) < released.TOLERANCE, i
    features = case.arrays("eval_features")
    del features["l1.ext_mask"]  # Ours is boolean, and made where it is used.
    released.check_features(features, captured, FEATURES)
    check_loss(case.loss(outputs), expected)


def test_odd_size(case):
    outputs, captured = case.evaluate("_odd")
    expected = case.arrays("eval_odd_size")
    released.check_logits(outputs, expected.pop("logits"))
    del expected["l1.ext_mask"]
    released.check_features(expected, captured, FEATURES)


def test_training(case):
    loss, scalars, stats, grads = released.train_step(case)
    check_loss((loss, scalars), case.arrays("train_nodrop"))
    released.check_statistics(case, stats)
    released.check_gradient_norms(case, grads)


def check_loss(ours, expected):
    loss, scalars = ours
    np.testing.assert_allclose(loss, expected["loss_total"], rtol=1e-5)
    np.testing.assert_allclose(scalars["loss_task"], expected["loss_ce"], rtol=1e-5)
    align = [scalars[f"loss_align{i}"] for i in (1, 2, 3, 4)]
    np.testing.assert_allclose(align, expected["loss_align"], rtol=1e-5)


def test_optimiser_groups(case):
    optim = crossvlt.get_config("refcoco").optim
    released.check_groups(case, optim.groups, optim.weight_decay)
