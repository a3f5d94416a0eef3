"""JMCELN: "Referring Image Segmentation via Joint Mask Contextual Embedding Learning and
Progressive Alignment Network".

CLIP's encoders give maps of the image and a vector of the expression, which a neck multiplies. A
network of long and short relations (LSRAN) makes of them the first reasoning map. A cascade of
stages then lets a few learned embeddings gather from the map, and the map from the embeddings;
what the two maps before and after disagree on is damped (PAN). Sections, equations and tables are
the paper's.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.errors import UserError
from refseg_jax.losses.segmentation import two_class_loss
from refseg_jax.models.encoders.clip import ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from refseg_jax.models.encoders.swin import WindowAttention
from refseg_jax.models.layers.attention import MultiHeadAttention
from refseg_jax.models.layers.conv import ConvNorm
from refseg_jax.models.layers.decoder import class_difference
from refseg_jax.models.layers.dense import Dense
from refseg_jax.models.layers.depthwise import DepthwiseConv
from refseg_jax.models.layers.norms import EPSILON, BatchNorm, SwitchNorm
from refseg_jax.models.layers.resize import (
    doubled_conv,
    resize_bilinear,
    upsample,
    upsampled_conv,
)
from refseg_jax.models.layers.sentence import CLIP_SENTENCES, sentence_vector
from refseg_jax.sharding import on_tpus


@dataclasses.dataclass(frozen=True)
class JMCELNConfig:
    """Defaults are the paper's (section 4); fields marked "open" are where it is silent."""

    vision: ClipVisionConfig = ClipVisionConfig(pool=False)
    text: ClipTextConfig = ClipTextConfig()
    sentence: str = "eot"  # F_s; "mean" of the words where the end mark is not pretrained.
    levels: int = 3  # The encoder's last maps, which the neck joins.
    dim: int = 1024  # C.
    heads: int = 8
    lsran: bool = True  # Table 2, rows 1 and 3: False.
    window: int = 13  # Open: of LSRAN's attention.
    dilations: tuple[int, ...] = (1, 6, 12, 18)  # Open: of its convolutions, which share C.
    stages: int = 6  # n; 0: no cascade (table 2, rows 1 and 2).
    queries: int = 20  # Q.
    pan: bool = True  # Table 2, row 4: False.
    # Table 2, row 6: False feeds each stage's embeddings from the first map, not the latest.
    adaptive: bool = True
    doublings: int = 3  # Open: of the map's size by convolutions; bilinear from there.
    # Open: the last layer small, with biases that are the log-odds of this foreground share:
    # training from scratch then starts calmly. 0: neither.
    prior: float = 0.0

    def __post_init__(self):
        if not 1 <= self.levels <= len(self.vision.depths):
            raise UserError(
                f"config.model.levels={self.levels}: there are {len(self.vision.depths)} stages in "
                f"vision.depths={self.vision.depths}"
            )
        if (
            self.dim % 2**self.doublings
            or self.dim % 4
            or self.dim % self.heads
            or self.dim % max(1, len(self.dilations))
        ):
            raise UserError(
                f"config.model.dim={self.dim} must be a multiple of 4, of 2 to the power of "
                f"doublings={self.doublings}, of heads={self.heads}, and of the number of dilations"
            )
        if self.stages < 0 or self.queries < 1:
            raise UserError(
                f"config.model.stages={self.stages} and queries={self.queries} must be at least 0 "
                "and 1"
            )
        if self.sentence not in CLIP_SENTENCES:
            raise UserError(
                f"config.model.sentence={self.sentence!r} is not one of {', '.join(CLIP_SENTENCES)}"
            )
        if not self.dilations or min(self.dilations) < 1:
            raise UserError(f"config.model.dilations={self.dilations}: they must be 1 or more")


class Neck(nn.Module):
    """Eq. 1-2: the sentence multiplies the coarsest map, and finer maps join on the way up.

    Sigma is batch norm and leaky ReLU. Paper leaves open: the sizes of the convolutions; here 1x1.
    """

    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: list[jax.Array], sentence: jax.Array, train: bool) -> jax.Array:
        """Maps [B, h_i, w_i, C_i], fine to coarse, F_s [B, E] -> F_m [B, h_1, w_1, dim]."""

        def sigma(x: Any, name: str) -> jax.Array:
            conv = ConvNorm(self.dim, 1, activation=nn.leaky_relu, dtype=self.dtype, name=name)
            return conv(x, train)

        *finer, coarsest = features
        said = sigma(sentence[:, None, None], "sentence")
        fused = said * sigma(coarsest, f"vision{len(features)}")
        for i, x in reversed(list(enumerate(finer, 1))):
            fused = upsample(fused, x.shape[1:3])
            fused = sigma((fused, sigma(x, f"vision{i}")), f"join{i}")
        return fused


class LSRAN(nn.Module):
    """Section 3.3: what pixels of a window tell each other, related at several distances.

    Paper leaves open: norms, and whether the attention is a residual. Here it is Swin's, pre-norm
    and added; each dilated convolution ends in batch norm and ReLU.
    """

    config: JMCELNConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, fused: jax.Array, train: bool) -> jax.Array:
        """F_m [B, h, w, dim] -> F_mt of stage 0, of the same shape."""
        cfg = self.config
        B, *size, C = fused.shape
        y = nn.LayerNorm(EPSILON, dtype=self.dtype, use_fast_variance=False, name="norm")(fused)
        attention = WindowAttention(cfg.heads, cfg.window, self.dtype, name="attention")
        y = fused + attention(y.reshape(B, -1, C), tuple(size)).reshape(fused.shape)
        relations = [
            ConvNorm(
                C // len(cfg.dilations),
                3,
                dilation=dilation,
                activation=nn.relu,
                dtype=self.dtype,
                name=f"relation{i}",
            )(y, train)
            for i, dilation in enumerate(cfg.dilations, 1)
        ]
        mixed = Dense(C, dtype=self.dtype, name="mix")(jnp.concatenate(relations, -1))
        return mixed * nn.Conv(C, (3, 3), dtype=self.dtype, name="boundary")(fused)


class PAN(nn.Module):
    """Progressive alignment, section 3.4.2: the map before a stage filters the map after it.

    As in HorNet, which it is taken from, a 1x1 convolution follows the last product.
    """

    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, before: jax.Array, after: jax.Array, train: bool) -> jax.Array:
        """F_mt^i and F_mt'^(i+1), both [B, h, w, dim] -> F_mt^(i+1)."""
        C = self.dim

        def dense(width: int, name: str) -> Dense:
            return Dense(width, dtype=self.dtype, name=name)

        def conv(width: int, name: str) -> nn.Conv:
            return nn.Conv(width, (3, 3), dtype=self.dtype, name=name)

        widths = (C // 4, C // 2, C)
        after = dense(sum(widths), "after")(after)
        after = DepthwiseConv(7, self.dtype, name="depthwise")(after)
        first, second, third = jnp.split(after, (C // 4, C // 4 + C // 2), axis=-1)
        y = first * dense(C // 4, "before")(before)
        y = second * conv(C // 2, "filter2")(y)
        y = third * conv(C, "filter3")(y)
        y = dense(C, "out")(y)
        return before + SwitchNorm(dtype=self.dtype, name="norm")(y, train)


class Stage(nn.Module):
    """A stage of the cascade, section 3.4: embeddings gather from the map, then it from them."""

    config: JMCELNConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, queries: jax.Array, fused: jax.Array, source: jax.Array, mask: jax.Array, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """q^i [B, Q, dim], F_m and F_mt^i [B, h, w, dim] -> q^(i+1), F_mt^(i+1).

        `source` is what the embeddings gather from: F_mt^i, or F_mt^0 if they are not adaptive.
        """
        cfg = self.config

        def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, name: str) -> jax.Array:
            attention = MultiHeadAttention(cfg.dim, cfg.heads, self.dtype, name=name)
            return queries + attention(queries, keys, values)

        def flat(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0], -1, cfg.dim)

        queries = attend(queries, flat(fused), flat(source), "embedding")  # Eq. 3.
        after = attend(flat(mask), queries, queries, "mask").reshape(mask.shape)  # Eq. 4.
        if cfg.pan:
            after = PAN(cfg.dim, self.dtype, name="pan")(mask, after, train)
        return queries, after


class Classifier(nn.Module):
    """Logits of two classes, background and foreground: the second's minus the first's.

    [B, h, w, C] -> float32 [B, h, w], or of squares of pixels, see `class_difference`. Parameters
    `kernel` [C, 2], `bias` [2].
    """

    prior: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, squares: int = 1) -> jax.Array:
        init, log_odds = nn.initializers.lecun_normal(), 0.0
        if self.prior:
            init = nn.initializers.normal(0.02)
            log_odds = math.log(self.prior / (1 - self.prior))
        kernel = self.param("kernel", init, (x.shape[-1] // squares**2, 2))
        bias = self.param("bias", lambda _: jnp.array([0.0, log_odds]))
        return class_difference(x, kernel, bias, squares)


class Upsampling(nn.Module):
    """Section 3.5: doubles the map up to the image's size, and classifies the pixels.

    Paper leaves open: the layers. Here bilinear, 3x3 convolution, batch norm, ReLU, each half as
    wide as the one before. What the doublings leave to the image's size is bilinear.

    On a TPU the last doubling is in the kernel of its convolution, see `doubled_conv`: norm and
    classifier, which alone read its map, take squares of pixels as well.
    """

    doublings: int
    prior: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int], train: bool) -> jax.Array:
        """[B, h, w, dim], size (H, W) -> the `Classifier`'s logits float32 [B, H, W]."""
        squares = 1
        for i in range(self.doublings):
            _, h, w, C = x.shape
            kernel = self.param(f"kernel{i}", nn.initializers.he_normal(), (3, 3, C, C // 2))
            if i == self.doublings - 1 and on_tpus():
                squares, x = 2, doubled_conv(x, kernel)
            else:
                x = upsampled_conv(x, kernel.astype(self.dtype), (2 * h, 2 * w))
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f"norm{i}")(x, train, squares**2))
        return resize_bilinear(Classifier(self.prior, name="classifier")(x, squares), size)


class JMCELN(nn.Module):
    """The whole model. `dtype` is that of activations; parameters are float32."""

    config: JMCELNConfig
    dtype: Any = jnp.float32
    Config: ClassVar = JMCELNConfig
    pixels: ClassVar[str] = "clip"  # How images are normalised, see data/transforms.py.
    has_details: ClassVar[bool] = True  # The report shows them, see refseg_jax/details.py.

    def setup(self):
        cfg = self.config
        self.vision = ClipVision(cfg.vision, self.dtype)
        self.text = ClipText(cfg.text, self.dtype)
        self.neck = Neck(cfg.dim, self.dtype)
        if cfg.lsran:
            self.lsran = LSRAN(cfg, self.dtype)
        if cfg.stages:
            shape = (cfg.queries, cfg.dim)
            self.queries = self.param("queries", nn.initializers.normal(1.0), shape)
        self.stages = [Stage(cfg, self.dtype) for _ in range(cfg.stages)]
        self.upsampling = Upsampling(cfg.doublings, cfg.prior, self.dtype)

    def __call__(
        self,
        image: jax.Array,
        tokens: jax.Array,
        token_mask: jax.Array,
        train: bool = False,
        details: bool = False,
    ) -> dict[str, Any]:
        """image f32 [B, H, W, 3] (normalised), tokens int32 [B, T], token_mask bool [B, T].

        Returns float32 `logits` [B, H, W] (foreground's minus background's). With `details` also a
        dict `details` with `stage_logits`: a list of [B, H, W], the mask that the upsampling makes
        of each stage's map; the last is `logits`.
        """
        cfg = self.config
        features = self.vision(image.astype(self.dtype), train)[: len(cfg.vision.depths)]
        words, sentence = self.text(tokens, token_mask)
        if cfg.sentence == "mean":
            sentence = sentence_vector(words, token_mask, "mean") @ self.text.projection
        fused = self.neck(features[-cfg.levels :], sentence, train)
        first = mask = self.lsran(fused, train) if cfg.lsran else fused
        maps = []
        if cfg.stages:
            queries = self.queries.astype(self.dtype)
            queries = jnp.broadcast_to(queries, (len(image), *queries.shape))
        for stage in self.stages:
            source = mask if cfg.adaptive else first
            queries, mask = stage(queries, fused, source, mask, train)
            maps.append(mask)

        def masks(x: jax.Array) -> jax.Array:
            return self.upsampling(x, image.shape[1:3], train)

        outputs = {"logits": masks(mask)}
        if details:
            earlier = [masks(x) for x in maps[:-1]]
            outputs["details"] = {"stage_logits": [*earlier, outputs["logits"]]}
        return outputs

    def loss(
        self, outputs: dict[str, jax.Array], mask: jax.Array, valid: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Section 3.5: cross-entropy at the image's size.

        outputs: see `__call__`; mask bool [B, H, W]; valid bool [B]; key unused. Returns the loss,
        a float32 scalar, and no further scalars.
        """
        del key
        return two_class_loss(outputs["logits"], mask, valid, (1.0, 1.0)), {}
