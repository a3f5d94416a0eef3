"""Losses of masks, per sample and in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.errors import UserError


def sigmoid_bce(logits: jax.Array, target: jax.Array, weight: jax.Array | None = None) -> jax.Array:
    """Binary cross-entropy, averaged over everything but the batch: float32 [B].

    Args:
        logits: [B,...], foreground where > 0.
        target: bool [B,...].
        weight: [B,...] of each pixel in the average; a sample of no weight has loss 0.
    """
    logits = logits.astype(jnp.float32)
    loss = jax.nn.softplus(jnp.where(target, -logits, logits))
    pixels = tuple(range(1, loss.ndim))
    if weight is None:
        return loss.mean(pixels)
    total = weight.sum(pixels, dtype=jnp.float32)
    return (weight * loss).sum(pixels) / jnp.where(total == 0, 1, total)


def two_class_loss(
    logits: jax.Array, mask: jax.Array, valid: jax.Array, weights: tuple[float, float]
) -> jax.Array:
    """Cross-entropy of background and foreground with class weights: float32 scalar.

    The average is weighted over the pixels of the whole batch, as in PyTorch: an image counts by
    the weight of its pixels.

    Args:
        logits: [B,h,w], foreground's minus background's.
        mask: bool [B,h,w].
        valid: bool [B], the rows that count.
        weights: of a background and of a foreground pixel.
    """
    weight = jnp.where(mask, weights[1], weights[0]) * valid[:, None, None]
    return sigmoid_bce(logits[None], mask[None], weight[None])[0]


def check_class_weights(weights: tuple[float, ...]) -> None:
    """Raises a UserError where config.model.class_weights are not what `two_class_loss` takes."""
    if len(weights) != 2 or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise UserError(
            f"config.model.class_weights={weights} are not two weights, of a background and of a "
            "foreground pixel, one of them at least above 0"
        )


def majority_downsample(mask: jax.Array, factor: int = 4) -> jax.Array:
    """Labels of a grid `factor` times coarser, by majority: bool [B,H,W] -> [B,h,w].

    h = ceil(H / factor), w = ceil(W / factor): blocks at the right and bottom border may have fewer
    pixels. Of a tie the foreground, the rarer class, gets the block.
    """

    def cells(pixels: int) -> np.ndarray:
        """[pixels, cells], 1 where a pixel is of a cell."""
        of_cell = np.arange(pixels)[:, None] // factor == np.arange(-(-pixels // factor))
        return of_cell.astype(np.float32)

    # Products: to add up neighbours a TPU would move each pixel. Where it rounds to bfloat16 counts
    # of up to 256 pixels, so of a column of a cell, are exact.
    height, width = (cells(n) for n in mask.shape[1:])
    columns = jnp.einsum("bHW,Hh->bhW", mask.astype(jnp.float32), height)
    pixels = np.outer(height.sum(0), width.sum(0))  # Of each cell.
    if (pixels == factor**2).all():
        pixels = factor**2
    return 2 * jnp.einsum("bhW,Ww->bhw", columns, width) >= pixels


def nearest_downsample(mask: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Labels of a coarser grid, cell i's of pixel floor(i H / h): bool [B,H,W] -> [B,h,w]."""

    def picked(pixels: int, cells: int) -> np.ndarray:
        """[cells, pixels], 1 where a pixel is a cell's."""
        chosen = np.arange(cells)[:, None] * pixels // cells
        return (chosen == np.arange(pixels)).astype(np.float32)

    # Products, as for majorities; of ones and zeros with a single one in a row, so exact.
    rows, columns = (picked(*n) for n in zip(mask.shape[1:], size, strict=True))
    rows = jnp.einsum("hH,bHW->bhW", rows, mask.astype(jnp.float32))
    return jnp.einsum("wW,bhW->bhw", columns, rows) > 0.5


def masked_mean(per_sample: jax.Array, valid: jax.Array) -> jax.Array:
    """Mean of `per_sample` [B] over the rows where `valid` bool [B]; 0 when there are none."""
    return jnp.where(valid, per_sample, 0).sum() / jnp.maximum(valid.sum(), 1)
