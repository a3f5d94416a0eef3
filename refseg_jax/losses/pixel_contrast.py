"""CoupAlign's auxiliary loss (section 3.4), per image and in float32.

Every foreground pixel is to resemble the mean of the foreground and no pixel of the background, and
the other way round. The sums of eq. 14-15 run over all foreground x background pairs, of which a
map of 112 x 112 has up to 39 million. `opposite_logsumexp` computes them exactly, in blocks of rows
that are computed again in the backward pass, so that memory grows with the pixels and not with
their pairs. TPUs have a kernel for it (contrast_kernel.py).
"""

import functools
import math

import jax
import jax.numpy as jnp

from refseg_jax.losses.contrast_kernel import contrast_in_kernel, fits_kernel
from refseg_jax.losses.contrastive import unit_length

_NO_PAIR = -1e30  # Its exponential is 0, and unlike infinity it can be subtracted from itself.


def pixel_contrast_loss(
    pixels: jax.Array,
    labels: jax.Array,
    temperature: float = 0.1,
    normalize: bool = True,
    block: int = 128,
) -> jax.Array:
    """Pixel contrast, eq. 14-16: float32 [B]; 0 for an image without foreground or background.

    The printed equations lack the logarithm of InfoNCE, which they cite; it is here. On a TPU,
    bfloat16 pixels that fill its registers go through a kernel, unless they keep their lengths.

    Args:
        pixels: Y_1 [B,S,C].
        labels: bool [B,S], True = foreground (or numbers, 0 = background).
        temperature: tau.
        normalize: scale the vectors to length 1 first. (Their class means are not scaled.)
        block: pixels whose pairs are in memory at a time.
    """
    labels = labels.astype(bool)
    plain = functools.partial(contrast, temperature=temperature, normalize=normalize, block=block)
    if normalize and fits_kernel(pixels, temperature):
        kernel = functools.partial(contrast_in_kernel, temperature=temperature)
        return jax.lax.platform_dependent(pixels, labels, tpu=kernel, default=plain)
    return plain(pixels, labels)


def contrast(
    pixels: jax.Array, labels: jax.Array, temperature: float, normalize: bool, block: int
) -> jax.Array:
    """`pixel_contrast_loss` in XLA's operations."""
    vectors = pixels.astype(jnp.promote_types(pixels.dtype, jnp.float32))
    if normalize:
        vectors = unit_length(vectors)
    vectors /= math.sqrt(temperature)  # Each product of two of them is over tau.
    member = jnp.stack([~labels, labels], axis=1)
    count = member.sum(2, keepdims=True)
    # [B,2,S]: 1/|N| in row 0, 1/|P| in row 1.
    share = (member / jnp.maximum(count, 1)).astype(vectors.dtype)
    prototypes = jnp.einsum("bks,bsc->bkc", share, vectors)
    similarity = jnp.einsum("bsc,bkc->bks", vectors, prototypes)
    own = jnp.where(labels, similarity[:, 1], similarity[:, 0])
    # -log(exp(own) / (exp(own) + sum of the others' exp)).
    per_pixel = jax.nn.softplus(opposite_logsumexp(vectors, labels, block) - own)
    total = jnp.einsum("bks,bs->b", share, per_pixel)
    return jnp.where((count > 0).all((1, 2)), total, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def opposite_logsumexp(vectors: jax.Array, labels: jax.Array, block: int) -> jax.Array:
    """Each pixel's log of the sum, over the pixels of the other class, of exp(its product with it).

    One pass over the rows of the rarer class and all columns gives both classes their sums, so at
    most half of the S x S products are computed, and as few as the rarest class allows.

    Args:
        vectors: float32 [B,S,C].
        labels: bool [B,S].
        block: rows per step; memory beside inputs and output is B x block x S.

    Returns:
        float32 [B,S]; 0 throughout an image of one class only.
    """
    return _forward(vectors, labels, block)[0]


def _rarer_first(labels: jax.Array, block: int) -> tuple[jax.Array, jax.Array, int, jax.Array]:
    """How the pairs are walked through: the pixels of each image's rarer class come first.

    Returns the order int32 [B,S], the rarer class's pixels int32 [B,1], the rows per step R, and
    the number of steps, an int32 scalar. No step leaves the map, as R is at most S / 2.
    """
    S = labels.shape[1]
    rows = min(block, max(S // 2, 1))
    rare = labels ^ (2 * labels.sum(1, keepdims=True) > S)
    number = rare.sum(1, keepdims=True)
    return jnp.argsort(~rare, axis=1), number, rows, (number.max() + rows - 1) // rows


def _reorder(x: jax.Array, order: jax.Array) -> jax.Array:
    """Pixels of x [B,S] or [B,S,C] in the given order [B,S]."""
    return jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)


def _pairs(vectors: jax.Array, number: jax.Array, start: jax.Array, rows: int):
    """Vectors of rows `start` on [B,R,C], and their products with all [B,R,S] where they pair."""
    mine = jax.lax.dynamic_slice_in_dim(vectors, start, rows, axis=1)
    row, column = start + jnp.arange(rows), jnp.arange(vectors.shape[1])
    paired = (row < number)[:, :, None] & (column >= number)[:, None]
    products = jnp.einsum("brc,bsc->brs", mine, vectors)
    return mine, jnp.where(paired, products, _NO_PAIR)


def _forward(vectors: jax.Array, labels: jax.Array, block: int):
    order, number, rows, steps = _rarer_first(labels, block)
    ordered = _reorder(vectors, order)

    def step(i, carry):
        of_rows, peak, total = carry
        _, pairs = _pairs(ordered, number, i * rows, rows)
        # A row's pairs are all here; a column's are summed up over the steps.
        here = jax.nn.logsumexp(pairs, axis=2)
        of_rows = jax.lax.dynamic_update_slice_in_dim(of_rows, here, i * rows, axis=1)
        higher = jnp.maximum(peak, pairs.max(1))
        total = total * jnp.exp(peak - higher) + jnp.exp(pairs - higher[:, None]).sum(1)
        return of_rows, higher, total

    zeros = jnp.zeros(labels.shape, vectors.dtype)
    of_rows, peak, total = jax.lax.fori_loop(0, steps, step, (zeros, zeros + _NO_PAIR, zeros))
    of_columns = peak + jnp.log(jnp.where(number > 0, total, 1))
    result = jnp.where(jnp.arange(labels.shape[1]) < number, of_rows, of_columns)
    result = jnp.where(number > 0, result, 0)
    return _reorder(result, jnp.argsort(order, axis=1)), (vectors, labels, result)


def _backward(block: int, residuals, cotangent: jax.Array):
    vectors, labels, result = residuals
    order, number, rows, steps = _rarer_first(labels, block)
    ordered, cotangent = _reorder(vectors, order), _reorder(cotangent, order)

    def step(i, gradient):
        def of_rows(x):
            return jax.lax.dynamic_slice_in_dim(x, i * rows, rows, axis=1)

        mine, pairs = _pairs(ordered, number, i * rows, rows)
        # A pair is a term of its row's sum and of its column's.
        weight = of_rows(cotangent)[..., None] * jnp.exp(pairs - of_rows(result)[..., None])
        weight += cotangent[:, None] * jnp.exp(pairs - result[:, None])
        gradient += jnp.einsum("brs,brc->bsc", weight, mine)
        updated = of_rows(gradient) + jnp.einsum("brs,bsc->brc", weight, ordered)
        return jax.lax.dynamic_update_slice_in_dim(gradient, updated, i * rows, axis=1)

    gradient = jax.lax.fori_loop(0, steps, step, jnp.zeros_like(ordered))
    return _reorder(gradient, jnp.argsort(order, axis=1)), None


opposite_logsumexp.defvjp(_forward, _backward)
