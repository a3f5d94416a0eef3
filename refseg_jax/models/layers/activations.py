"""Activations that JAX computes more slowly or less exactly than the papers' code."""

import jax
import jax.numpy as jnp
import numpy as np


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x·Φ(x), in float32 inside; same shape and dtype as `x`.

    `jax.nn.gelu(approximate=False)` is built on erfc, which XLA computes at half the speed of erf.
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * np.float32(0.5**0.5)))).astype(x.dtype)
