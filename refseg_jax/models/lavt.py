"""LAVT: "LAVT: Language-Aware Vision Transformer for Referring Image Segmentation".

BERT reads the expression once; after the blocks of every Swin stage the pixels attend to its words
(PWAM) and take a gated part of what they gather along to the next stage. The gathered features
themselves go to a convolutional decoder. The form is that of the authors' released code, whose
weights load.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.errors import UserError
from refseg_jax.losses.segmentation import check_class_weights, two_class_loss
from refseg_jax.models.encoders.bert import Bert, BertConfig
from refseg_jax.models.encoders.swin import Swin, SwinConfig
from refseg_jax.models.layers.activations import gelu
from refseg_jax.models.layers.decoder import MaskDecoder
from refseg_jax.models.layers.dense import Dense
from refseg_jax.models.layers.draws import PYTORCH, Draws
from refseg_jax.models.layers.early_fusion import (
    GatedResidual,
    PixelWordAttention,
    pixels_in_one_axis,
)

DRAWS = {"released": Draws(PYTORCH, PYTORCH, decoder=PYTORCH), "flax": Draws()}


@dataclasses.dataclass(frozen=True)
class LAVTConfig:
    """Defaults are those of the released code."""

    swin: SwinConfig = SwinConfig()
    bert: BertConfig = BertConfig()
    fusion_heads: tuple[int, ...] = (1, 1, 1, 1)  # Of each stage's PWAM.
    shut_gates: bool = True  # Gates start almost shut, for pretrained encoders.
    draws: str = "released"  # How other new layers start; or "flax".
    class_weights: tuple[float, float] = (0.9, 1.1)  # Background, foreground.

    def __post_init__(self):
        heads, widths = self.fusion_heads, self.swin.widths
        if len(heads) != len(widths) or any(
            h < 1 or width % h for h, width in zip(heads, widths, strict=False)
        ):
            raise UserError(
                f"config.model.fusion_heads={heads} do not divide the stages' widths {widths}"
            )
        if self.draws not in DRAWS:
            raise UserError(f"config.model.draws={self.draws!r} is not one of {', '.join(DRAWS)}")
        check_class_weights(self.class_weights)


class PWAM(nn.Module):
    """Pixel-word attention module: the projected pixels times what they gather from the words."""

    heads: int = 1
    dtype: Any = jnp.float32
    draws: Draws = Draws()

    @nn.compact
    def __call__(self, vision: jax.Array, language: jax.Array, token_mask: jax.Array) -> jax.Array:
        """vision [B, n, C], language [B, T, D], token_mask bool [B, T] -> [B, n, C]."""
        C = vision.shape[-1]

        def project(x: jax.Array, name: str) -> jax.Array:
            dense = Dense(C, dtype=self.dtype, kernel_init=self.draws.pixels, name=name)
            return gelu(dense(x))

        # As released, the scale is the whole width's, however many heads share it.
        how = dict(scale=C**-0.5, dtype=self.dtype, draws=self.draws)
        attention = PixelWordAttention(C, self.heads, **how, name="attention")
        gathered = attention(vision, language, token_mask)
        return project(project(vision, "vision") * gathered, "mix")


class LAVT(nn.Module):
    """The whole model. `dtype` is that of activations; parameters are float32."""

    config: LAVTConfig
    dtype: Any = jnp.float32
    Config: ClassVar = LAVTConfig

    def setup(self):
        cfg = self.config
        self.swin = Swin(cfg.swin, dtype=self.dtype)
        self.bert = Bert(cfg.bert, dtype=self.dtype)
        draws = DRAWS[cfg.draws]
        self.fusions = [PWAM(heads, self.dtype, draws) for heads in cfg.fusion_heads]
        self.gates = [GatedResidual(self.dtype, cfg.shut_gates) for _ in cfg.fusion_heads]
        self.decoder = MaskDecoder(self.dtype, draws.decoder)

    def __call__(
        self, image: jax.Array, tokens: jax.Array, token_mask: jax.Array, train: bool = False
    ) -> dict[str, jax.Array]:
        """image f32 [B, H, W, 3] (normalised), tokens int32 [B, T], token_mask bool [B, T].

        Returns float32 `logits` [B, H, W] (foreground's minus background's) and `class_logits`
        [B, H, W, 2].
        """
        language = self.bert(tokens, token_mask, train)
        vision = self.swin.embed(image.astype(self.dtype))
        features = []
        for i, (fusion, gate) in enumerate(zip(self.fusions, self.gates, strict=True)):
            vision = self.swin.stage(i, self.swin.merge(i - 1, vision) if i else vision, train)
            pixels = pixels_in_one_axis(vision)
            feature = fusion(pixels, language, token_mask)
            features.append(feature.reshape(vision.shape))
            # The last gate's result goes nowhere; published checkpoints have it all the same.
            vision = gate(pixels, feature).reshape(vision.shape)
        return self.decoder(features, image.shape[1:3], train)

    def loss(
        self, outputs: dict[str, jax.Array], mask: jax.Array, valid: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """mask bool [B, H, W], valid bool [B] -> (scalar, its parts). No use of `key`."""
        loss = two_class_loss(outputs["logits"], mask, valid, self.config.class_weights)
        return loss, {"loss_task": loss}
