"""What our kernels for TPUs have in common."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

LANES = 128  # Of a register, and the channels that fill it.


def traced_once(*static: int) -> Callable:
    """Decorates what calls a kernel, whose arguments at `static` are no arrays.

    A model has many layers of the same shapes: their kernel is traced and lowered but once.
    """
    return functools.partial(jax.jit, static_argnums=static)


def product(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Sums over axis `of_a` of a matrix and `of_b` of another, float32."""
    dimensions = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
