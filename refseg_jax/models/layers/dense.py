"""Linear layers, with what TPUs need to compute them and their gradients fast."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Dense(nn.Dense):
    """`nn.Dense` with the same fields and parameters, and the bias of `add_bias`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> [..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        y = x @ kernel
        if not self.use_bias:
            return y
        return add_bias(y, self.param("bias", self.bias_init, shape[1:], self.param_dtype))


class Weights(nn.Module):
    """The parameters of a `Dense` layer from C channels, for a product in which it is hidden.

    `__call__(C) -> (kernel [C, features], bias [features] or None)`, in `dtype`.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, C: int) -> tuple[jax.Array, jax.Array | None]:
        kernel = self.param("kernel", self.kernel_init, (C, self.features))
        kernel = kernel.astype(self.dtype)
        if not self.use_bias:
            return kernel, None
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return kernel, bias.astype(self.dtype)


class SplitDense(nn.Module):
    """`parts` dense layers of `features` whose parameters lie side by side in one `kernel`.

    `__call__(x [..., C]) -> parts x [..., features]`, and with `of_zeros` besides what they make of
    zeros, parts x [features]. On a TPU each is a product of its own, as splitting one result copies
    it; elsewhere the one product is faster.
    """

    parts: int
    features: int
    dtype: jnp.dtype = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array, of_zeros: bool = False) -> Any:
        width = self.parts * self.features
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], width)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (width,))
        y = split_dense(x.astype(self.dtype), kernel, bias, self.parts)
        if not of_zeros:
            return y
        return y, jnp.split(bias.astype(self.dtype), self.parts)


def split_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, parts: int) -> list[jax.Array]:
    """x [..., C] kernel [C, parts·F] + bias [parts·F], split along the last axis."""
    split = functools.partial(jnp.split, indices_or_sections=parts, axis=-1)
    return jax.lax.platform_dependent(
        *(x, kernel, bias),
        tpu=lambda x, k, b: [add_bias(x @ k, b) for k, b in zip(split(k), split(b), strict=True)],
        default=lambda x, k, b: split(add_bias(x @ k, b)),
    )


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """`x` [..., C] + `bias` [C], in the dtype of `x`.

    The bias's gradient is the sum of all rows. Of bfloat16 rows a TPU takes it as a product with
    ones, in a quarter of the time of XLA's reduction or less (docs/scale.md).
    """
    return x + bias.astype(x.dtype)


def _add_bias_forward(x, bias):
    return add_bias(x, bias), bias


def _add_bias_backward(bias, cotangent):
    def by_product(rows):
        # With a single row of ones XLA would make a reduction of it.
        ones = jnp.ones((8, *rows.shape[:-1]), rows.dtype)
        return jnp.tensordot(ones, rows, rows.ndim - 1, preferred_element_type=jnp.float32)[0]

    def by_sum(rows):
        dtype = jnp.promote_types(rows.dtype, jnp.float32)
        return rows.sum(tuple(range(rows.ndim - 1)), dtype)

    if cotangent.dtype == jnp.bfloat16:
        total = jax.lax.platform_dependent(cotangent, tpu=by_product, default=by_sum)
    else:
        total = by_sum(cotangent)
    return cotangent, total.astype(bias.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)
