"""1x1 convolutions behind which a batch norm comes, without the map between the two.

A product's mean and variance over all pixels follow from those of what goes in: with mean m and
covariance S of the C channels of x, those of x K are m K and the diagonal of K^T S K. So do the
norm's gradients. Where few channels go in and many come out, as at the end of a bottleneck, the
wide map is neither added up nor read again, and what comes out of the product is normalised at
once (docs/scale.md).
"""

import functools

import jax
import jax.numpy as jnp

from refseg_jax.models.layers.norms import EPSILON
from refseg_jax.sharding import divides_samples, kernel_places, on_tpus

_small = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def norm_by_inputs(x: jax.Array, dim: int, pixels: int = 1) -> bool:
    """Whether this is how a TPU computes the norm of a convolution of `x` to `dim` channels.

    The products of the channels that go in, and what follows from them, take less than what they
    spare: for few channels and many pixels.
    """
    B, h, w, C = x.shape
    few = pixels * dim >= 4 * C and x.dtype == jnp.bfloat16
    if not few or not on_tpus() or not divides_samples(B):
        return False
    devices = jax.sharding.get_abstract_mesh().size
    return B * h * w * pixels >= dim * devices


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def normed_pointwise(
    x: jax.Array, kernel: jax.Array, scale: jax.Array, bias: jax.Array, pixels: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The batch norm of x times `kernel`.

    Under `on_mesh`, on which B is a multiple of the devices: each does the small products by
    itself, which would else be divided among them, and gathered.

    Args:
        x: [B,h,w,pixels·C], with so many pixels side by side in its channels (see squares.py).
        kernel: float32 [C,D]; it is rounded to the dtype of `x`. Its gradient is the difference of
            sums that grow with the pixels, and is float32 all along.
        scale: of the norm, float32 [D].
        bias: [D].

    Returns:
        [B,h,w,pixels·D] in the dtype of `x`; and the mean and the biased variance of the product's
        channels, float32 [D], whose gradients are not taken. A variance that is small because
        channels cancel in the product loses about what rounding them to bfloat16 added to it.
    """
    return _forward(x, kernel, scale, bias, pixels)[0]


def _forward(x, kernel, scale, bias, pixels):
    samples, whole = kernel_places()
    count = x[..., 0].size * pixels

    def run(x, kernel):
        # Columns of ones, as a TPU takes several times as long for a sum that is no product.
        sums = _products(x, jnp.ones((*x.shape[:3], 8), x.dtype))[:, 0]
        sums = _of_pixels(sums, pixels), _of_one(_products(x, x), pixels)
        inner, square = (s / count for s in jax.lax.psum(sums, *samples))
        kernel = _rounded(kernel, x)
        along = _small(square - inner[:, None] * inner, kernel)
        variance = jnp.maximum((kernel * along).sum(0), 0.0)
        return inner, along, _small(inner, kernel), variance

    inner, along, mean, variance = jax.shard_map(
        run, in_specs=(samples, whole), out_specs=whole, check_vma=False
    )(x, kernel)
    inverse = jax.lax.rsqrt(variance + EPSILON)
    factor = scale * inverse
    y = _convolve(x, kernel, pixels) * jnp.tile(factor, pixels)
    y = (y + jnp.tile(bias - mean * factor, pixels)).astype(x.dtype)
    return (y, mean, variance), (x, kernel, scale, inner, along, mean, inverse)


def _backward(pixels, saved, cotangents):
    """That of the product is `factor` of_y + `slope` y + what is the same for all pixels."""
    samples, whole = kernel_places()
    count = saved[0][..., 0].size * pixels

    def run(of_y, x, kernel, scale, inner, along, mean, inverse):
        products = _of_one(_products(x, of_y), pixels)
        total = _of_pixels(of_y.astype(jnp.float32).sum((0, 1, 2)), pixels)
        kernel = _rounded(kernel, x)
        of_bias, with_y = jax.lax.psum((total, (kernel * products).sum(0)), *samples)
        of_scale = inverse * (with_y - mean * of_bias)
        factor = scale * inverse
        slope = -factor * inverse * of_scale / count
        # Parts of all devices' kernel, and the rest.
        of_kernel = (products - inner[:, None] * total) * factor, count * along * slope
        by_y = _rounded(kernel * factor, x).T
        by_x = _rounded(_small(kernel * slope, kernel.T), x)
        same = _small(of_bias / count, by_y) + _small(inner, by_x)
        of_x = _convolve(of_y, by_y, pixels) + _convolve(x, by_x, pixels) - jnp.tile(same, pixels)
        return of_x.astype(x.dtype), of_kernel[0][None], (of_kernel[1], of_scale, of_bias)

    of_x, parts, (rest, of_scale, of_bias) = jax.shard_map(
        run,
        in_specs=(samples, samples, *[whole] * 6),
        out_specs=(samples, samples, whole),
        check_vma=False,
    )(cotangents[0], *saved)
    return of_x, jax.lax.reduce_sum(parts, (0,)) + rest, of_scale, of_bias


normed_pointwise.defvjp(_forward, _backward)


def _convolve(x: jax.Array, kernel: jax.Array, pixels: int) -> jax.Array:
    """Every pixel of x [B,h,w,pixels·C] by `kernel` [C,D]: float32 [B,h,w,pixels·D].

    A convolution, as XLA lays out maps otherwise for a product.
    """
    kernel = kernel.astype(x.dtype)
    if pixels > 1:
        kernel = jnp.kron(jnp.eye(pixels, dtype=kernel.dtype), kernel)
    return jax.lax.conv_general_dilated(
        x,
        kernel[None, None],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=jnp.float32,
    )


def _rounded(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """As a product with `x` takes it, float32."""
    return kernel.astype(x.dtype).astype(jnp.float32)


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum over all pixels of channels of `a` times channels of `b`: float32 [C,D]."""
    return jnp.einsum("bhwc,bhwd->cd", a, b, preferred_element_type=jnp.float32)


def _of_one(matrix: jax.Array, pixels: int) -> jax.Array:
    """The sum over all pixels of what each has of its own: [pixels·C,pixels·D] -> [C,D]."""
    C, D = matrix.shape[0] // pixels, matrix.shape[1] // pixels
    return sum(matrix[i * C : (i + 1) * C, i * D : (i + 1) * D] for i in range(pixels))


def _of_pixels(vector: jax.Array, pixels: int) -> jax.Array:
    """[pixels·C] -> their sum [C]."""
    return vector.reshape(pixels, -1).sum(0)
