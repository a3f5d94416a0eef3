"""The state of a run as one pytree, and how it is born."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes; what is saved is what is needed to go on.

    step: int32 scalar, optimiser steps taken. params, model_state: Flax collections
    (`model_state` holds e.g. batch_stats, {} for models without). ema: averaged params, or None.
    key: typed PRNG key; step n uses `fold_in(key, n)` and the key itself never changes.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    ema: Any
    key: jax.Array

    def variables(self) -> dict[str, Any]:
        """What evaluation applies: the averaged parameters where there are any."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, **self.model_state}


def init_variables(model: nn.Module, key: jax.Array, image_size: int, max_tokens: int) -> Any:
    """Fresh variables of `model` (jit- and eval_shape-friendly)."""
    image = jnp.zeros((1, image_size, image_size, 3))
    tokens = jnp.zeros((1, max_tokens), jnp.int32)
    return model.init(key, image, tokens, tokens == 0, train=False)


def init_state(
    variables: dict[str, Any],
    make_tx: Callable[[Any], optax.GradientTransformation],
    key: jax.Array,
    use_ema: bool,
) -> TrainState:
    """Step 0, from fresh or loaded variables."""
    model_state = dict(variables)
    params = model_state.pop("params")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=make_tx(params).init(params),
        ema=jax.tree.map(jnp.copy, params) if use_ema else None,
        key=key,
    )
