"""BERT (Devlin et al., 2019), usable by ranges of layers.

Parameters are float32; matrix products run in `dtype`; norms, attention logits and softmax are
computed in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from refseg_jax.errors import UserError
from refseg_jax.models.layers.activations import gelu
from refseg_jax.models.layers.dense import Dense

_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Hyperparameters; the defaults are BERT-base, uncased.

    Attributes:
        vocab_size: rows of the word table.
        hidden: language width D.
        layers: number of transformer layers.
        heads: attention heads.
        intermediate: hidden width of the feed-forward.
        max_positions: rows of the position table, the longest sequence.
        type_vocab: rows of the segment table; only the first is used.
        dropout: rate after the embeddings, on attention weights and on both residual branches.
        eps: of the layer norms.
        remat: recompute each layer in the backward pass instead of storing its activations.
    """

    vocab_size: int = 30522
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 3072
    max_positions: int = 512
    type_vocab: int = 2
    dropout: float = 0.1
    eps: float = 1e-12
    remat: bool = False

    def __post_init__(self):
        if self.heads < 1 or self.hidden % self.heads:
            raise UserError(
                f"config.model.bert.heads={self.heads} do not divide hidden={self.hidden}"
            )


def _norm(config: BertConfig, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(config.eps, dtype, use_fast_variance=False, name=name)


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings, normalised: tokens [B, T] -> [B, T, D]."""

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        c = self.config
        # In float32: a dtype would convert whole tables to pick some rows.
        embed = functools.partial(nn.Embed, features=c.hidden, embedding_init=_INIT)
        x = embed(c.vocab_size, name="word")(tokens)
        x += embed(c.max_positions, name="position")(jnp.arange(tokens.shape[1]))
        x += embed(c.type_vocab, name="type")(jnp.zeros((), jnp.int32))
        x = _norm(c, self.dtype, "norm")(x)
        return nn.Dropout(c.dropout, deterministic=not train)(x)


class MemoryAttention(nn.Module):
    """Few tokens attend to many rows of a memory, whose keys and values are never made.

    A query times W_k x + b_k is (W_k^T times the query) times x, and a number for all x, which the
    softmax takes away; the average of W_v x + b_v is W_v times that of x, and b_v. Parameters
    `kernel` [C, 2 D], `bias` [2 D] are those of one linear layer for keys and values.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, q: jax.Array, memory: jax.Array, dropout: nn.Dropout) -> jax.Array:
        """q [B, T, heads, d], memory [B, S, C] -> [B, T, heads, d]; `dropout` of the weights."""
        *_, heads, d = q.shape
        kernel = self.param("kernel", _INIT, (memory.shape[-1], 2 * heads * d))
        bias = self.param("bias", nn.initializers.zeros, (2 * heads * d,))
        of_key, of_value = jnp.moveaxis(kernel.astype(self.dtype).reshape(-1, 2, heads, d), 1, 0)
        shift = bias.reshape(2, heads, d)[1]
        asked = jnp.einsum("bqhd,chd->bhqc", q, of_key)
        logits = jnp.einsum("bhqc,bsc->bhqs", asked, memory, preferred_element_type=jnp.float32)
        weights = dropout(jax.nn.softmax(logits * d**-0.5))
        dropped = dropout.rate and not dropout.deterministic
        total = weights.sum(-1).mT[..., None] if dropped else 1.0  # Of the weights that are left.
        gathered = jnp.einsum("bhqs,bsc->bhqc", weights.astype(self.dtype), memory)
        return jnp.einsum("bhqc,chd->bqhd", gathered, of_value) + (total * shift).astype(self.dtype)


class BertLayer(nn.Module):
    """Post-norm attention and feed-forward.

    `__call__(x [B, T, D], token_mask bool [B, T], train) -> [B, T, D]`: only tokens under the mask
    are attended to. With `memory` [B, S, C] the tokens attend to its rows instead, to all of them,
    and `token_mask` plays no part: CrossVLT's fusion layer.
    """

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, token_mask: jax.Array, train: bool, memory: jax.Array | None = None
    ) -> jax.Array:
        c = self.config
        B, T, D = x.shape
        d = D // c.heads
        dense = functools.partial(Dense, dtype=self.dtype, kernel_init=_INIT)
        dropout = nn.Dropout(c.dropout, deterministic=not train)

        def heads(y: jax.Array, parts: int) -> jax.Array:
            return jnp.moveaxis(y.reshape(*y.shape[:2], parts, c.heads, d), 2, 0)

        if memory is None:
            q, k, v = heads(dense(3 * D, name="qkv")(x), 3)
            logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
            # A finite minimum leaves a row of padding without any token uniform instead of NaN.
            lowest = jnp.finfo(jnp.float32).min
            logits = jnp.where(token_mask[:, None, None, :], logits * d**-0.5, lowest)
            weights = dropout(jax.nn.softmax(logits)).astype(self.dtype)
            y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        else:
            (q,) = heads(dense(D, name="query")(x), 1)
            y = MemoryAttention(self.dtype, name="key_value")(q, memory, dropout)
        y = y.reshape(B, T, D)
        x = _norm(c, self.dtype, "norm1")(x + dropout(dense(D, name="proj")(y)))

        y = dense(D, name="fc2")(gelu(dense(c.intermediate, name="fc1")(x)))
        return _norm(c, self.dtype, "norm2")(x + dropout(y))


class Bert(nn.Module):
    """The encoder, whole or by ranges of layers from inside another module.

    Parameters: `embeddings`, `blocks_{layer}`. The random stream "dropout" is needed when `train`
    and `config.dropout > 0`.
    """

    config: BertConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        layer = nn.remat(BertLayer, static_argnums=(3,)) if self.config.remat else BertLayer
        self.embeddings = BertEmbeddings(self.config, self.dtype)
        self.blocks = [layer(self.config, self.dtype) for _ in range(self.config.layers)]

    def embed(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """Token ids int32 [B, T], T at most `max_positions` -> embeddings [B, T, D]."""
        return self.embeddings(tokens, train)

    def layers(
        self, x: jax.Array, token_mask: jax.Array, start: int, stop: int, train: bool = False
    ) -> jax.Array:
        """Layers `start` to `stop` (exclusive) on x [B, T, D]; token_mask bool [B, T]."""
        for block in self.blocks[start:stop]:
            x = block(x, token_mask, train)
        return x

    def __call__(self, tokens: jax.Array, token_mask: jax.Array, train: bool = False) -> jax.Array:
        """Token ids int32 [B, T] and their mask bool [B, T] -> last layer's states [B, T, D]."""
        return self.layers(self.embed(tokens, train), token_mask, 0, self.config.layers, train)
