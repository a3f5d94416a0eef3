"""Checkpoints of the authors' released PyTorch code -> our variables: CRIS, CrossVLT and LAVT.

CrossVLT and LAVT name the Swin inside as Microsoft's code does and the BERT inside as Hugging
Face's, and have the same decoder; their tables share those entries. CRIS names the CLIP inside as
OpenAI does.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.errors import UserError
from refseg_jax.models.cris import CRIS, CRISConfig
from refseg_jax.models.crossvlt import CrossVLT, CrossVLTConfig
from refseg_jax.models.lavt import LAVT, LAVTConfig
from refseg_jax.weights import microsoft
from refseg_jax.weights.clip import CLIP
from refseg_jax.weights.hf import BERT
from refseg_jax.weights.tables import Modules, Table, convert_variables, inside, shapes

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
    # `lavt` keeps its BERT apart, `lavt_one` inside.
    renames=(
        (r"^bert_model\.(module\.|bert_model\.|text_encoder\.|bert\.)*", "text_encoder."),
        (r"^(text_encoder\..*)\.gamma$", r"\1.weight"),
        (r"^(text_encoder\..*)\.beta$", r"\1.bias"),
    ),
    modules={
        **inside("swin/", "backbone.", microsoft.MODULES),
        **inside("bert/", "text_encoder.", BERT.modules),
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
    dropped=(*DROPPED, r"^text_encoder\.(pooler|cls)\."),
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
        # Theirs is cut into stages at the top; here spelled as one Swin and as BERTs.
        (r"^backbone\.\d\.(patch_embed|norm\d)\.", r"backbone.\1."),
        (r"^backbone\.(\d)\.layers\.", r"backbone.layers.\1."),
        (r"^(lang_stage\d)\.layer\.", r"\1.encoder.layer."),
        (r"^lang_stage1\.encoder\.proj\.", "lang_stage1.proj."),
    ),
    modules={
        **inside("swin/", "backbone.", microsoft.MODULES),
        **inside("bert/", "lang_stage1.", BERT.modules),
        **{
            ours: theirs
            for i in range(3)
            for ours, theirs in inside(
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
    # Files made for testing lack it: only the loss reads it. As released it is never trained.
    defaults={"temperature": 1.0},
)

CRIS_TABLE = Table(
    source="released CRIS",
    renames=(*CLIP.renames, (r"_attn\.in_proj_", "_attn.in_proj.")),
    modules={
        **inside("", "backbone.", CLIP.modules),
        r"neck/sentence": "neck.txt_proj.0",
        r"neck/sentence_norm": "neck.txt_proj.1",
        r"neck/coarse_norm": "neck.norm_layer.0",
        **{
            f"neck/{ours}/{part}": f"neck.{theirs}.{i}"
            for ours, theirs in (
                ("coarse", "f1_v_proj"),
                ("middle", "f2_v_proj"),
                ("middle_join", "f2_cat"),
                ("fine", "f3_v_proj"),
                ("fine_join", "f3_cat"),
                ("coarse_out", "f4_proj5"),
                ("middle_out", "f4_proj4"),
                ("fine_out", "f4_proj3"),
                ("join", "aggr"),
                ("places", "coordconv.0.conv1"),
                ("out", "coordconv.1"),
            )
            for i, part in enumerate(("conv", "norm"))
        },
        **{
            rf"decoder/layer(\d+)/{ours}": rf"decoder.layers.\1.{theirs}"
            for ours, theirs in (
                ("self_norm", "norm1"),
                ("self_attention", "self_attn.in_proj"),
                ("self_attention/out", "self_attn.out_proj"),
                ("self_end", "self_attn_norm"),
                ("cross_norm", "norm2"),
                ("cross_attention", "multihead_attn.in_proj"),
                ("cross_attention/out", "multihead_attn.out_proj"),
                ("cross_end", "cross_attn_norm"),
                ("ffn_norm", "norm3"),
                ("fc1", "ffn.0"),
                ("ffn_middle", "ffn.3"),
                ("fc2", "ffn.4"),
            )
        },
        r"decoder/norm": "decoder.norm",
        **{f"projector/up{i}": f"proj.vis.{2 * i - 1}.0" for i in (1, 2)},
        **{f"projector/up{i}/norm": f"proj.vis.{2 * i - 1}.1" for i in (1, 2)},
        r"projector": "proj.vis.4",
        r"projector/sentence": "proj.txt",
    },
    dropped=(
        r"num_batches_tracked$",  # a count that nothing reads
        r"^backbone\.logit_scale$",  # of CLIP's own loss
    ),
    parameters={ours: f"backbone.{theirs}" for ours, theirs in CLIP.parameters.items()},
)

# Name of a model, as in `config.model.name` -> its table.
TABLES = {"cris": CRIS_TABLE, "crossvlt": CROSSVLT_TABLE, "lavt": LAVT_TABLE}


def cris_from_released(state: Mapping[str, np.ndarray], config: CRISConfig) -> dict[str, Any]:
    """Variables of `CRIS(config)` (params, batch_stats) from a checkpoint's arrays by name.

    Raises UserError as `convert_variables` does.
    """
    return convert_variables(state, shapes(CRIS(config), *_INPUTS), CRIS_TABLE).tree


def lavt_from_released(state: Mapping[str, np.ndarray], config: LAVTConfig) -> dict[str, Any]:
    """Variables of `LAVT(config)` (params, batch_stats) from a checkpoint's arrays by name.

    `state` is that of `lavt_one`, or of `lavt` with the keys of its BERT behind "bert_model.".
    Raises UserError as `convert_variables` does.
    """
    return convert_variables(state, shapes(LAVT(config), *_INPUTS), LAVT_TABLE).tree


def crossvlt_from_released(
    state: Mapping[str, np.ndarray], config: CrossVLTConfig
) -> dict[str, Any]:
    """Variables of `CrossVLT(config)` (params, batch_stats) from a checkpoint's arrays by name.

    Raises UserError as `convert_variables` does.
    """
    return convert_variables(state, shapes(CrossVLT(config), *_INPUTS), CROSSVLT_TABLE).tree


def with_text(
    name: str, arrays: Mapping[str, np.ndarray], text: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The arrays of model `name` and of its text encoder, from a file of its own, as one state.

    Raises:
        UserError: this model's checkpoints hold their text encoder themselves, or this one does.
    """
    if name != "lavt":
        raise UserError(f"a checkpoint of {name} holds its text encoder: leave the second one out")
    if any(LAVT_TABLE.spelling(key).startswith("text_encoder.") for key in arrays):
        raise UserError("the first checkpoint holds a text encoder: leave the second one out")
    return {**arrays, **{f"bert_model.{key}": array for key, array in text.items()}}


# image, tokens, token_mask: of any size, only the parameters' shapes are wanted.
_INPUTS = (
    jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    jax.ShapeDtypeStruct((1, 2), jnp.int32),
    jax.ShapeDtypeStruct((1, 2), jnp.bool_),
)
