"""What the benchmarks share: the configs at their papers' size, and the shapes that they take."""

import argparse
import importlib
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

from refseg_jax import models
from refseg_jax.optim import make_optimizer
from refseg_jax.predict import make_predict_step
from refseg_jax.train_state import TrainState, init_state, init_variables

CONFIGS = ("alignformer", "coupalign", "cris", "crossvlt", "jmceln", "lavt")
STEPS = 1000  # Of the schedule; no figure depends on it.


def paper_config(name: str, dtype: str = "float32") -> ml_collections.ConfigDict:
    """configs/`name`.py:refcoco, with the vocabulary of the tokenizer that it names."""
    config = importlib.import_module(f"configs.{name}").get_config("refcoco")
    text, vocab_size = ("bert", 30522) if "bert" in config.model else ("text", 49408)
    config.model[text].vocab_size = vocab_size
    config.model.dtype = dtype
    return config


# A config as JSON -> what `paper_state` returns: to trace a model takes seconds.
_STATES: dict[str, tuple[nn.Module, optax.GradientTransformation, TrainState]] = {}


def paper_state(
    config: ml_collections.ConfigDict,
) -> tuple[nn.Module, optax.GradientTransformation, TrainState]:
    """(model, optimiser, shapes of the train state) of a config."""
    key = config.to_json()
    if key not in _STATES:
        _STATES[key] = _trace_state(config)
    return _STATES[key]


def _trace_state(config):
    model = models.build(config.model)

    def make_tx(params):
        return make_optimizer(config.optim, params, STEPS)[0]

    def init(key):
        variables = init_variables(model, key, config.data.image_size, config.data.max_tokens)
        return init_state(variables, make_tx, key, config.train.ema_decay > 0)

    state = jax.eval_shape(init, jax.random.key(0))
    return model, make_tx(state.params), state


def batch_shapes(config: ml_collections.ConfigDict, rows: int) -> dict[str, Any]:
    """A batch's arrays as shapes; see refseg_jax/data/pipeline.py."""
    size, tokens = config.data.image_size, config.data.max_tokens
    return {
        "image": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8),
        "mask": jax.ShapeDtypeStruct((rows, size, size), jnp.bool),
        "tokens": jax.ShapeDtypeStruct((rows, tokens), jnp.int32),
        "token_mask": jax.ShapeDtypeStruct((rows, tokens), jnp.bool),
        "valid": jax.ShapeDtypeStruct((rows,), jnp.bool),
    }


def random_batch(config: ml_collections.ConfigDict, rows: int) -> dict[str, jax.Array]:
    """Noise of those shapes: a tenth of the pixels foreground, no padding."""
    rng = np.random.default_rng(0)
    size, tokens = config.data.image_size, config.data.max_tokens
    return {
        "image": jnp.asarray(rng.integers(0, 256, (rows, size, size, 3)), jnp.uint8),
        "mask": jnp.asarray(rng.random((rows, size, size)) < 0.1),
        "tokens": jnp.asarray(rng.integers(1, 30000, (rows, tokens)), jnp.int32),
        "token_mask": jnp.ones((rows, tokens), bool),
        "valid": jnp.ones(rows, bool),
    }


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def integers(text: str) -> list[int]:
    """For argparse: whole numbers from 0, with commas between."""
    if not all(number.isdecimal() for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between")
    return [int(number) for number in text.split(",")]


def product_flops(jaxpr: Jaxpr, unrolled: bool = True) -> int:
    """Floating-point operations of the products and convolutions of a jaxpr.

    With its loops `unrolled`, or of one round of each. Resizing, which is products in ours (and so
    named, see layers/resize.py), is none of them.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if "resize" in str(eqn.source_info.name_stack).split("/"):
            continue
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            each = math.prod(shape[i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * each
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            each = math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * each
        inner = [product_flops(x, unrolled) for x in jaxprs_in_params(eqn.params)]
        platforms = eqn.params.get("branches_platforms")
        if platforms:  # A platform's own way to the same numbers is not the model's.
            total += inner[platforms.index(None)]
        elif eqn.primitive.name == "cond":
            total += max(inner)
        else:
            total += (eqn.params.get("length", 1) if unrolled else 1) * sum(inner)
    return total


def forward_flops(config: ml_collections.ConfigDict) -> int:
    """Operations of one row's forward pass as far as the mask needs them; see `product_flops`."""
    model, _, state = paper_state(config)
    one = batch_shapes(config, 1)
    traced = jax.make_jaxpr(make_predict_step(model))(state.variables(), one).jaxpr
    needed, _ = dce_jaxpr(traced, [True] * len(traced.outvars))
    return product_flops(needed)
