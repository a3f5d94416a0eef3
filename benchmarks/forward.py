"""How fast are the models' forward passes at their papers' size, against PyTorch on this machine?

    python -m benchmarks.forward [--model alignformer] [--image_size N] [--repeats 5]

One image and one expression in float32, the same random weights in both. The other side is
benchmarks/pytorch, eager. One JSON line per model: median seconds of each, `speedup` = PyTorch's
time over ours, and the logits' relative difference.
"""

import argparse
import importlib
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import torch

from benchmarks.compare import compare
from benchmarks.paper import CONFIGS, paper_config, positive
from benchmarks.pytorch.load import load
from refseg_jax import models
from refseg_jax.train_state import init_variables


def pair(
    name: str, config: ml_collections.ConfigDict
) -> tuple[nn.Module, dict[str, Any], torch.nn.Module]:
    """(our model, its variables, PyTorch's model with the same in evaluation mode)."""
    ours = models.build(config.model)
    size, tokens = config.data.image_size, config.data.max_tokens
    variables = jax.jit(lambda key: init_variables(ours, key, size, tokens))(jax.random.key(0))
    # With running variances of 1, what a hundred layers start with grows beyond comparison.
    statistics = jax.tree.map(lambda x: 2 * x, variables.get("batch_stats", {}))
    variables = {"params": variables["params"], "batch_stats": statistics}
    twins = importlib.import_module(f"benchmarks.pytorch.{name}")
    theirs = getattr(twins, type(ours).__name__)(ours.config).eval()
    load(theirs, variables)
    return ours, variables, theirs


def measure(name: str, size: int | None, repeats: int) -> None:
    """One image of noise and an expression that fills three quarters of its tokens."""
    config = paper_config(name)
    size, count = size or config.data.image_size, config.data.max_tokens
    ours, variables, theirs = pair(name, config)
    variables = jax.device_put(variables)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, size, size, 3)).astype(np.float32)
    # Ids that every tokenizer's vocabulary has.
    tokens = rng.integers(30000, size=(1, count)).astype(np.int32)
    token_mask = np.arange(count)[None] < 3 * count // 4
    pixels, ids = torch.from_numpy(image).permute(0, 3, 1, 2), torch.from_numpy(tokens).long()
    pixels, mask = pixels.contiguous(), torch.from_numpy(token_mask)
    forward = jax.jit(lambda *arrays: ours.apply(*arrays)["logits"])

    def theirs_logits() -> torch.Tensor:
        outputs = theirs(pixels, ids, mask)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return logits[:, 1] - logits[:, 0] if logits.ndim == 4 else logits

    compare(
        f"{name}_{size}",
        lambda: forward(variables, image, tokens, token_mask),
        theirs_logits,
        repeats,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=CONFIGS, action="append", help="default: all")
    parser.add_argument("--image_size", type=positive, help="default: the paper's")
    parser.add_argument("--repeats", type=positive, default=5)
    flags = parser.parse_args()
    with torch.inference_mode():
        for model in flags.model or CONFIGS:
            measure(model, flags.image_size, flags.repeats)
