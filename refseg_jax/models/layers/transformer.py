"""Transformer blocks, post-norm unless said otherwise."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.models.layers.attention import MultiHeadAttention
from refseg_jax.models.layers.dropout import Dropout
from refseg_jax.models.layers.mlp import MLP


class AddNorm(nn.Module):
    """The end of a post-norm block: `LayerNorm(x + dropout(update))`, shapes as they come in."""

    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, update: jax.Array, train: bool = False) -> jax.Array:
        update = Dropout(self.dropout)(update, train)
        return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x + update)


class FeedForward(nn.Module):
    """Post-norm feed-forward block, `dim -> ffn_dim -> dim` with ReLU: [B,N,dim] -> [B,N,dim]."""

    dim: int
    ffn_dim: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        mlp = MLP((self.ffn_dim, self.dim), dropout=self.dropout, dtype=self.dtype, name="mlp")
        return AddNorm(self.dropout, self.dtype, name="end")(x, mlp(x, train), train)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, each ended by `AddNorm` (Vaswani et al.).

    With `pre_norm` each starts with a LayerNorm instead, and what it adds to is not normalised:
    queries keep what tells them apart. Positions are added to queries and keys, never to values.
    """

    dim: int
    heads: int
    ffn_dim: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    pre_norm: bool = False

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        memory: jax.Array,
        query_positions: jax.Array | float = 0.0,
        key_positions: jax.Array | float = 0.0,
        memory_mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Updates `queries` [B,N,dim] from each other and from `memory` [B,S,dim].

        Args:
            queries: [B,N,dim].
            memory: [B,S,dim], for instance the pixels of one feature map.
            query_positions: broadcastable to `queries`; 0 for none.
            key_positions: broadcastable to `memory`; 0 for none.
            memory_mask: bool [B,S], True = real.
            train: turns dropout on.
        """

        def block(x: jax.Array, name: str, update: Callable[[jax.Array], jax.Array]) -> jax.Array:
            if not self.pre_norm:
                end = AddNorm(self.dropout, self.dtype, name=f"{name}_end")
                return end(x, update(x), train)
            norm = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=f"{name}_norm")
            return x + Dropout(self.dropout)(update(norm(x)), train)

        def attention(name: str) -> MultiHeadAttention:
            return MultiHeadAttention(self.dim, self.heads, self.dtype, name=name)

        def from_each_other(x: jax.Array) -> jax.Array:
            asking = x + query_positions
            return attention("self_attention")(asking, asking, x)

        def from_memory(x: jax.Array) -> jax.Array:
            keys = memory + key_positions
            return attention("cross_attention")(x + query_positions, keys, memory, memory_mask)

        x = block(queries, "self_attention", from_each_other)
        x = block(x, "cross_attention", from_memory)
        if not self.pre_norm:
            ends = (self.dim, self.ffn_dim, self.dropout, self.dtype)
            return FeedForward(*ends, name="feed_forward")(x, train)
        widths = (self.ffn_dim, self.dim)
        mlp = MLP(widths, dropout=self.dropout, dtype=self.dtype, name="feed_forward")
        return block(x, "feed_forward", lambda y: mlp(y, train))
