"""Hugging Face checkpoints -> our parameter trees.

One `Table` describes one source; `convert` does the work and is strict: every parameter is filled,
every key is used or dropped on purpose.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util

from refseg_jax.errors import UserError
from refseg_jax.models.encoders.bert import Bert, BertConfig
from refseg_jax.models.encoders.swin import Swin, SwinConfig


@dataclasses.dataclass(frozen=True)
class Table:
    """How one kind of checkpoint names the modules of one of our models.

    Attributes:
        source: what the checkpoint is called in messages.
        renames: (pattern, replacement) pairs, applied in order to each key of the checkpoint, that
            bring its spellings to the one used below.
        modules: pattern of our module path -> their module path, or several whose outputs we
            compute as one, concatenated. The first full match counts.
        dropped: patterns of keys that we leave out on purpose.
        parameters: path of a parameter that belongs to no such module -> their key.
    """

    source: str
    renames: tuple[tuple[str, str], ...]
    modules: Mapping[str, str | tuple[str, ...]]
    dropped: tuple[str, ...]
    parameters: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def spelling(self, key: str) -> str:
        """The checkpoint's `key` as `modules` and `parameters` spell it."""
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


SWIN = Table(
    source="Hugging Face Swin",
    renames=(
        (r"^swin\.", ""),
        # What transformers 5 calls them in memory; its files keep the published names.
        (r"attention\.q_proj", "attention.self.query"),
        (r"attention\.k_proj", "attention.self.key"),
        (r"attention\.v_proj", "attention.self.value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"attention\.relative_position_bias\.", "attention.self."),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    ),
    modules={
        r"patch": "embeddings.patch_embeddings.projection",
        r"patch_norm": "embeddings.norm",
        r"blocks_(\d+)_(\d+)/norm1": r"encoder.layers.\1.blocks.\2.layernorm_before",
        r"blocks_(\d+)_(\d+)/attention": r"encoder.layers.\1.blocks.\2.attention.self",
        r"blocks_(\d+)_(\d+)/attention/qkv": (
            r"encoder.layers.\1.blocks.\2.attention.self.query",
            r"encoder.layers.\1.blocks.\2.attention.self.key",
            r"encoder.layers.\1.blocks.\2.attention.self.value",
        ),
        r"blocks_(\d+)_(\d+)/attention/proj": r"encoder.layers.\1.blocks.\2.attention.output.dense",
        r"blocks_(\d+)_(\d+)/norm2": r"encoder.layers.\1.blocks.\2.layernorm_after",
        r"blocks_(\d+)_(\d+)/fc1": r"encoder.layers.\1.blocks.\2.intermediate.dense",
        r"blocks_(\d+)_(\d+)/fc2": r"encoder.layers.\1.blocks.\2.output.dense",
        r"merges_(\d+)/(norm|reduction)": r"encoder.layers.\1.downsample.\2",
    },
    dropped=(
        r"relative_position_index$",  # a constant
        r"^layernorm\.",  # of the last stage, before the classifier
        r"^hidden_states_norms\.",  # of SwinBackbone's outputs
        r"^(classifier|pooler|decoder)\.",
        r"^embeddings\.mask_token$",
    ),
)

BERT = Table(
    source="Hugging Face BERT",
    renames=((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
    modules={
        r"embeddings/(word|position)": r"embeddings.\1_embeddings",
        r"embeddings/type": "embeddings.token_type_embeddings",
        r"embeddings/norm": "embeddings.LayerNorm",
        r"blocks_(\d+)/qkv": (
            r"encoder.layer.\1.attention.self.query",
            r"encoder.layer.\1.attention.self.key",
            r"encoder.layer.\1.attention.self.value",
        ),
        r"blocks_(\d+)/proj": r"encoder.layer.\1.attention.output.dense",
        r"blocks_(\d+)/norm1": r"encoder.layer.\1.attention.output.LayerNorm",
        r"blocks_(\d+)/fc1": r"encoder.layer.\1.intermediate.dense",
        r"blocks_(\d+)/fc2": r"encoder.layer.\1.output.dense",
        r"blocks_(\d+)/norm2": r"encoder.layer.\1.output.LayerNorm",
    },
    dropped=(r"^(cls|classifier|pooler|qa_outputs)\.", r"^embeddings\.(position|token_type)_ids$"),
)


def load_state(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Read a safetensors checkpoint: a file, or a directory that holds `model.safetensors`.

    Raises UserError where there is no such file, or it is cut short or not in the format.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give a .safetensors file or its directory")
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path} is not a whole safetensors file ({error}): download it again, or convert it"
        ) from error


def swin_from_hf(state: Mapping[str, np.ndarray], config: SwinConfig) -> dict[str, Any]:
    """Parameters of `Swin(config)` from SwinModel, SwinBackbone or a model with a head on it.

    Raises UserError as `convert` does; a position-bias table of another window is a key of
    another shape, it is not resized.
    """
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return convert(state, _params(Swin(config), image), SWIN)


def bert_from_hf(state: Mapping[str, np.ndarray], config: BertConfig) -> dict[str, Any]:
    """Parameters of `Bert(config)` from BertModel or a model with a head on it.

    Raises UserError as `convert` does.
    """
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    token_mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    return convert(state, _params(Bert(config), tokens, token_mask), BERT)


def convert(state: Mapping[str, np.ndarray], params: Mapping, table: Table) -> dict[str, Any]:
    """Fill a parameter tree from a checkpoint.

    Args:
        state: the checkpoint's arrays by their names in it.
        params: nested dict of anything with a `shape`: the tree to fill.
        table: how the names correspond.

    Returns:
        A tree like `params` of float32 numpy arrays.

    Raises:
        UserError: once, with every problem: keys missing, unexpected, twice there under two
            spellings, or of a shape that does not make ours.
    """
    keys, twice = {}, []
    for key in state:
        name = table.spelling(key)
        if name in keys:
            twice.append(f"{key} and {keys[name]}")
        keys[name] = key

    filled, missing, misshaped, used = {}, [], [], set()
    for path, ours in traverse_util.flatten_dict(params, sep="/").items():
        names = table.sources(path)
        used.update(names)
        absent = [name for name in names if name not in keys]
        if absent:
            missing += absent
            continue
        arrays = [np.asarray(state[keys[name]], np.float32) for name in names]
        filled[path] = _join(arrays, path.endswith("/kernel"))
        if filled[path] is None or filled[path].shape != ours.shape:
            got = " + ".join(f"{n} {a.shape}" for n, a in zip(names, arrays, strict=True))
            misshaped.append(f"{got} for our {path} {ours.shape}")
    unexpected = [
        key
        for name, key in keys.items()
        if name not in used and not any(re.search(p, name) for p in table.dropped)
    ]

    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "there twice": twice,
        "of another shape": misshaped,
    }
    if any(problems.values()):
        found = "; ".join(f"{len(v)} {k}: {_brief(v)}" for k, v in problems.items() if v)
        raise UserError(
            f"this is not a {table.source} checkpoint of the configured sizes ({found}): "
            "give another one or correct the config"
        )
    return traverse_util.unflatten_dict(filled, sep="/")


def _params(module: nn.Module, *inputs: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """The module's parameter tree, shapes only."""
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


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


def _join(arrays: list[np.ndarray], kernels: bool) -> np.ndarray | None:
    """The arrays concatenated along the outputs; None if their shapes forbid it."""
    try:
        return np.concatenate(
            [_channels_last(array) if kernels else array for array in arrays], axis=-1
        )
    except ValueError:
        return None


def _brief(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
