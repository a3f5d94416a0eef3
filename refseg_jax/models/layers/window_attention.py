"""Attention inside windows of a map, as XLA compiles it well; on TPUs in window_kernel.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.models.layers.window_kernel import attend_in_kernel, fits_kernel
from refseg_jax.models.layers.window_strip import APART
from refseg_jax.models.layers.windows import Windows, gather_windows, scatter_windows


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
    bias: jax.Array,
    windows: Windows,
) -> jax.Array:
    """softmax(q k^T + bias) v of each head in each window, where neighbours see each other.

    Logits and softmax are computed in float32. On a TPU, bfloat16 arrays that fill its registers go
    through a kernel, in which a window's logits never leave the chip; in all else they are kept in
    the dtype of `q`. See `fits_kernel`.

    Args:
        q: [B,h·w,C], scaled; a map row by row, the channels of one head after those of another.
        k: as `q`.
        v: as `q`.
        padding: [2,C]: k and v of the cells that pad the map to whole windows.
        bias: float32 [heads,side²,side²].
        windows: those of the map.

    Returns:
        [B,h·w,C] in the dtype of `q`.
    """
    padding = padding.astype(q.dtype)
    if fits_kernel(q, len(bias), windows):
        return jax.lax.platform_dependent(
            *(q, k, v, padding, bias),
            tpu=functools.partial(attend_in_kernel, windows=windows),
            default=functools.partial(attend_in_windows, windows=windows),
        )
    return attend_in_windows(q, k, v, padding, bias, windows)


def attend_in_windows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
    bias: jax.Array,
    windows: Windows,
) -> jax.Array:
    """`window_attention` in XLA's operations."""
    q, k, v = (gather_windows(x, windows) for x in (q, k, v))
    if windows.padded:
        outside = jnp.asarray(windows.cells() < 0)[:, :, None]
        padding = padding.astype(jnp.float32)  # Its gradient is a sum of many.
        k, v = (
            jnp.where(outside, p, x.reshape(-1, *outside.shape[:2], x.shape[-1]))
            .astype(x.dtype)
            .reshape(x.shape)
            for p, x in zip(padding, (k, v), strict=True)
        )
    return scatter_windows(attend(q, k, v, bias, windows.regions()), windows)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, regions: np.ndarray | None
) -> jax.Array:
    """Attention inside windows [W,n,C] of cells; those of one region see each other.

    `bias` is float32 [heads,n,n], `regions` int [windows of one sample, n], or None for one region.
    """

    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], len(bias), -1).swapaxes(1, 2)

    y = _attend(by_head(q), by_head(k), by_head(v), bias, regions)
    return y.swapaxes(1, 2).reshape(q.shape)


@jax.custom_vjp
def _attend(q, k, v, bias, regions):
    """The same of [W,heads,n,d].

    The traffic of the logits is most of what the attention costs. So they are kept in the dtype of
    `q`, and the backward pass is our own: it reads the logits, and neither they nor the weights
    are read just to be summed up.
    """
    return _attend_forward(q, k, v, bias, regions)[0]


def _attend_forward(q, k, v, bias, regions):
    logits = jnp.matmul(q, k.mT, preferred_element_type=jnp.float32)
    if regions is None:
        logits += bias
    else:
        regions = jnp.asarray(regions)
        same = regions[:, None, :, None] == regions[:, None, None, :]
        by_sample = logits.reshape(-1, len(regions), *logits.shape[1:])
        logits = (by_sample + bias + jnp.where(same, 0.0, APART)).reshape(logits.shape)
    logits = logits.astype(q.dtype)
    largest = logits.max(-1, keepdims=True).astype(jnp.float32)
    weights = jnp.exp(logits.astype(jnp.float32) - largest).astype(v.dtype)
    # The product with ones is the softmax's denominator.
    ones = jnp.ones_like(v[..., :1])
    y = jnp.matmul(weights, jnp.concatenate([v, ones], -1), preferred_element_type=jnp.float32)
    y, total = y[..., :-1], y[..., -1:]
    y = (y / total).astype(v.dtype)
    return y, (q, k, v, logits, largest + jnp.log(total), y)


def _attend_backward(saved, cotangent):
    q, k, v, logits, log_total, y = saved
    weights = jnp.exp(logits.astype(jnp.float32) - log_total)
    of_weights = jnp.matmul(cotangent, v.mT, preferred_element_type=jnp.float32)
    # sum_j weights_ij of_weights_ij, from the outputs.
    mean = (cotangent.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)
    of_logits = weights * (of_weights - mean)
    of_bias = of_logits.sum(0)
    of_logits = of_logits.astype(q.dtype)
    of_v = jnp.matmul(weights.astype(v.dtype).mT, cotangent)
    return jnp.matmul(of_logits, k), jnp.matmul(of_logits.mT, q), of_v, of_bias, None


_attend.defvjp(_attend_forward, _attend_backward)
