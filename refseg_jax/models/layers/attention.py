"""Multi-head attention with separate query, key and value projections."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.models.layers.dense import Dense


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention of `heads` heads in a joint width `dim`.

    Logits and softmax are float32 whatever `dtype` is. A sample whose keys are all masked attends
    to all of them equally, so nothing turns into NaN.
    """

    dim: int
    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        key_mask: jax.Array | None = None,
    ) -> jax.Array:
        """`queries` [B,N,*], `keys` and `values` [B,T,*] -> [B,N,dim].

        Args:
            queries: what asks; its width is free, as are those of the other two.
            keys: what is compared with the queries.
            values: what is averaged.
            key_mask: bool [B,T], True = real key.

        Raises:
            ValueError: `dim` is not a multiple of `heads`.
        """
        if self.dim % self.heads:
            raise ValueError(f"attention width {self.dim} is not a multiple of {self.heads} heads")

        def project(x: jax.Array, name: str) -> jax.Array:
            x = _linear(self.dim, self.dtype, name)(x)
            return x.reshape(*x.shape[:2], self.heads, -1)

        attended = jax.nn.dot_product_attention(
            project(queries, "query"),
            project(keys, "key"),
            project(values, "value"),
            mask=None if key_mask is None else key_mask[:, None, None, :],
        )
        attended = attended.reshape(*attended.shape[:2], self.dim)
        return _linear(self.dim, self.dtype, "out")(attended)


def _linear(width: int, dtype: jnp.dtype, name: str) -> Dense:
    return Dense(width, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)
