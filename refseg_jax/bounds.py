"""What the numbers and names of a config may be, so that what cannot be is said before training."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import ml_collections

from refseg_jax.errors import UserError
from refseg_jax.evaluate import PROTOCOLS, SELECTORS

# The least that a number may be.
LEAST = {
    "seed": 0,
    "train.steps": 0,
    "train.epochs": 0,
    "train.batch_size": 1,
    "train.accumulate": 1,
    "train.log_every": 1,
    "train.eval_every": 1,
    "train.checkpoint_every": 1,
    "optim.lr": 0,
    "optim.end_lr": 0,
    "optim.power": 0,
    "optim.warmup_steps": 0,
    "optim.decay_steps": 0,
    "optim.decay_share": 0,
    "optim.eps": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "eval.batch_size": 1,
    "eval.examples": 0,
    "eval.limit_in_training": 0,
    "eval.no_target_area": 0,
    "data.image_size": 1,
    "data.max_tokens": 3,  # Two marks and a piece.
    "data.workers": 0,
    "data.threads": 0,
    "mesh.cpu_devices": 1,
}
# Numbers from 0 to less than 1; of a model's sections by their last names.
SHARES = ("train.ema_decay", "optim.b1", "optim.b2")
MODEL_SHARES = ("dropout", "drop_path", "prior")
# A model's whole numbers that may be 0.
MAY_BE_NONE = ("vocab_size", "stages", "doublings", "layers", "pixel_layers", "generator_layers")


def check(config: ml_collections.ConfigDict) -> None:
    """Raises a UserError where a number of the config is out of its bounds, or a name unknown."""

    def field(name: str) -> Any:
        return functools.reduce(lambda part, key: part[key], name.split("."), config)

    for name, least in LEAST.items():
        if not least <= field(name) < math.inf:
            raise UserError(f"config.{name}={field(name)}: it must be {least} or more")
    for name in SHARES:
        if not 0 <= field(name) < 1:
            raise UserError(f"config.{name}={field(name)}: it must be from 0 to below 1")
    if config.seed >= 2**63:
        raise UserError(f"config.seed={config.seed}: it must be less than 2 to the power of 63")
    _check_model(config.model, "config.model")
    if not 0 <= config.eval.threshold <= 1:
        raise UserError(f"config.eval.threshold={config.eval.threshold}: it is a probability")
    for name, choices in (("protocol", PROTOCOLS), ("select_by", SELECTORS)):
        if config.eval[name] not in choices:
            raise UserError(
                f"config.eval.{name}={config.eval[name]!r} is not one of {', '.join(choices)}"
            )


def _check_model(section: Mapping[str, Any], where: str) -> None:
    """Raises a UserError where a number of `section`, of the model's, is none for its kind."""
    for name in ("embed_dim", "width") if section.get("positions") else ():
        if section.get(name, 0) % 4:
            raise UserError(
                f"{where}.{name}={section[name]}: with {where}.positions it must be a multiple of 4"
            )
    for name, value in section.items():
        if isinstance(value, ml_collections.ConfigDict):
            _check_model(value, f"{where}.{name}")
            continue
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if name in MODEL_SHARES:
                fits, bounds = 0 <= number < 1, "from 0 to below 1"
            elif name.endswith("temperature"):
                fits, bounds = 0 < number < math.inf, "more than 0"
            else:
                least = int(isinstance(number, int) and name not in MAY_BE_NONE)
                fits, bounds = least <= number < math.inf, f"{least} or more"
            if not fits:
                raise UserError(f"{where}.{name}={value}: it must be {bounds}")
