"""How fast are the encoders' forward passes, against PyTorch eager on the same machine?

    python -m benchmarks.encoders [--image_size 480] [--repeats 5]

Swin-B on one image and BERT-base on 8 expressions of 20 tokens, with the same random weights in
float32. One JSON line per encoder: median seconds of each, `speedup` = PyTorch's time over ours,
and the outputs' relative difference.
"""

import argparse

import jax
import numpy as np
import torch
import transformers

from benchmarks.compare import compare
from benchmarks.paper import positive
from refseg_jax.models.encoders.bert import Bert, BertConfig
from refseg_jax.models.encoders.swin import Swin, SwinConfig
from refseg_jax.weights.hf import bert_from_hf, swin_from_hf
from tests.parity.hf_models import arrays


def swin(size: int, repeats: int) -> None:
    """Swin-B, window 12, the last stage's output for one image."""
    config = SwinConfig()
    model = transformers.SwinModel(
        transformers.SwinConfig(
            embed_dim=config.embed_dim,
            depths=config.depths,
            num_heads=config.num_heads,
            window_size=config.window,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    ).eval()
    model.layernorm = torch.nn.Identity()  # ours leaves the last norm to the user
    params = jax.device_put(swin_from_hf(arrays(model.state_dict()), config))
    image = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous()
    forward = jax.jit(lambda params, image: Swin(config).apply({"params": params}, image)[-1])
    compare(
        f"swin_b_{size}",
        lambda: forward(params, image).reshape(1, -1, config.widths[-1]),
        lambda: model(pixels, always_partition=True).last_hidden_state,
        repeats,
    )


def bert(repeats: int) -> None:
    """BERT-base, the last layer's states of 8 expressions of 20 tokens, a quarter of it padding."""
    config = BertConfig()
    model = transformers.BertModel(
        transformers.BertConfig(attn_implementation="eager"), add_pooling_layer=False
    ).eval()
    params = jax.device_put(bert_from_hf(arrays(model.state_dict()), config))
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(8, 20)).astype(np.int32)
    token_mask = np.broadcast_to(np.arange(20) < 15, tokens.shape)
    ids, mask = torch.from_numpy(tokens).long(), torch.from_numpy(token_mask.copy())
    forward = jax.jit(
        lambda params, tokens, mask: Bert(config).apply({"params": params}, tokens, mask)
    )
    compare(
        "bert_base_8x20",
        lambda: forward(params, tokens, token_mask),
        lambda: model(ids, mask).last_hidden_state,
        repeats,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image_size", type=positive, default=480)
    parser.add_argument("--repeats", type=positive, default=5)
    flags = parser.parse_args()
    with torch.inference_mode():
        swin(flags.image_size, flags.repeats)
        bert(flags.repeats)
