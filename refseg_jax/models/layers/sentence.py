"""One vector for a whole expression."""

import jax
import jax.numpy as jnp

SENTENCES = ("cls", "mean")
CLIP_SENTENCES = ("eot", "mean")  # Of CLIP's text encoder, which has the end mark's state itself.


def sentence_vector(language: jax.Array, token_mask: jax.Array, kind: str) -> jax.Array:
    """Word features [B,T,D] under token_mask bool [B,T] -> [B,D].

    `kind`, one of SENTENCES: the first token, which is [CLS], or the mean of all real ones.
    """
    if kind == "cls":
        return language[:, 0]
    weight = token_mask / jnp.maximum(token_mask.sum(1, keepdims=True), 1)
    return jnp.einsum("btd,bt->bd", language, weight)
