"""AdamW with schedules and with weight-decay and learning-rate groups by parameter path.

A parameter's path is its keys joined by "/", e.g. `swin/blocks_0_1/norm1/scale`.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import optax
from flax.traverse_util import flatten_dict

from refseg_jax.errors import UserError
from refseg_jax.sharding import path_name


def make_schedule(config: ml_collections.ConfigDict, total_steps: int) -> Callable:
    """Step -> learning rate.

    `config`: lr, schedule ("poly": lr * (1 - t)^power down to end_lr, "cosine", "step": lr until
    the decay ends, "constant"), power, end_lr, warmup_steps (linear from 0), decay_steps (0: the
    share `decay_share` of all steps; after them the rate stays at end_lr).
    """
    warmup = config.warmup_steps
    decay = (config.decay_steps or round(config.decay_share * total_steps)) - warmup
    if decay <= 0 and config.schedule != "constant":
        raise UserError(
            f"config.optim.warmup_steps={warmup} leaves no steps to decay over: "
            f"the run has {total_steps} steps, and the decay ends at {decay + warmup} (give fewer "
            "of them, or more config.train.steps or, where that is 0, config.train.epochs)"
        )
    end = config.end_lr / config.lr if config.lr else 1.0
    if config.schedule == "poly":
        main = optax.polynomial_schedule(config.lr, config.end_lr, config.power, decay)
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.lr, decay, end)
    elif config.schedule == "step":
        main = optax.piecewise_constant_schedule(config.lr, {decay: end})
    elif config.schedule == "constant":
        main = optax.constant_schedule(config.lr)
    else:
        raise UserError(
            f"config.optim.schedule={config.schedule!r} is not one of poly, cosine, step, constant"
        )
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, config.lr, warmup), main], [warmup])


def assign_groups(params: Any, groups: Any) -> Any:
    """A tree like `params` that holds for every parameter the index of its group.

    `groups` is an ordered sequence of (path regex, learning-rate factor, weight-decay factor);
    the first regex that is found in the path wins, so each parameter is in exactly one group.

    Raises:
      UserError: a parameter matches no group, a group matches no parameter, or it is no such group.
    """
    try:
        patterns = [re.compile(pattern) for pattern, lr, decay in groups if min(lr, decay) >= 0]
        if len(patterns) < len(groups):
            raise ValueError("a factor is less than 0")
    except (re.error, TypeError, ValueError) as e:
        raise UserError(
            f"config.optim.groups={groups}: each is (path regex, learning-rate factor, "
            f"weight-decay factor): {e}"
        ) from e

    def group_of(path, _):
        name = path_name(path)
        for i, pattern in enumerate(patterns):
            if pattern.search(name):
                return i
        raise UserError(f"parameter {name} matches no entry of config.optim.groups")

    labels = jax.tree_util.tree_map_with_path(group_of, params)
    unused = set(range(len(patterns))) - set(jax.tree.leaves(labels))
    if unused:
        names = ", ".join(repr(groups[i][0]) for i in sorted(unused))
        raise UserError(f"config.optim.groups: no parameter matches {names}")
    return labels


def frozen_at_random(params: Any, loaded: Any, groups: Any) -> dict[str, int]:
    """Sizes, by path, of the matrices that no learning rate moves and nothing was loaded into.

    `params` and `loaded` are nested dicts, the latter of those that do not start as drawn.
    """
    group_of, given = (flatten_dict(x, sep="/") for x in (assign_groups(params, groups), loaded))
    return {
        path: array.size
        for path, array in flatten_dict(params, sep="/").items()
        if array.ndim > 1 and groups[group_of[path]][1] == 0 and path not in given
    }


def make_optimizer(
    config: ml_collections.ConfigDict, params: Any, total_steps: int
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimiser for `params` (arrays or shapes) and its learning-rate schedule.

    `config` (`config.optim`): what `make_schedule` reads, and b1, b2, eps, weight_decay,
    clip_norm (global norm; 0: off), groups (see `assign_groups`; a learning-rate factor of 0
    freezes the group).
    """
    schedule = make_schedule(config, total_steps)

    def adamw(lr_factor, decay_factor):
        if lr_factor == 0:
            return optax.set_to_zero()
        return optax.adamw(
            lambda step: lr_factor * schedule(step),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=decay_factor * config.weight_decay,
        )

    labels = assign_groups(params, config.groups)
    transforms = {i: adamw(lr, decay) for i, (_, lr, decay) in enumerate(config.groups)}
    tx = optax.multi_transform(transforms, labels)
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)
        # What is frozen has no part in the norm.
        frozen = jax.tree.map(lambda i: config.groups[i][1] == 0, labels)
        if any(jax.tree.leaves(frozen)):
            tx = optax.chain(optax.masked(optax.set_to_zero(), frozen), tx)
    return tx, schedule
