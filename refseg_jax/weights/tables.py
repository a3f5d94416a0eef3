"""What all conversions share: tables of names, and filling our parameters from them.

One `Table` describes one source. `convert` is strict: every parameter is filled, and every key is
used or dropped on purpose; otherwise one error lists all that is wrong.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from refseg_jax.errors import UserError
from refseg_jax.models.layers.resize import resize_bicubic

Modules = Mapping[str, str | tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Table:
    """How one kind of checkpoint names the modules of one of our models.

    Attributes:
        source: what the checkpoint is called in messages.
        renames: (pattern, replacement) pairs, applied in order to each key of the checkpoint, that
            bring its spellings to the one used below. A "module." in front, which data-parallel
            training leaves, is gone before.
        modules: pattern of our module path -> their module path, or several whose outputs we
            compute as one, concatenated. The first full match counts.
        dropped: patterns of keys that we leave out on purpose.
        parameters: path of a parameter that belongs to no such module -> their key.
        resized: pattern of paths of relative position tables [(2 window - 1)², heads], which are
            resized where the checkpoint's window is another one.
        layers: pattern, with the number as its group, of the keys of a stack of layers of which
            the first are enough: those after our last are left out.
        defaults: path of a parameter that a checkpoint may lack -> the value it then has.
    """

    source: str
    renames: tuple[tuple[str, str], ...]
    modules: Modules
    dropped: tuple[str, ...]
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resized: str = ""
    layers: str = ""
    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def spelling(self, key: str) -> str:
        """The checkpoint's `key` as `modules` and `parameters` spell it."""
        key = key.removeprefix("module.")
        for pattern, replacement in self.renames:
            key = re.sub(pattern, replacement, key)
        return key

    def sources(self, path: str) -> list[str]:
        """The checkpoint's keys that make our leaf at `path`; several are concatenated."""
        if path in self.parameters:
            return [self.parameters[path]]
        module, _, leaf = path.rpartition("/")
        for pattern, theirs in self.modules.items():
            if match := re.fullmatch(pattern, module):
                theirs = (theirs,) if isinstance(theirs, str) else theirs
                return [f"{match.expand(name)}.{_LEAVES[leaf]}" for name in theirs]
        return [path]  # What the checkpoint cannot have: reported as missing.


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A filled tree and how it came about.

    Attributes:
        tree: float32 numpy arrays, nested as asked for.
        source: what kind of checkpoint it was.
        notes: what was not copied as it is: tables resized, layers left out, defaults.
        dropped: the keys that were left out on purpose, the further layers not among them.
    """

    tree: dict[str, Any]
    source: str
    notes: list[str]
    dropped: list[str]


def inside(ours: str, theirs: str, modules: Modules) -> dict[str, str | tuple[str, ...]]:
    """A table of modules that lie deeper: both sides with a prefix."""

    def deeper(name: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return theirs + name if isinstance(name, str) else tuple(theirs + part for part in name)

    return {ours + pattern: deeper(name) for pattern, name in modules.items()}


def shapes(module: nn.Module, *inputs: Any) -> dict[str, Any]:
    """The variables of `module`, shapes only."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)


def convert(state: Mapping[str, np.ndarray], params: Mapping, table: Table) -> dict[str, Any]:
    """Fill a parameter tree from a checkpoint.

    Args:
        state: the checkpoint's arrays by their names in it.
        params: nested dict of anything with a `shape`: the tree to fill.
        table: how the names correspond.

    Returns:
        A tree like `params` of float32 numpy arrays.

    Raises:
        UserError: see `convert_variables`.
    """
    return convert_variables(state, {"params": params}, table).tree["params"]


def convert_variables(
    state: Mapping[str, np.ndarray], variables: Mapping, table: Table
) -> Conversion:
    """Fill all collections (params, batch_stats) of a model or a part of it from a checkpoint.

    Raises:
        UserError: once, with every problem: keys missing, unexpected, twice there under two
            spellings, of a shape that does not make ours, or with values that are not finite, or of
            a variance below 0.
    """
    keys, twice = {}, []
    for key in state:
        name = table.spelling(key)
        if name in keys:
            twice.append(f"{key} and {keys[name]}")
        keys[name] = key

    filled, missing, misshaped, infinite, negative, used = {}, [], [], [], [], set()
    notes: collections.Counter[str] = collections.Counter()
    for place, ours in traverse_util.flatten_dict(variables).items():
        # Statistics lie beside the scale and bias of the same module, so the collection is no
        # part of the path.
        path = "/".join(place[1:])
        names = table.sources(path)
        used.update(names)
        absent = [name for name in names if name not in keys]
        if absent and path in table.defaults:
            filled[place] = np.full(ours.shape, table.defaults[path], np.float32)
            notes[f"{path}, which it lacks, at {table.defaults[path]}"] += 1
            continue
        if absent:
            missing += absent
            continue
        arrays = [state[keys[name]] for name in names]
        if table.resized and re.search(table.resized, path):
            arrays, note = _to_window(arrays, ours.shape)
            notes.update(note)
        array = _join(arrays, ours.shape, path.endswith("/kernel"))
        if array is None:
            got = " + ".join(f"{n} {state[keys[n]].shape}" for n in names)
            misshaped.append(f"{got} for our {path} {ours.shape}")
        elif not np.isfinite(array).all():
            infinite.append(" + ".join(names))
        elif place[-1] == "var" and (array < 0).any():
            negative += names
        else:
            filled[place] = array

    unexpected = [name for name in keys if name not in used]
    dropped = [name for name in unexpected if any(re.search(p, name) for p in table.dropped)]
    further, note = _further_layers(table.layers, keys, used)
    notes.update(note)
    unexpected = [keys[n] for n in unexpected if n not in further and n not in set(dropped)]

    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "there twice": twice,
        "of another shape": misshaped,
        "not finite": infinite,
        "variances below 0": negative,
    }
    if any(problems.values()):
        found = "; ".join(f"{len(v)} {k}: {_all(v)}" for k, v in problems.items() if v)
        raise UserError(
            f"this is not a {table.source} checkpoint of the configured sizes ({found}): "
            "give another one or correct the config"
        )
    counted = [note.format(count) for note, count in notes.items()]
    return Conversion(traverse_util.unflatten_dict(filled), table.source, counted, dropped)


def closest(state: Mapping[str, np.ndarray], variables: Mapping, tables: Sequence[Table]) -> Table:
    """The table of `tables` that knows the most of the checkpoint's keys."""
    paths = ["/".join(place[1:]) for place in traverse_util.flatten_dict(variables)]

    def known(table: Table) -> int:
        names = {name for path in paths for name in table.sources(path)}
        return len(names & {table.spelling(key) for key in state})

    return max(tables, key=known)


def brief(names: Sequence[str], most: int = 8) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _all(names: Sequence[str], most: int = 40) -> str:
    """All `names`; of more than `most`, those that differ in numbers as one, and how many."""
    if len(names) <= most:
        return ", ".join(names)
    counted = collections.Counter(re.sub(r"\d+", "*", name) for name in names)
    return brief([f"{name} ({n})" if n > 1 else name for name, n in counted.items()], 25)


# Our leaf -> theirs.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "bias_table": "relative_position_bias_table",
    "mean": "running_mean",
    "var": "running_var",
}


def _channels_last(weight: np.ndarray) -> np.ndarray:
    """Linear or convolution weight [out, in, *window] -> kernel [*window, in, out].

    A convolution along a sequence with a window of 1 is a linear layer: [out, in, 1] -> [in, out].
    """
    if weight.ndim == 3 and weight.shape[2] == 1:
        weight = weight[..., 0]
    return np.moveaxis(weight, (0, 1), (-1, -2))


def _join(arrays: list[np.ndarray], shape: tuple[int, ...], kernels: bool) -> np.ndarray | None:
    """The arrays concatenated along the outputs, float32; None if that does not give `shape`."""
    try:
        array = np.concatenate([_channels_last(x) if kernels else x for x in arrays], axis=-1)
    except ValueError:
        return None
    return array.astype(np.float32, copy=False) if array.shape == shape else None


def _to_window(arrays: list[np.ndarray], shape: tuple[int, ...]) -> tuple[list[np.ndarray], list]:
    """The one relative position table of `arrays`, resized to that of our window; and a note.

    As in the released codes, bicubic on the grid of offsets. What is no such table stays.
    """
    (table,) = arrays
    theirs, ours = (_window(size) for size in (table.shape, shape))
    if theirs == ours or not theirs or not ours or table.shape[1] != shape[1]:
        return arrays, []
    grid = np.asarray(table, np.float32).reshape(1, 2 * theirs - 1, 2 * theirs - 1, -1)
    resized = resize_bicubic(grid, (2 * ours - 1, 2 * ours - 1))
    note = f"{{}} position tables resized from window {theirs} to {ours}"
    return [np.asarray(resized).reshape(shape)], [note]


def _window(shape: tuple[int, ...]) -> int:
    """The window whose table [(2 window - 1)², heads] has this shape; 0 if none has."""
    window = (round(shape[0] ** 0.5) + 1) // 2 if len(shape) == 2 else 0
    return window if window and (2 * window - 1) ** 2 == shape[0] else 0


def _further_layers(
    pattern: str, keys: Mapping[str, str], used: set[str]
) -> tuple[set[str], list[str]]:
    """The keys of layers after the last that is used, and a note if there are any."""
    if not pattern:
        return set(), []
    numbers = {name: int(m[1]) for name in {*keys, *used} if (m := re.match(pattern, name))}
    last = max((numbers[name] for name in used & numbers.keys()), default=-1)
    further = {name for name in keys if numbers.get(name, -1) > last}
    if not further:
        return further, []
    return further, [f"layers 0-{last} of {max(numbers.values()) + 1}"]
