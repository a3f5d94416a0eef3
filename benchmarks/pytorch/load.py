"""Our Flax variables in PyTorch modules whose submodules bear our names."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flax import traverse_util

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def load(module: torch.nn.Module, variables: Mapping[str, Any]) -> None:
    """Copies `variables` (params and, where there are any, batch_stats) into `module`.

    Kernels [..., in, out] become weights [out, in, ...]. Axes of length 1 may differ, so a linear
    layer may be a 1x1 convolution. Other leaves keep their shapes.

    Raises:
        RuntimeError: a tensor of `module` is missing, left over, or of another shape.
    """
    expected = module.state_dict()
    state = {name: expected[name] for name in expected if name.endswith("num_batches_tracked")}
    for collection in variables.values():
        for path, leaf in traverse_util.flatten_dict(dict(collection)).items():
            array = np.asarray(leaf)
            if path[-1] == "kernel":
                array = array.transpose(-1, -2, *range(array.ndim - 2))
            name = ".".join((*path[:-1], _LEAVES.get(path[-1], path[-1])))
            shape = expected[name].shape if name in expected else array.shape
            if [n for n in shape if n > 1] == [n for n in array.shape if n > 1]:
                array = array.reshape(shape)
            state[name] = torch.tensor(array)
    module.load_state_dict(state)
