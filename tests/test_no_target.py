"""Training on expressions that fit nothing: masks without a pixel, and the rule that finds none."""

import functools
import importlib

import jax
import numpy as np
import pytest

from configs import common
from refseg_jax import models
from refseg_jax.train_state import init_variables

B = 3


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_loss_and_its_gradient_are_finite(name):
    """Masks meet the model in its loss only, so outputs of the right shapes will do."""
    config = importlib.import_module(f"configs.{name}").get_config()
    for encoder in ("bert", "text"):
        if encoder in config.model:
            config.model[encoder].vocab_size = 100
    model, tokens = models.build(config.model), config.data.max_tokens
    size = config.data.image_size
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), size, tokens))
    shapes, _ = jax.eval_shape(
        functools.partial(model.apply, train=True, mutable=["batch_stats"]),
        variables,
        jax.ShapeDtypeStruct((B, size, size, 3), np.float32),
        jax.ShapeDtypeStruct((B, tokens), np.int32),
        jax.ShapeDtypeStruct((B, tokens), np.bool_),
        rngs={"dropout": jax.ShapeDtypeStruct((), jax.random.key(0).dtype)},
    )
    rng = np.random.default_rng(0)
    outputs = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
    valid = np.array([True, True, False])

    @jax.jit
    @jax.value_and_grad
    def loss(outputs, mask):
        return model.loss(outputs, mask, valid, jax.random.key(0))[0]

    mask = np.zeros((B, size, size), bool)
    for some in (False, True):
        mask[0, 10:40, 10:40] = some
        value, gradient = loss(outputs, mask)
        assert np.isfinite(value) and value > 0
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
        assert np.abs(gradient["logits"][1]).max() > 0  # It learns to predict nothing.


def test_the_rule_is_on_for_grefcoco_only():
    for word in common.DATASETS:
        area = common.get_common("alignformer", {word}).eval.no_target_area
        assert area == (50 if word == "grefcoco" else 0)
