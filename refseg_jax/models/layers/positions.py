"""Fixed position embeddings, as NumPy constants."""

import functools
import math

import numpy as np


@functools.cache
def sine_positions(height: int, width: int, dim: int, temperature: float = 1e4) -> np.ndarray:
    """Two-dimensional sine positions of DETR: float32 [height * width, dim], row by row.

    The first half of the channels encodes y, the second x. A coordinate is counted from 1 and
    scaled so that the last one is 2 pi; sines and cosines alternate, with wavelengths growing
    geometrically up to `temperature`.

    Raises:
        ValueError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine positions need a width that is a multiple of 4, not {dim}")
    frequency = temperature ** (-np.arange(dim // 4) / (dim // 4))

    def encode(size: int) -> np.ndarray:
        coordinate = 2 * math.pi * np.arange(1, size + 1) / size
        angle = coordinate[:, None] * frequency
        return np.stack([np.sin(angle), np.cos(angle)], axis=-1).reshape(size, dim // 2)

    y, x = encode(height), encode(width)
    grid = np.concatenate([np.repeat(y, width, axis=0), np.tile(x, (height, 1))], axis=-1)
    return grid.astype(np.float32)
