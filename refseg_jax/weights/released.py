"""Checkpoints of the authors' released PyTorch code -> our variables: CrossVLT and LAVT.

Both name the Swin inside as Microsoft's code does and the BERT inside as Hugging Face's, and have
the same decoder; their tables share those entries.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from refseg_jax.models.crossvlt import CrossVLT, CrossVLTConfig
from refseg_jax.models.lavt import LAVT, LAVTConfig
from refseg_jax.weights.hf import BERT, Table, convert

Modules = Mapping[str, str | tuple[str, ...]]


def _inside(ours: str, theirs: str, modules: Modules) -> dict[str, str | tuple[str, ...]]:
    """A table of modules that lie deeper: both sides with a prefix."""

    def deeper(name: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return theirs + name if isinstance(name, str) else tuple(theirs + part for part in name)

    return {ours + pattern: deeper(name) for pattern, name in modules.items()}


SWIN: Modules = {
    r"patch": "patch_embed.proj",
    r"patch_norm": "patch_embed.norm",
    r"blocks_(\d+)_(\d+)/norm(\d)": r"layers.\1.blocks.\2.norm\3",
    r"blocks_(\d+)_(\d+)/attention": r"layers.\1.blocks.\2.attn",
    r"blocks_(\d+)_(\d+)/attention/(qkv|proj)": r"layers.\1.blocks.\2.attn.\3",
    r"blocks_(\d+)_(\d+)/fc(\d)": r"layers.\1.blocks.\2.mlp.fc\3",
    r"merges_(\d+)/(norm|reduction)": r"layers.\1.downsample.\2",
}

DECODER: Modules = {
    # Theirs count stages from 0 in the backbone's norms and from 1 in the decoder.
    **{rf"decoder/stage_norm{i + 1}": f"backbone.norm{i}" for i in range(4)},
    r"decoder/from(\d)/conv(\d)": r"classifier.conv\2_\1",
    r"decoder/from(\d)/norm(\d)": r"classifier.bn\2_\1",
    r"decoder/classifier": "classifier.conv1_1",
}

DROPPED = (
    r"relative_position_index$",  # a constant
    r"num_batches_tracked$",  # a count that nothing reads
    r"embeddings\.position_ids$",  # a constant
)

LAVT_TABLE = Table(
    source="released LAVT",
    renames=(
        (r"^module\.", ""),
        (r"^bert_model\.", "text_encoder."),  # `lavt` keeps its BERT apart, `lavt_one` inside.
    ),
    modules={
        **_inside("swin/", "backbone.", SWIN),
        **_inside("bert/", "text_encoder.", BERT.modules),
        r"fusions_(\d)/vision": r"backbone.layers.\1.fusion.vis_project.0",
        r"fusions_(\d)/mix": r"backbone.layers.\1.fusion.project_mm.0",
        r"fusions_(\d)/attention/(query|key|value)": (
            r"backbone.layers.\1.fusion.image_lang_att.f_\2.0"
        ),
        r"fusions_(\d)/attention/out": r"backbone.layers.\1.fusion.image_lang_att.W.0",
        r"gates_(\d)/fc1": r"backbone.layers.\1.res_gate.0",
        r"gates_(\d)/fc2": r"backbone.layers.\1.res_gate.2",
        **DECODER,
    },
    dropped=(*DROPPED, r"^text_encoder\.pooler\."),
)


def _crossvlt_fusion(ours: str, attention: str, gate: str) -> Modules:
    return {
        rf"{ours}fusions_(\d)/attention/query": rf"backbone.layers.\1.{attention}.v_q.0",
        rf"{ours}fusions_(\d)/attention/key": rf"backbone.layers.\1.{attention}.l_q",
        rf"{ours}fusions_(\d)/attention/value": rf"backbone.layers.\1.{attention}.values_l",
        rf"{ours}fusions_(\d)/attention/out": rf"backbone.layers.\1.{attention}.w_v.0",
        rf"{ours}fusions_(\d)/mix": rf"backbone.layers.\1.{attention}.project_mm.0",
        rf"{ours}gates_(\d)/fc1": rf"backbone.layers.\1.{gate}.0",
        rf"{ours}gates_(\d)/fc2": rf"backbone.layers.\1.{gate}.2",
    }


LANGUAGE_STAGE: Modules = {
    r"fusion/query": "crossattention.self.query",
    r"fusion/key_value": ("crossattention.self.key", "crossattention.self.value"),
    r"fusion/proj": "crossattention.output.dense",
    r"fusion/norm1": "crossattention.output.LayerNorm",
    r"fusion/fc1": "intermediate.dense",
    r"fusion/fc2": "output.dense",
    r"fusion/norm2": "output.LayerNorm",
    **BERT.modules,
}

CROSSVLT_TABLE = Table(
    source="released CrossVLT",
    renames=(
        (r"^module\.", ""),
        # Theirs is cut into stages at the top; here spelled as one Swin and as BERTs.
        (r"^backbone\.\d\.(patch_embed|norm\d)\.", r"backbone.\1."),
        (r"^backbone\.(\d)\.layers\.", r"backbone.layers.\1."),
        (r"^(lang_stage\d)\.layer\.", r"\1.encoder.layer."),
        (r"^lang_stage1\.encoder\.proj\.", "lang_stage1.proj."),
    ),
    modules={
        **_inside("swin/", "backbone.", SWIN),
        **_inside("bert/", "lang_stage1.", BERT.modules),
        **{
            ours: theirs
            for i in range(3)
            for ours, theirs in _inside(
                f"language_stages_{i}/", f"lang_stage{i + 2}.", LANGUAGE_STAGE
            ).items()
        },
        **_crossvlt_fusion("", "attn1", "linear1"),
        **_crossvlt_fusion("merged_", "attn2", "linear2"),
        r"alignments_(\d)/vision": r"backbone.layers.\1.proj",
        **{f"alignments_{i}/language": f"lang_stage{i + 1}.proj" for i in range(4)},
        **DECODER,
    },
    dropped=DROPPED,
    parameters={"temperature": "temp"},
)


def lavt_from_released(state: Mapping[str, np.ndarray], config: LAVTConfig) -> dict[str, Any]:
    """Variables of `LAVT(config)` (params, batch_stats) from a checkpoint's arrays by name.

    `state` is that of `lavt_one`, or of `lavt` with the keys of its BERT behind "bert_model.".
    Raises UserError as `convert` does.
    """
    return _variables(state, LAVT(config), LAVT_TABLE)


def crossvlt_from_released(
    state: Mapping[str, np.ndarray], config: CrossVLTConfig
) -> dict[str, Any]:
    """Variables of `CrossVLT(config)` (params, batch_stats) from a checkpoint's arrays by name.

    Raises UserError as `convert` does.
    """
    return _variables(state, CrossVLT(config), CROSSVLT_TABLE)


def _variables(state: Mapping[str, np.ndarray], model: nn.Module, table: Table) -> dict[str, Any]:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    variables = jax.eval_shape(
        model.init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
        tokens,
        jax.ShapeDtypeStruct(tokens.shape, jnp.bool_),
    )
    # Statistics lie beside the scale and bias of the same module: one tree, and apart again.
    flat = {name: traverse_util.flatten_dict(tree) for name, tree in variables.items()}
    merged = {path: leaf for tree in flat.values() for path, leaf in tree.items()}
    filled = traverse_util.flatten_dict(convert(state, traverse_util.unflatten_dict(merged), table))
    return {
        name: traverse_util.unflatten_dict({path: filled[path] for path in tree})
        for name, tree in flat.items()
    }
