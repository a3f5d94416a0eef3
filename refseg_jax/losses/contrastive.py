"""AlignFormer's cross-modal instance contrastive loss (section 3.3), per sample and in float32.

The pixel-text contrast beside it (eq. 8-9) is the binary cross-entropy of L_e . V_e:
`segmentation.sigmoid_bce`. CoupAlign's contrast of pixels with pixels is in pixel_contrast.py.
"""

import jax
import jax.numpy as jnp


def unit_length(x: jax.Array) -> jax.Array:
    """Every vector [..., C] to length 1, in float32 or x's wider type; a zero vector stays one."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


def cmic_loss(
    pixel_embedding: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    num_samples: int = 20,
) -> jax.Array:
    """Cross-modal instance contrast, eq. 10-12: float32 [B].

    Every false positive is pulled to M true negatives and every false negative to M true positives,
    by raw dot products: summed over the samples, averaged over the misclassified. A class without
    misclassified pixels or without samples adds 0.

    Args:
        pixel_embedding: V_e [B,S,C].
        logits: L_e . V_e of every pixel [B,S]; receives no gradient.
        labels: bool [B,S].
        key: draws the samples.
        num_samples: M.
    """
    # Paper leaves open: whether lambda_j carries gradient; here it is a weight and carries none.
    logits = jax.lax.stop_gradient(logits.astype(jnp.float32))

    def image_loss(key, pixels, logits, labels):
        predicted = logits > 0
        negative_key, positive_key = jax.random.split(key)
        false_positive = _pull(
            negative_key,
            pixels,
            wrong=predicted & ~labels,
            right=~predicted & ~labels,
            confidence=jax.nn.sigmoid(-logits),  # 1 - sigmoid(logits)
            num_samples=num_samples,
        )
        false_negative = _pull(
            positive_key,
            pixels,
            wrong=~predicted & labels,
            right=predicted & labels,
            confidence=jax.nn.sigmoid(logits),
            num_samples=num_samples,
        )
        return false_positive + false_negative

    keys = jax.random.split(key, len(labels))
    return jax.vmap(image_loss)(keys, pixel_embedding.astype(jnp.float32), logits, labels)


def _pull(
    key: jax.Array,
    pixels: jax.Array,
    wrong: jax.Array,
    right: jax.Array,
    confidence: jax.Array,
    num_samples: int,
) -> jax.Array:
    """One of eq. 10 and 11 for one image: pulls `wrong` pixels to samples of the `right` ones.

    `pixels` [S,C], `wrong` and `right` bool [S], `confidence` (lambda) [S] -> scalar.
    """
    # Paper leaves open: how samples are drawn. V_ej has no index i, so one draw per image, without
    # replacement, serves all misclassified pixels, and the pairs are one [S,M] product.
    indices, taken = draw_samples(key, right, num_samples)
    pairs = jax.nn.softplus(-(pixels @ pixels[indices].T))
    per_pixel = pairs @ jnp.where(taken, confidence[indices], 0)
    return jnp.where(wrong, per_pixel, 0).sum() / jnp.maximum(wrong.sum(), 1)


def draw_samples(key: jax.Array, member: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    """Draws up to `num` members uniformly, without replacement.

    Args:
        key: randomness.
        member: bool [S], what may be drawn.
        num: M; no more than S are drawn.

    Returns:
        indices: int32 [min(M, S)].
        taken: bool of the same shape; False where there were no members left.
    """
    order = jnp.where(member, jax.random.uniform(key, member.shape), -1)
    best, indices = jax.lax.top_k(order, min(num, len(member)))
    return indices, best >= 0
