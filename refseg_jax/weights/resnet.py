"""Published ResNets (torchvision, Hugging Face) -> our variables."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.models.encoders.resnet import ResNet, ResNetConfig
from refseg_jax.weights.tables import Modules, Table, convert_variables, shapes

# Spelled as torchvision does, and CLIP's code, which has three convolutions in the stem.
MODULES: Modules = {
    **{f"stem_{i}/conv": f"conv{i + 1}" for i in range(3)},
    **{f"stem_{i}/norm": f"bn{i + 1}" for i in range(3)},
    **{
        rf"blocks_{i}_(\d+)/{ours}": rf"layer{i + 1}.\1.{theirs}"
        for i in range(4)
        for ours, theirs in (
            (r"conv(\d)/conv", r"conv\2"),
            (r"conv(\d)/norm", r"bn\2"),
            ("shortcut/conv", "downsample.0"),
            ("shortcut/norm", "downsample.1"),
        )
    },
}

RESNET = Table(
    source="ResNet (torchvision or Hugging Face)",
    renames=(
        (r"^resnet\.", ""),
        (r"^embedder\.embedder\.convolution\.", "conv1."),
        (r"^embedder\.embedder\.normalization\.", "bn1."),
        *((rf"^encoder\.stages\.{i}\.layers\.", f"layer{i + 1}.") for i in range(4)),
        *((rf"\.layer\.{i}\.convolution\.", f".conv{i + 1}.") for i in range(3)),
        *((rf"\.layer\.{i}\.normalization\.", f".bn{i + 1}.") for i in range(3)),
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
    ),
    modules=MODULES,
    dropped=(
        r"num_batches_tracked$",  # a count that nothing reads
        r"^(fc|classifier\.1)\.",
    ),
)


def resnet_from_hf(state: Mapping[str, np.ndarray], config: ResNetConfig) -> dict[str, Any]:
    """Variables of `ResNet(config)` (params, batch_stats) from ResNetModel or torchvision's.

    With or without a classifier on it. Raises UserError as `convert_variables` does.
    """
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return convert_variables(state, shapes(ResNet(config), image), RESNET).tree
