"""Dropout whose random bits are a hash: of maps' pixels, and of attention weights in kernels."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.errors import UserError


class Dropout(nn.Module):
    """Drops numbers with the probability `rate`, and divides the others by what is left of 1.

    `__call__(x [B,...,C], train) -> same`, with the random stream "dropout"; only if `train`. What
    `nn.Dropout` does at rates below 1, but for the bits: XLA computes them again in each operation
    that reads what was dropped, and those of JAX's generator cost as much as the products there
    (docs/scale.md).

    With `rectified` x goes through a ReLU first. The result tells the gradient all of it then: what
    was dropped, like what was negative, is 0 in it.
    """

    rate: float
    rectified: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or not self.rate:
            return nn.relu(x) if self.rectified else x
        words = words_of(self.make_rng("dropout"), x.shape[:1])
        if self.rectified:
            return _rectified(1 - self.rate, x, _kept(self.rate, x, words))
        return drop(self.rate, x, words)


def drop(rate: float, x: jax.Array, words: jax.Array) -> jax.Array:
    """x [B,...,C] as `Dropout` leaves it, by `words_of` the samples, int32 [B,2]."""
    return jnp.where(_kept(rate, x, words), x / (1 - rate), 0)


def _kept(rate: float, x: jax.Array, words: jax.Array) -> jax.Array:
    first, second = words.T.reshape(2, -1, *[1] * (x.ndim - 1))
    row = jnp.arange(math.prod(x.shape[1:-1]), dtype=jnp.int32).reshape(*x.shape[1:-1], 1)
    return kept(rate, first, second, row, jnp.arange(x.shape[-1], dtype=jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rectified(left: float, x: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep, nn.relu(x) / left, 0)


def _rectified_forward(left, x, keep):
    y = _rectified(left, x, keep)
    return y, y


def _rectified_backward(left, y, cotangent):
    return jnp.where(y > 0, cotangent / left, 0), None


_rectified.defvjp(_rectified_forward, _rectified_backward)


def check_rate(rate: float) -> None:
    """Raises a UserError if `rate`, of config.model.dropout, is none."""
    if not 0 <= rate < 1:
        raise UserError(f"config.model.dropout={rate} is not a rate from 0 to less than 1")


def words_of(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Two words for each sample, or head of one, whose bits `kept` makes: int32 [*shape, 2]."""
    return jax.lax.bitcast_convert_type(jax.random.bits(key, (*shape, 2)), jnp.int32)


def kept(
    rate: float, first: jax.Array, second: jax.Array, row: jax.Array, column: jax.Array
) -> jax.Array:
    """Which numbers of rows and columns dropout keeps, by two words: int32 -> bool, broadcast.

    The same whatever part of them is computed at a time, and on any device: each row's columns are
    counted from a random number, and each of the counts is mixed. Where those of two rows are close
    by chance, their bits are the same but shifted. 0 <= rate < 1.
    """
    return _mixed((_mixed(row + first) ^ second) + column) >= round(rate * 2**32) - 2**31


def _mixed(x: jax.Array) -> jax.Array:
    """A hash of int32, "lowbias32" of Chris Wellons' Hash Prospector.

    Without its last step, which changes the lower half only: that decides next to nothing in the
    end, and is mixed once more before.
    """
    x = (x ^ jax.lax.shift_right_logical(x, 16)) * 0x7FEB352D
    return (x ^ jax.lax.shift_right_logical(x, 15)) * (0x846CA68B - 2**32)
