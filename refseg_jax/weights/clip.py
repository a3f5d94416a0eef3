"""Published CLIP checkpoints -> our variables: OpenAI's and open_clip's, Hugging Face's text."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from refseg_jax.models.encoders.clip import Clip, ClipConfig, ClipText, ClipTextConfig
from refseg_jax.models.layers.resize import resize_bicubic
from refseg_jax.weights import resnet
from refseg_jax.weights.tables import Conversion, Table, convert_variables, inside, shapes

POSITIONS = "visual.attnpool.positional_embedding"
CONNECT = "visual.attnpool.connect."

CLIP = Table(
    source="CLIP with a ResNet (OpenAI or open_clip)",
    renames=(
        (r"^text\.", ""),  # open_clip's form with the text in a module
        (r"\.attn\.in_proj_", ".attn.in_proj."),
        (r"\.connect\.0\.", ".connect.conv."),
        (r"\.connect\.1\.", ".connect.norm."),
    ),
    modules={
        **inside("vision/", "visual.", resnet.MODULES),
        r"vision/attention_pool/query": "visual.attnpool.q_proj",
        r"vision/attention_pool/key": "visual.attnpool.k_proj",
        r"vision/attention_pool/value": "visual.attnpool.v_proj",
        r"vision/attention_pool/out": "visual.attnpool.c_proj",
        r"vision/attention_pool/connect/(conv|norm)": r"visual.attnpool.connect.\1",
        r"text/word": "token_embedding",
        r"text/blocks_(\d+)/norm(\d)": r"transformer.resblocks.\1.ln_\2",
        r"text/blocks_(\d+)/qkv": r"transformer.resblocks.\1.attn.in_proj",
        r"text/blocks_(\d+)/proj": r"transformer.resblocks.\1.attn.out_proj",
        r"text/blocks_(\d+)/fc1": r"transformer.resblocks.\1.mlp.c_fc",
        r"text/blocks_(\d+)/fc2": r"transformer.resblocks.\1.mlp.c_proj",
        r"text/norm": "ln_final",
    },
    dropped=(
        r"num_batches_tracked$",  # a count that nothing reads
        r"^(logit_scale|logit_bias)$",  # of CLIP's own loss
        r"^(input_resolution|context_length|vocab_size)$",  # sizes, in OpenAI's archives
        r"(^|\.)attn_mask$",  # a constant
    ),
    parameters={
        "vision/attention_pool/positions": POSITIONS,
        "text/positions": "positional_embedding",
        "text/projection": "text_projection",
    },
)

CLIP_TEXT_HF = Table(
    source="Hugging Face CLIP text",
    renames=((r"^text_model\.", ""),),
    modules={
        r"word": "embeddings.token_embedding",
        r"blocks_(\d+)/norm(\d)": r"encoder.layers.\1.layer_norm\2",
        r"blocks_(\d+)/qkv": tuple(rf"encoder.layers.\1.self_attn.{x}_proj" for x in "qkv"),
        r"blocks_(\d+)/proj": r"encoder.layers.\1.self_attn.out_proj",
        r"blocks_(\d+)/fc(\d)": r"encoder.layers.\1.mlp.fc\2",
        r"norm": "final_layer_norm",
    },
    dropped=(
        r"^embeddings\.position_ids$",  # a constant
        r"^(vision_model|visual_projection)\.",
        r"^logit_scale$",
    ),
    parameters={
        "positions": "embeddings.position_embedding.weight",
        "projection": "text_projection.weight",
    },
)


def clip_from_openai(state: Mapping[str, np.ndarray], config: ClipConfig) -> dict[str, Any]:
    """Variables of `Clip(config)` (params, batch_stats) from OpenAI's or open_clip's arrays.

    As `convert_clip` fills them; raises UserError as it does.
    """
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return convert_clip(state, shapes(Clip(config), image, *_TOKENS)).tree


def convert_clip(state: Mapping[str, np.ndarray], variables: Mapping) -> Conversion:
    """Fill the variables of a `Clip` from OpenAI's or open_clip's arrays.

    The attention pool's positions are resized to our grid. Its `connect`, which CLIP does not have,
    is left out of the tree unless the checkpoint has it, to start from scratch. A `Clip` without
    the pool leaves the checkpoint's unused. Raises UserError as `convert_variables` does.
    """
    table, notes = CLIP, []
    pool = variables["params"]["vision"].get("attention_pool")
    if pool is None:
        table = dataclasses.replace(CLIP, dropped=(*CLIP.dropped, r"^visual\.attnpool\."))
    else:
        state, notes = _on_grid(state, round((pool["positions"].shape[0] - 1) ** 0.5))
        if not any(table.spelling(key).startswith(CONNECT) for key in state):
            flat = traverse_util.flatten_dict(variables)
            flat = {place: leaf for place, leaf in flat.items() if "connect" not in place}
            variables = traverse_util.unflatten_dict(flat)
            notes.append("the attention pool's connect, which it lacks, from scratch")
    done = convert_variables(state, variables, table)
    return dataclasses.replace(done, notes=[*done.notes, *notes])


def clip_text_from_hf(state: Mapping[str, np.ndarray], config: ClipTextConfig) -> dict[str, Any]:
    """Parameters of `ClipText(config)` from CLIPModel, CLIPTextModelWithProjection, CLIPTextModel.

    The last has no `projection`, which is then left out. Raises UserError as `convert` does.
    """
    return convert_clip_text(state, shapes(ClipText(config), *_TOKENS)).tree["params"]


def is_hf(state: Mapping[str, np.ndarray]) -> bool:
    """Whether these are the arrays of a Hugging Face CLIP."""
    return any(name.endswith("embeddings.token_embedding.weight") for name in state)


def convert_clip_text(state: Mapping[str, np.ndarray], variables: Mapping) -> Conversion:
    """Fill the variables of a `ClipText` from Hugging Face's CLIP, of whatever image encoder.

    A `projection` that it lacks is left out of the tree, to start from scratch. Raises UserError as
    `convert_variables` does.
    """
    # Ours is a plain matrix [in, out], as OpenAI's is; theirs is a linear layer's weight.
    state = {
        name: array.T if name == "text_projection.weight" else array
        for name, array in state.items()
    }
    params, notes = dict(variables["params"]), []
    if "text_projection.weight" not in state:
        del params["projection"]
        notes.append("the projection, which it lacks, from scratch")
    done = convert_variables(state, {"params": params}, CLIP_TEXT_HF)
    return dataclasses.replace(done, notes=[*done.notes, *notes])


def _on_grid(
    state: Mapping[str, np.ndarray], grid: int
) -> tuple[Mapping[str, np.ndarray], list[str]]:
    """The pool's positions [1 + g², C] resized to [1 + grid², C]; and a note."""
    name = next((name for name in state if CLIP.spelling(name) == POSITIONS), None)
    if name is None:
        return state, []  # Reported as missing.
    table = np.asarray(state[name], np.float32)
    side = round((len(table) - 1) ** 0.5)
    if side == grid or side**2 != len(table) - 1:
        return state, []
    cells = resize_bicubic(table[1:].reshape(1, side, side, -1), (grid, grid))
    table = np.concatenate([table[:1], np.asarray(cells).reshape(grid**2, -1)])
    return {**state, name: table}, [f"the attention pool's positions resized from {side} to {grid}"]


# Of any size, only the parameters' shapes are wanted.
_TOKENS = (jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), jnp.bool_))
