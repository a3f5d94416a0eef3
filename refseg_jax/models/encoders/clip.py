"""CLIP (Radford et al., 2021): the encoder with a ResNet, and the text transformer.

The vision side is usable stage by stage like swin.py, the text side by ranges of layers like
bert.py. Parameters are float32; matrix products and convolutions run in `dtype`; norms, attention
logits and softmax are computed in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from refseg_jax.errors import UserError
from refseg_jax.models.encoders.resnet import ResNet, ResNetConfig
from refseg_jax.models.layers.attention_kernel import self_attention
from refseg_jax.models.layers.conv import ConvNorm
from refseg_jax.models.layers.dense import Dense
from refseg_jax.models.layers.layer_norm import LayerNorm
from refseg_jax.models.layers.resize import resize_bicubic

_norm = functools.partial(LayerNorm, 1e-5)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig(ResNetConfig):
    """Hyperparameters on top of ResNetConfig's; the defaults are CLIP's ResNet-101.

    ResNet-50 has depths (3, 4, 6, 3) and embed_dim 1024.

    Attributes:
        pool: whether there is an attention pool after the last stage.
        embed_dim: width of the space that images and texts share, in which the pool ends.
        pool_grid: side of the grid of positions that the pool learns: the input size of the
            pretraining over 32. They are resized to the map at hand.
    """

    variant: str = "clip"
    pool: bool = True
    embed_dim: int = 512
    pool_grid: int = 7

    @property
    def pool_heads(self) -> int:
        """Attention heads of the pool, 64 channels each."""
        return max(1, self.widths[-1] // 64)


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Hyperparameters; the defaults are those beside CLIP's ResNet-101.

    Beside ResNet-50, embed_dim is 1024.

    Attributes:
        vocab_size: rows of the word table.
        hidden: language width D. The feed-forward is four times as wide.
        layers: number of transformer layers.
        heads: attention heads.
        max_positions: rows of the position table, the longest sequence.
        embed_dim: width of the space that images and texts share.
        remat: recompute each layer in the backward pass instead of storing its activations.
    """

    vocab_size: int = 49408
    hidden: int = 512
    layers: int = 12
    heads: int = 8
    max_positions: int = 77
    embed_dim: int = 512
    remat: bool = False

    def __post_init__(self):
        if self.heads < 1 or self.hidden % self.heads:
            raise UserError(
                f"config.model.text.heads={self.heads} do not divide hidden={self.hidden}"
            )


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both encoders; the defaults are CLIP's ResNet-101."""

    vision: ClipVisionConfig = ClipVisionConfig()
    text: ClipTextConfig = ClipTextConfig()


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * nn.sigmoid(1.702 * x)


class AttentionPool(nn.Module):
    """CLIP's attention pool, kept spatial as CRIS has it: [B, h, w, C] -> [B, h, w, embed_dim].

    CLIP asks once, with the mean of the cells; here every cell asks. Its result is added to a 1x1
    convolution of the input (`connect`, not in CLIP's checkpoints) and rectified. Row 0 of
    `positions` is the mean's, which has no place here; published checkpoints contain it.
    """

    embed_dim: int
    grid: int
    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        B, h, w, C = x.shape
        shape = (1 + self.grid**2, C)
        table = self.param("positions", nn.initializers.normal(C**-0.5), shape)[1:]
        table = resize_bicubic(table.reshape(1, self.grid, self.grid, C), (h, w))
        cells = (x + table.astype(x.dtype)).reshape(B, h * w, C)

        def dense(width: int, name: str) -> Dense:
            init = nn.initializers.normal(C**-0.5)
            return Dense(width, dtype=self.dtype, kernel_init=init, name=name)

        query, key, value = (dense(C, name)(cells) for name in ("query", "key", "value"))
        y = self_attention(query * (C / self.heads) ** -0.5, key, value, self.heads)
        y = dense(self.embed_dim, "out")(y.reshape(B, h, w, C))
        connect = ConvNorm(self.embed_dim, 1, dtype=self.dtype, name="connect")
        return nn.relu(y + connect(x, train))


class ClipVision(ResNet):
    """CLIP's ResNet; parameters as there, and `attention_pool`."""

    config: ClipVisionConfig

    def setup(self) -> None:
        super().setup()
        c = self.config
        if c.pool:
            self.attention_pool = AttentionPool(c.embed_dim, c.pool_grid, c.pool_heads, self.dtype)

    def pool(self, x: jax.Array, train: bool = False) -> jax.Array:
        """The last stage's output [B, h, w, widths[-1]] -> [B, h, w, embed_dim]."""
        return self.attention_pool(x, self._by_batch(train))

    def __call__(self, image: jax.Array, train: bool = False) -> list[jax.Array]:
        """Image [B, H, W, 3] -> each stage's output, strides 4 · 2^i; then the pool's, if any."""
        features = super().__call__(image, train)
        return [*features, self.pool(features[-1], train)] if self.config.pool else features


class ClipTextLayer(nn.Module):
    """Pre-norm causal attention and feed-forward: [B, T, D] -> [B, T, D]."""

    config: ClipTextConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        D = x.shape[-1]
        # The deviations that CLIP starts from.
        inner, outer = D**-0.5, (2 * c.layers * D) ** -0.5

        def dense(width: int, deviation: float, name: str) -> Dense:
            init = nn.initializers.normal(deviation)
            return Dense(width, dtype=self.dtype, kernel_init=init, name=name)

        x, y = _norm(self.dtype, name="norm1")(x, keep=True)
        q, k, v = jnp.split(dense(3 * D, inner, "qkv")(y), 3, -1)
        y = self_attention(q * (D / c.heads) ** -0.5, k, v, c.heads, causal=True)
        x = x + dense(D, outer, "proj")(y)

        x, y = _norm(self.dtype, name="norm2")(x, keep=True)
        y = dense(4 * D, (2 * D) ** -0.5, "fc1")(y)
        return x + dense(D, outer, "fc2")(_quick_gelu(y))


class ClipText(nn.Module):
    """The text transformer, whole or by ranges of layers from inside another module.

    Parameters: `word`, `positions`, `blocks_{layer}`, `norm`, `projection`. Attention is causal, so
    that padding, which comes last, is seen by padding alone.
    """

    config: ClipTextConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        layer = nn.remat(ClipTextLayer) if c.remat else ClipTextLayer
        normal = nn.initializers.normal
        # CLIP starts from deviations of 0.02 and 0.01, which the first layer's outputs drown: from
        # scratch, words and their order were learned later.
        # In float32: a dtype would convert the whole table to pick some rows.
        self.word = nn.Embed(c.vocab_size, c.hidden, embedding_init=normal(1.0))
        self.positions = self.param("positions", normal(0.5), (c.max_positions, c.hidden))
        self.blocks = [layer(c, self.dtype) for _ in range(c.layers)]
        self.norm = _norm(self.dtype)
        self.projection = self.param("projection", normal(c.hidden**-0.5), (c.hidden, c.embed_dim))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Token ids int32 [B, T], T at most `max_positions` -> embeddings [B, T, D]."""
        return (self.word(tokens) + self.positions[: tokens.shape[1]]).astype(self.dtype)

    def layers(self, x: jax.Array, start: int, stop: int) -> jax.Array:
        """Layers `start` to `stop` (exclusive) on x [B, T, D]."""
        for block in self.blocks[start:stop]:
            x = block(x)
        return x

    def sentence(self, words: jax.Array, token_mask: jax.Array) -> jax.Array:
        """Words [B, T, D] after the last norm, token_mask bool [B, T] -> [B, embed_dim].

        The last real token sees the whole text: CLIP's end mark, which CLIP finds as the largest id
        in the row. Counted by the mask it may have any id.
        """
        last = jnp.maximum(token_mask.sum(-1) - 1, 0)
        state = jnp.take_along_axis(words, last[:, None, None], 1)[:, 0]
        return state @ self.projection.astype(self.dtype)

    def __call__(self, tokens: jax.Array, token_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token ids int32 [B, T], their mask bool [B, T] -> words [B, T, D], sentence [B, E]."""
        words = self.norm(self.layers(self.embed(tokens), 0, self.config.layers))
        return words, self.sentence(words, token_mask)


class Clip(nn.Module):
    """Both encoders, `vision` and `text`: what one checkpoint holds."""

    config: ClipConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        self.vision = ClipVision(self.config.vision, self.dtype)
        self.text = ClipText(self.config.text, self.dtype)

    def __call__(
        self, image: jax.Array, tokens: jax.Array, token_mask: jax.Array, train: bool = False
    ) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        """What the two give: features, words, sentence."""
        return self.vision(image, train), *self.text(tokens, token_mask)
