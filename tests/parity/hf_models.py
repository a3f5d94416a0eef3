"""Hugging Face reference models, and ours, with weights that let a mistake show."""

import jax
import numpy as np
import torch
from flax import linen
from torch import nn


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, in place: matrices of fan-in scale, nothing at 0 or 1, strong position bias.

    Freshly initialised models have zero biases and unit norms, which hide a swapped or dropped one.
    Running statistics of batch norms are redrawn too.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("relative_position_bias_table"):
                parameter.copy_(0.5 * noise)
            elif "embeddings.weight" in name:
                parameter.copy_(noise)
            elif parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(0.1 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def random_params(module: linen.Module, *inputs) -> dict:
    """Random parameters of one of our modules, without compiling its initialisers."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), shapes)


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """A state dict (or gradients by name) as numpy arrays."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def relative_error(ours, theirs: torch.Tensor) -> float:
    """Largest difference, in units of the reference's largest magnitude."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())
