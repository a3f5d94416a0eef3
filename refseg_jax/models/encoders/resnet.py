"""ResNet (He et al., 2016) with bottleneck blocks, and CLIP's form of it, usable stage by stage.

The interface is that of swin.py. Stages begin with their stride, so nothing happens between them.
Arrays are channels-last, [B, h, w, C]. Parameters are float32; convolutions run in `dtype`; batch
norms are computed in float32.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from refseg_jax.errors import UserError
from refseg_jax.models.layers.average_pool import average_pool
from refseg_jax.models.layers.conv import ConvNorm
from refseg_jax.models.layers.positions import sine_positions
from refseg_jax.models.layers.squares import fits_pairs, image_to_squares, mean_of_squares
from refseg_jax.sharding import on_tpus

VARIANTS = ("v1.5", "v1", "clip")


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Hyperparameters; the defaults are ResNet-101. ResNet-50 has depths (3, 4, 6, 3).

    Attributes:
        width: channels of the stem; the first stage has four times as many, each later stage twice
            those of the one before.
        depths: blocks per stage. Their number is the number of stages.
        variant: where the stride of a stage lies. "v1.5": on the 3x3 convolution of its first block
            (torchvision, Hugging Face); "v1": on the first 1x1 (the paper, Caffe, Keras); "clip":
            on average pools before the last 1x1 and the shortcut, and the stem has three 3x3
            convolutions and an average pool instead of one 7x7 and a maximum pool.
        frozen_stats: normalise by the running statistics also in training, and leave them as they
            are; scales and biases are trained either way.
        positions: add sine positions to the stem's output. Published weights have none; a small
            encoder trained from scratch learns place words only with them.
        remat: recompute each block in the backward pass instead of storing its activations.
    """

    width: int = 64
    depths: tuple[int, ...] = (3, 4, 23, 3)
    variant: str = "v1.5"
    frozen_stats: bool = False
    positions: bool = False
    remat: bool = False

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise UserError(f"ResNet variant {self.variant!r} is not one of {', '.join(VARIANTS)}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage's output."""
        return tuple(4 * self.width * 2**i for i in range(len(self.depths)))

    @property
    def patch_size(self) -> int:
        """Stride of the first stage's output; that of stage i is 2^i times as long."""
        return 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with a residual: [B, h, w, C] -> [B, h', w', width].

    h', w' are h, w over `stride`, rounded up; down for the variant "clip". With `projected` the
    shortcut is a 1x1 convolution, else the identity. With `pairs`, which have no stride, it maps
    [B,h,w,2·C] to [B,h,w,2·width]: two pixels of a row are side by side in the channels.
    """

    width: int
    stride: int
    projected: bool
    variant: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, pairs: bool = False) -> jax.Array:
        def conv(dim: int, size: int, stride: int = 1, activation=None, *, name: str) -> Callable:
            layer = ConvNorm(dim, size, stride, activation, dtype=self.dtype, name=name)
            return functools.partial(layer, squares=(1, 2) if pairs else 1)

        pooled = self.variant == "clip" and self.stride == 2
        stride = 1 if pooled else self.stride
        first, second = (stride, 1) if self.variant == "v1" else (1, stride)

        y = conv(self.width // 4, 1, first, nn.relu, name="conv1")(x, train)
        y = conv(self.width // 4, 3, second, nn.relu, name="conv2")(y, train)
        if pooled:
            # XLA's gradient has more in it of the latter: the ReLU's, and the norm's sums.
            x, y = average_pool(x), nn.avg_pool(y, (2, 2), (2, 2))
        y = conv(self.width, 1, name="conv3")(y, train)
        if self.projected:
            x = conv(self.width, 1, stride, name="shortcut")(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The encoder, whole or stage by stage from inside another module.

    Parameters and `batch_stats`: `stem_{convolution}`, `blocks_{stage}_{block}`.
    """

    config: ResNetConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        conv = functools.partial(ConvNorm, activation=nn.relu, dtype=self.dtype)
        if c.variant == "clip":
            self.stem = [conv(c.width // 2, 3, 2), conv(c.width // 2, 3), conv(c.width, 3)]
        else:
            self.stem = [conv(c.width, 7, 2)]
        block = nn.remat(Bottleneck, static_argnums=(2, 3)) if c.remat else Bottleneck
        self.blocks = [
            [
                block(width, 2 if i and not j else 1, not j, c.variant, self.dtype)
                for j in range(depth)
            ]
            for i, (depth, width) in enumerate(zip(c.depths, c.widths, strict=True))
        ]

    def embed(self, image: jax.Array, train: bool = False) -> jax.Array:
        """The stem: image [B, H, W, 3] -> [B, ceil(H/4), ceil(W/4), width].

        The variant "clip" leaves out a last odd row and column: [B, floor(ceil(H/2)/2), ...].
        """
        clip, x, sides = self.config.variant == "clip", image, [1] * len(self.stem)
        by_squares = clip and on_tpus() and image.shape[1] % 4 == image.shape[2] % 4 == 0
        if by_squares:
            x, sides = image_to_squares(image.astype(self.dtype), 4), [4, 2, 2]
        for conv, side in zip(self.stem, sides, strict=True):
            x = conv(x, self._by_batch(train), side)
        if clip:
            x = mean_of_squares(x, 2) if by_squares else average_pool(x)
        else:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        if self.config.positions:
            x += jnp.asarray(sine_positions(*x.shape[1:]), x.dtype).reshape(x.shape[1:])
        return x

    def stage(self, i: int, x: jax.Array, train: bool = False) -> jax.Array:
        """Stage `i`, counted from 0: -> [B, h', w', widths[i]], half the map's size if i > 0."""
        B, h, w, C = x.shape
        pairs = i == 0 and on_tpus() and fits_pairs(w, self.config.width)
        x = x.reshape(B, h, w // 2, 2 * C) if pairs else x
        for block in self.blocks[i]:
            x = block(x, self._by_batch(train), pairs)
        return x.reshape(B, h, w, -1) if pairs else x

    def merge(self, i: int, x: jax.Array, train: bool = False) -> jax.Array:
        """What lies between stage `i` and the next: nothing, `x` as it is."""
        return x

    def __call__(self, image: jax.Array, train: bool = False) -> list[jax.Array]:
        """Image [B, H, W, 3] -> each stage's output, strides 4 · 2^i."""
        x = self.embed(image, train)
        features = []
        for i in range(len(self.config.depths)):
            x = self.stage(i, x, train)
            features.append(x)
        return features

    def _by_batch(self, train: bool) -> bool:
        return train and not self.config.frozen_stats
