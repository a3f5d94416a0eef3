"""Hugging Face checkpoints -> our parameter trees: Swin and BERT."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.models.encoders.bert import Bert, BertConfig
from refseg_jax.models.encoders.swin import Swin, SwinConfig
from refseg_jax.weights.tables import Table, convert, shapes

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
    resized=r"/bias_table$",
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
    layers=r"encoder\.layer\.(\d+)\.",
)


def swin_from_hf(state: Mapping[str, np.ndarray], config: SwinConfig) -> dict[str, Any]:
    """Parameters of `Swin(config)` from SwinModel, SwinBackbone or a model with a head on it.

    Position tables of another window are resized. Raises UserError as `convert` does.
    """
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return convert(state, shapes(Swin(config), image)["params"], SWIN)


def bert_from_hf(state: Mapping[str, np.ndarray], config: BertConfig) -> dict[str, Any]:
    """Parameters of `Bert(config)` from BertModel or a model with a head on it.

    Of a deeper model they are the first `config.layers` layers. Raises UserError as `convert` does.
    """
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    token_mask = jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    return convert(state, shapes(Bert(config), tokens, token_mask)["params"], BERT)
