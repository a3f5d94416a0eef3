"""Attention inside windows of a map, as XLA compiles it well; on TPUs in window_kernel.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from refseg_jax.models.layers.window_kernel import attend_in_kernel, fits_kernel
from refseg_jax.models.layers.window_strip import APART
from refseg_jax.models.layers.windows import Windows, gather_windows, scatter_windows
from refseg_jax.sharding import on_gpus, on_gpus_with_cudnn


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
    bias: jax.Array,
    windows: Windows,
    cudnn: bool = False,
) -> jax.Array:
    """softmax(q k^T + bias) v of each head in each window, where neighbours see each other.

    The softmax is computed in float32. On a TPU, bfloat16 arrays that fill its registers go through
    a kernel, in which a window's logits never leave the chip, and on a GPU through cuDNN's if asked
    for; in all else they are rounded to the dtype of `q`. See `fits_kernel` and `fits_cudnn`.

    Args:
        q: [B,h·w,C], scaled; a map row by row, the channels of one head after those of another.
        k: as `q`.
        v: as `q`.
        padding: [2,C]: k and v of the cells that pad the map to whole windows.
        bias: float32 [heads,side²,side²].
        windows: those of the map.
        cudnn: whether cuDNN may do it.

    Returns:
        [B,h·w,C] in the dtype of `q`.
    """
    padding = padding.astype(q.dtype)
    cudnn = cudnn and fits_cudnn(q, bias)
    if not cudnn and fits_kernel(q, len(bias), windows):
        return jax.lax.platform_dependent(
            *(q, k, v, padding, bias),
            tpu=functools.partial(attend_in_kernel, windows=windows),
            default=functools.partial(attend_in_windows, windows=windows),
        )
    return attend_in_windows(q, k, v, padding, bias, windows, cudnn)


def attend_in_windows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    padding: jax.Array,
    bias: jax.Array,
    windows: Windows,
    cudnn: bool = False,
) -> jax.Array:
    """`window_attention` in XLA's operations, or what is done within a window in cuDNN's."""
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
    attended = (attend_in_cudnn if cudnn else attend)(q, k, v, bias, windows.regions())
    return scatter_windows(attended, windows)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, regions: np.ndarray | None
) -> jax.Array:
    """Attention inside windows [W,n,C] of cells; those of one region see each other.

    `bias` is float32 [heads,n,n], `regions` int [windows of one sample, n], or None for one region.
    """

    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], len(bias), -1).swapaxes(1, 2)

    form = _attend_on_gpu if on_gpus() else _attend
    y = form(by_head(q), by_head(k), by_head(v), bias, regions)
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
    logits = _biased(logits, bias, regions).astype(q.dtype)
    largest = logits.max(-1, keepdims=True).astype(jnp.float32)
    weights = jnp.exp(logits.astype(jnp.float32) - largest).astype(v.dtype)
    # The product with ones is the softmax's denominator.
    ones = jnp.ones_like(v[..., :1])
    y = jnp.matmul(weights, jnp.concatenate([v, ones], -1), preferred_element_type=jnp.float32)
    y, total = y[..., :-1], y[..., -1:]
    y = (y / total).astype(v.dtype)
    return y, (q, k, v, logits, largest + jnp.log(total), y)


def _biased(logits: jax.Array, bias: jax.Array, regions: np.ndarray | None) -> jax.Array:
    """Float32 logits [W,heads,n,n] with bias, and `APART` for cells of other regions."""
    if regions is None:
        return logits + bias
    regions = jnp.asarray(regions)
    same = regions[:, None, :, None] == regions[:, None, None, :]
    by_sample = logits.reshape(-1, len(regions), *logits.shape[1:])
    return (by_sample + bias + jnp.where(same, 0.0, APART)).reshape(logits.shape)


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


@jax.custom_vjp
def _attend_on_gpu(q, k, v, bias, regions):
    """`_attend` as XLA's GPU compiler does it with the least traffic.

    It has products and what follows them in kernels of their own, so nothing between the two is in
    float32; softmax and the gradient behind it are a kernel each.
    """
    return _attend_on_gpu_forward(q, k, v, bias, regions)[0]


def _attend_on_gpu_forward(q, k, v, bias, regions):
    logits = jnp.matmul(q, k.mT).astype(jnp.float32)
    logits = _biased(logits, jax.lax.optimization_barrier(bias), regions)
    weights = jax.lax.optimization_barrier(jax.nn.softmax(logits).astype(v.dtype))
    y = jnp.matmul(weights, v)
    return y, (q, k, v, weights, y)


def _attend_on_gpu_backward(saved, cotangent):
    q, k, v, weights, y = saved
    of_weights = jnp.matmul(cotangent, v.mT).astype(jnp.float32)
    mean = (cotangent.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1, keepdims=True)
    of_logits = (weights.astype(jnp.float32) * (of_weights - mean)).astype(q.dtype)
    # Without the barriers XLA would have these in float32, too.
    of_logits = jax.lax.optimization_barrier(of_logits)
    of_bias = of_logits.astype(jnp.float32).sum(0)
    of_v = jnp.matmul(weights.mT, cotangent)
    return jnp.matmul(of_logits, k), jnp.matmul(of_logits.mT, q), of_v, of_bias, None


_attend_on_gpu.defvjp(_attend_on_gpu_forward, _attend_on_gpu_backward)


# How many channels more a head has for the regions of a window, which are four at most: cuDNN takes
# them by the eight.
_MARKS = 8


def fits_cudnn(q: jax.Array, bias: jax.Array) -> bool:
    """Whether `attend_in_cudnn` takes arrays like `q` [..., C], on the devices in use."""
    heads, n, _ = bias.shape
    width = q.shape[-1] // heads
    return (
        (q.dtype == jnp.bfloat16 and n % 2 == 0)
        and (width % 8 == 0 and width + _MARKS <= 128)
        and on_gpus_with_cudnn()
    )


def attend_in_cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, regions: np.ndarray | None
) -> jax.Array:
    """`attend` in cuDNN's fused attention, with `bias` rounded to the dtype of `q`.

    A bias for each window would be as large as the logits, so all have one. What keeps regions
    apart is in the product of queries and keys: cells of one region have more in common, in
    further channels, of which each region has one.
    """
    heads = len(bias)

    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], heads, -1)

    q, k, v = map(by_head, (q, k, v))
    width = q.shape[-1]
    if regions is not None:
        local = np.stack([np.unique(row, return_inverse=True)[1] for row in regions])
        marks = jnp.asarray(local[:, :, None, None] == np.arange(_MARKS), q.dtype)

        def marked(x: jax.Array, marks: jax.Array) -> jax.Array:
            marks = jnp.tile(marks, (len(x) // len(regions), 1, heads, 1))
            return jnp.concatenate([x, marks], -1)

        q, k, v = marked(q, -APART * marks), marked(k, marks), marked(v, 0 * marks)
    if not jax.sharding.get_abstract_mesh().empty:
        # JAX refuses one that is divided by heads, as the optimiser's moments of its table may be.
        bias = jax.lax.with_sharding_constraint(bias, PartitionSpec())
    attended = jax.nn.dot_product_attention(
        q, k, v, bias.astype(q.dtype)[None], scale=1.0, implementation="cudnn"
    )
    return attended[..., :width].reshape(*attended.shape[:2], -1)
