"""Normalisations over pixels, equal to PyTorch's in value and in running statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-5


def instance_norm(x: jax.Array) -> jax.Array:
    """Every channel of every sample to mean 0 and variance 1 over its pixels: [B,S,C] -> same.

    Nothing is learned. Computed in float32; the dtype of `x` is kept.
    """
    y = x.astype(jnp.float32)
    y = (y - y.mean(1, keepdims=True)) * jax.lax.rsqrt(y.var(1, keepdims=True) + EPSILON)
    return y.astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation over all but the last axis, in float32 inside.

    Parameters `scale`, `bias`; collection `batch_stats` with the running `mean`, `var`. As in
    PyTorch, and unlike `flax.linen.BatchNorm`, the running variance is the unbiased one. Under
    `jit` on a mesh the statistics are those of the whole batch.
    """

    momentum: float = 0.9  # PyTorch counts the other way: its 0.1.
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[..., C] -> same shape; with `train`, by the batch's statistics, which are recorded."""
        C = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (C,))
        bias = self.param("bias", nn.initializers.zeros, (C,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (C,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (C,))
        x = x.astype(jnp.float32)
        if train:
            others = tuple(range(x.ndim - 1))
            mean, var = x.mean(others), x.var(others)
            if not self.is_initializing():
                count = x.size // C
                unbiased = var * (count / max(count - 1, 1))
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    running.value = self.momentum * running.value + (1 - self.momentum) * new
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * jax.lax.rsqrt(var + EPSILON)
        return ((x - mean) * factor + bias).astype(self.dtype)
