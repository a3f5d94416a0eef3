"""A model that compiles in a second: for tests of what surrounds training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from refseg_jax.models.alignformer import AlignFormer


class Toy(nn.Module):
    """Has what divides badly: batch statistics, dropout, and a loss that draws per pixel."""

    config: AlignFormer.Config
    dtype: jnp.dtype = jnp.float32
    Config = AlignFormer.Config

    @nn.compact
    def __call__(self, image, tokens, token_mask, train=False):
        width = self.config.dim // 2
        # No bias: batch norm takes it away again, and Adam would make steps of rounding.
        x = nn.Conv(width, (4, 4), (4, 4), use_bias=False)(image)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        words = nn.Embed(self.config.bert.vocab_size, width)(tokens) * token_mask[..., None]
        x = nn.Dropout(0.1, deterministic=not train)(x * (1 + words.sum(1)[:, None, None]))
        logits = nn.Dense(1)(x)[..., 0]
        if train:
            return {"logits": logits}
        # Scores must be equal to the last digit: whole numbers that no rounding can move.
        green = jnp.round((image[..., 1] * 0.224 + 0.456) * 255).astype(jnp.int32)
        return {"logits": jnp.where((green + tokens.sum(1)[:, None, None]) % 97 > 30, 4.0, -4.0)}

    def loss(self, outputs, mask, valid, key):
        losses = optax.sigmoid_binary_cross_entropy(outputs["logits"], mask[:, 2::4, 2::4])
        losses = losses * jax.random.uniform(key, losses.shape)
        return (losses.mean((1, 2)) * valid).sum() / valid.sum(), {}
