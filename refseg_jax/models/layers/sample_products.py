"""Products of maps with a matrix of each sample's own."""

import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.registers import LANES
from refseg_jax.sharding import divides_samples, kernel_places, on_tpus


def sample_products(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """x [B,h,w,C] times `matrices` [B,C,K]: float32 [B,K,h,w].

    On a TPU the gradient of x is a product with the matrices of all samples of a device, if their K
    fit its lanes together, where each has zeros for the others: XLA lays out what it multiplies by
    samples in another order than maps, and computes in passes of its own what it would else do with
    the product (docs/scale.md).
    """
    if x.dtype == jnp.bfloat16 and on_tpus() and divides_samples(len(x)):
        samples = len(x) // jax.sharding.get_abstract_mesh().size
        if samples * matrices.shape[-1] <= LANES:
            return with_gradients_by_all(x, matrices)
    return _products(x, matrices)


def _products(x: jax.Array, matrices: jax.Array) -> jax.Array:
    return jnp.einsum("bck,bhwc->bkhw", matrices, x, preferred_element_type=jnp.float32)


@jax.custom_vjp
def with_gradients_by_all(x: jax.Array, matrices: jax.Array) -> jax.Array:
    """`sample_products`, for whose gradients a device's samples have the matrices of all."""
    return _products(x, matrices)


def _forward(x, matrices):
    return _products(x, matrices), (x, matrices)


def _backward(saved, cotangent):
    samples, _ = kernel_places()

    def run(x, matrices, cotangent):
        B, C, K = matrices.shape
        all_of_them = matrices.transpose(0, 2, 1).reshape(B * K, C)
        # The sample's K among those of all, by a product, as a TPU would move lanes else.
        own = np.repeat(np.eye(B), K, axis=1)[:, None, None]
        copies = jnp.asarray(np.tile(np.eye(K), B), x.dtype)
        of_y = cotangent.astype(x.dtype).transpose(0, 2, 3, 1)
        of_all = _convolve(of_y, copies) * jnp.asarray(own, x.dtype)
        of_matrices = jnp.einsum("bhwc,bhwk->kc", x, of_all, preferred_element_type=jnp.float32)
        of_matrices = of_matrices.reshape(B, K, C).transpose(0, 2, 1)
        return _convolve(of_all, all_of_them), of_matrices.astype(matrices.dtype)

    return jax.shard_map(run, in_specs=samples, out_specs=samples, check_vma=False)(
        *saved, cotangent
    )


with_gradients_by_all.defvjp(_forward, _backward)


def _convolve(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x [B,h,w,C] times `matrix` [C,D], as a convolution, which keeps the order of a map."""
    return jax.lax.conv_general_dilated(
        x, matrix[None, None], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
