"""How fast are CrossVLT and LAVT at the paper's size, against the same mathematics in PyTorch?

    python -m benchmarks.early_fusion [--model crossvlt] [--image_size 480] [--repeats 5]

Whole forward passes in float32: Swin-B and BERT-base, one image and one expression, the same random
weights in both. The other side is PyTorch eager, the released code's operations one by one; the
golden tests hold it to the released outputs. One JSON line per model: median seconds of each,
`speedup` = PyTorch's time over ours, and the logits' relative difference.
"""

import argparse

import jax
import numpy as np
import torch

from benchmarks.compare import compare
from refseg_jax.models.crossvlt import CrossVLT
from refseg_jax.models.lavt import LAVT
from refseg_jax.weights.released import crossvlt_from_released, lavt_from_released
from tests.golden import torch_early_fusion
from tests.parity.hf_models import arrays

# Ours, theirs, the converter between them, and the recipe's number of tokens.
MODELS = {
    "crossvlt": (CrossVLT, torch_early_fusion.CrossVLT, crossvlt_from_released, 21),
    "lavt": (LAVT, torch_early_fusion.LAVT, lavt_from_released, 20),
}


def measure(name: str, size: int, repeats: int) -> None:
    """One image of noise and an expression that fills three quarters of its tokens."""
    ours, theirs, convert, count = MODELS[name]
    config = ours.Config()
    torch.manual_seed(0)
    reference = theirs(config).eval()
    variables = jax.device_put(convert(arrays(reference.state_dict()), config))
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, size, size, 3)).astype(np.float32)
    tokens = rng.integers(config.bert.vocab_size, size=(1, count)).astype(np.int32)
    token_mask = np.arange(count)[None] < 3 * count // 4
    pixels = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous()
    ids, mask = torch.from_numpy(tokens).long(), torch.from_numpy(token_mask).float()
    forward = jax.jit(ours(config).apply)

    def theirs_logits() -> torch.Tensor:
        outputs = reference(pixels, ids, mask)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return logits.permute(0, 2, 3, 1)

    compare(
        f"{name}_{size}",
        lambda: forward(variables, image, tokens, token_mask)["class_logits"],
        theirs_logits,
        repeats,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--image_size", type=int, default=480)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    with torch.inference_mode():
        for model in flags.model or MODELS:
            measure(model, flags.image_size, flags.repeats)
