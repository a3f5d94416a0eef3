"""Bilinear resizing as two small matrix products, which every accelerator does well."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def resize_bilinear(x: jax.Array, size: tuple[int, int], align_corners: bool = False) -> jax.Array:
    """Resizes `x` [B,h,w,C] or [B,h,w] to [B,*size,C] or [B,*size], in the dtype of `x`.

    Equals PyTorch's bilinear `interpolate` without antialiasing: pixel centres lie at i + 0.5, or,
    with `align_corners`, the centres of the corner pixels stay where they are.
    """
    _, h, w = x.shape[:3]

    def mix(spec: str, matrix: np.ndarray, x: jax.Array) -> jax.Array:
        # Interpolated values are part of the answer, so no reduced-precision passes.
        return jnp.einsum(spec, matrix.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)

    x = mix("Hh,bhw...->bHw...", _interpolation(h, size[0], align_corners), x)
    return mix("Ww,bHw...->bHW...", _interpolation(w, size[1], align_corners), x)


@functools.cache
def _interpolation(source: int, target: int, align_corners: bool) -> np.ndarray:
    """The matrix [target, source] that interpolates one axis linearly; rows sum to 1."""
    if align_corners:
        position = np.linspace(0, source - 1, target)
    else:
        position = (np.arange(target) + 0.5) * source / target - 0.5
    distance = np.abs(np.clip(position, 0, source - 1)[:, None] - np.arange(source))
    return np.maximum(0, 1 - distance).astype(np.float32)
