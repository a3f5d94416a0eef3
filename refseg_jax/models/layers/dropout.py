"""Dropout whose random bits are a hash: of maps' pixels, and of attention weights in kernels."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


class Dropout(nn.Module):
    """Drops numbers with the probability `rate`, and divides the others by what is left of 1.

    `__call__(x [B,...,C], train) -> same`, with the random stream "dropout"; only if `train`. What
    `nn.Dropout` does, but for the bits: XLA computes them again in each operation that reads what
    was dropped, and those of JAX's generator cost as much as the products there (docs/scale.md).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or not self.rate:
            return x
        words = words_of(self.make_rng("dropout"), x.shape[:1])
        first, second = words.T.reshape(2, -1, *[1] * (x.ndim - 1))
        row = jnp.arange(math.prod(x.shape[1:-1]), dtype=jnp.int32).reshape(*x.shape[1:-1], 1)
        channel = jnp.arange(x.shape[-1], dtype=jnp.int32)
        return jnp.where(kept(self.rate, first, second, row, channel), x / (1 - self.rate), 0)


def words_of(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random words, of two of which `kept` makes all bits of a sample: int32 [*shape, 2]."""
    return jax.lax.bitcast_convert_type(jax.random.bits(key, (*shape, 2)), jnp.int32)


def kept(
    rate: float, first: jax.Array, second: jax.Array, row: jax.Array, column: jax.Array
) -> jax.Array:
    """Which numbers of rows and columns dropout keeps, by two words; all int32.

    The same whatever part of them is computed at a time, and on any device: each row's columns are
    counted from a random number, and each of the counts is mixed.
    """
    return _mixed((_mixed(row + first) ^ second) + column) >= round(rate * 2**32) - 2**31


def _mixed(x: jax.Array) -> jax.Array:
    """A hash of int32, "lowbias32" of Chris Wellons' Hash Prospector.

    Without its last step, which changes the lower half only: that decides next to nothing.
    """
    x = (x ^ jax.lax.shift_right_logical(x, 16)) * 0x7FEB352D
    return (x ^ jax.lax.shift_right_logical(x, 15)) * (0x846CA68B - 2**32)
