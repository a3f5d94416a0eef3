"""Swin as Microsoft publishes it (and as the codes built on theirs name it) -> our parameters."""

from refseg_jax.weights.tables import Modules, Table

MODULES: Modules = {
    r"patch": "patch_embed.proj",
    r"patch_norm": "patch_embed.norm",
    r"blocks_(\d+)_(\d+)/norm(\d)": r"layers.\1.blocks.\2.norm\3",
    r"blocks_(\d+)_(\d+)/attention": r"layers.\1.blocks.\2.attn",
    r"blocks_(\d+)_(\d+)/attention/(qkv|proj)": r"layers.\1.blocks.\2.attn.\3",
    r"blocks_(\d+)_(\d+)/fc(\d)": r"layers.\1.blocks.\2.mlp.fc\3",
    r"merges_(\d+)/(norm|reduction)": r"layers.\1.downsample.\2",
}

SWIN = Table(
    source="Microsoft Swin",
    renames=(),
    modules=MODULES,
    dropped=(
        r"\.(attn_mask|relative_position_index)$",  # constants, of one input size
        r"^norm\.",  # of the last stage, before the classifier
        r"^head\.",
    ),
    resized=r"/bias_table$",
)
