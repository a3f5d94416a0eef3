"""The models by name, and how a config section becomes one."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax.numpy as jnp

from refseg_jax.errors import UserError
from refseg_jax.models.alignformer import AlignFormer
from refseg_jax.models.coupalign import CoupAlign
from refseg_jax.models.cris import CRIS
from refseg_jax.models.crossvlt import CrossVLT
from refseg_jax.models.jmceln import JMCELN
from refseg_jax.models.lavt import LAVT

MODELS: dict[str, type[nn.Module]] = {
    "alignformer": AlignFormer,
    "coupalign": CoupAlign,
    "cris": CRIS,
    "crossvlt": CrossVLT,
    "jmceln": JMCELN,
    "lavt": LAVT,
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

T = TypeVar("T")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A (nested) dataclass from a mapping; an unknown or missing field is a UserError."""
    types = typing.get_type_hints(cls)
    fields = {field.name: types[field.name] for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UserError(f"{where} has no field {', '.join(unknown)} (it has {', '.join(fields)})")
    converted = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(fields[name]):
            value = from_mapping(fields[name], value, f"{where}.{name}")
        converted[name] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**converted)
    except TypeError as e:
        raise UserError(f"{where}: {e}") from None


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model that `config` (`config.model`: its name, dtype, and its own fields) describes.

    Raises:
      UserError: an unknown model, dtype or field, or values that do not fit together.
    """
    values = dict(config)
    name, dtype = values.pop("name"), values.pop("dtype")
    if name not in MODELS:
        raise UserError(f"config.model.name={name!r} is not one of {', '.join(MODELS)}")
    if dtype not in DTYPES:
        raise UserError(f"config.model.dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    module = MODELS[name]
    return module(from_mapping(module.Config, values, "config.model"), dtype=DTYPES[dtype])
