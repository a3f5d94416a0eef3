"""DarkNet-53 (Redmon and Farhadi, 2018, table 1), usable stage by stage.

The interface is that of swin.py: four stages at strides 4, 8, 16, 32, a strided convolution between
them. Arrays are channels-last, [B, h, w, C]. Parameters are float32; convolutions run in `dtype`;
batch norms are computed in float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from refseg_jax.models.layers.conv import ConvNorm
from refseg_jax.models.layers.squares import image_to_squares
from refseg_jax.sharding import on_tpus

_leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.1)


@dataclasses.dataclass(frozen=True)
class DarkNetConfig:
    """Hyperparameters; the defaults are DarkNet-53.

    Attributes:
        width: channels of the first convolution; the first stage has four times as many, each
            later stage twice those of the one before.
        depths: residual blocks per stage. Their number is the number of stages. The one block at
            stride 2 belongs to the stem.
        frozen_stats: normalise by the running statistics also in training, and leave them as they
            are; scales and biases are trained either way.
        remat: recompute each block in the backward pass instead of storing its activations.
    """

    width: int = 32
    depths: tuple[int, ...] = (2, 8, 8, 4)
    frozen_stats: bool = False
    remat: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage's output."""
        return tuple(4 * self.width * 2**i for i in range(len(self.depths)))

    @property
    def patch_size(self) -> int:
        """Stride of the first stage's output; that of stage i is 2^i times as long."""
        return 4


class Residual(nn.Module):
    """1x1 convolution to half the channels, 3x3 back, and a residual: [B, h, w, C] -> same.

    Of squares of pixels, see ConvNorm, or of pixels: `squares` is 1.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, squares: int) -> jax.Array:
        C = x.shape[-1] // squares**2
        conv = functools.partial(ConvNorm, activation=_leaky_relu, dtype=self.dtype)
        y = conv(C // 2, 1, name="conv1")(x, train, squares)
        return x + conv(C, 3, name="conv2")(y, train, squares)


class DarkNet(nn.Module):
    """The encoder, whole or stage by stage from inside another module.

    Parameters and `batch_stats`: `stem_{layer}`, `blocks_{stage}_{block}`, `merges_{stage}`.
    """

    config: DarkNetConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        conv = functools.partial(ConvNorm, activation=_leaky_relu, dtype=self.dtype)
        block = nn.remat(Residual, static_argnums=(2, 3)) if c.remat else Residual
        self.stem = [
            conv(c.width, 3),
            conv(2 * c.width, 3, 2),
            block(self.dtype),
            conv(4 * c.width, 3, 2),
        ]
        self.blocks = [[block(self.dtype) for _ in range(depth)] for depth in c.depths]
        self.merges = [conv(width, 3, 2) for width in c.widths[1:]]

    def embed(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Image [B, H, W, 3] -> [B, ceil(H/4), ceil(W/4), widths[0]]."""
        x, sides = image, [1] * len(self.stem)
        if on_tpus() and image.shape[1] % 4 == image.shape[2] % 4 == 0:
            x, sides = image_to_squares(image.astype(self.dtype), 4), [4, 4, 2, 2]
        for layer, side in zip(self.stem, sides, strict=True):
            x = layer(x, self._by_batch(train), side)
        return x

    def stage(self, i: int, x: jax.Array, train: bool = False) -> jax.Array:
        """The blocks of stage `i`, counted from 0; shape [B, h, w, widths[i]] is kept."""
        for block in self.blocks[i]:
            x = block(x, self._by_batch(train), 1)
        return x

    def merge(self, i: int, x: jax.Array, train: bool = False) -> jax.Array:
        """After stage `i`, not the last: -> [B, ceil(h/2), ceil(w/2), widths[i + 1]]."""
        return self.merges[i](x, self._by_batch(train))

    def __call__(self, image: jax.Array, train: bool = False) -> list[jax.Array]:
        """Image [B, H, W, 3] -> each stage's output before the next stride, strides 4 · 2^i."""
        x = self.embed(image, train)
        features = []
        for i in range(len(self.config.depths)):
            x = self.stage(i, self.merge(i - 1, x, train) if i else x, train)
            features.append(x)
        return features

    def _by_batch(self, train: bool) -> bool:
        return train and not self.config.frozen_stats
