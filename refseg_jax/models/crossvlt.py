"""CrossVLT: "Cross-aware Early Fusion with Stage-divided Vision and Language Transformer Encoders".

Vision and language encoders are both cut into four stages that inform each other: the pixels of
every stage attend to the words (before patch merging and, but for the last stage's, after it), and
each further language stage begins with a layer whose words attend to the pixels. Before each fusion
the two are aligned by a contrastive loss. Equations are the paper's; where the authors' released
code differs from them it is followed, so that their weights load, and the paper's form is a config
field.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.errors import UserError
from refseg_jax.losses.contrastive import unit_length
from refseg_jax.losses.segmentation import (
    check_class_weights,
    majority_downsample,
    masked_mean,
    sigmoid_bce,
    two_class_loss,
)
from refseg_jax.models.encoders.bert import Bert, BertConfig, BertLayer
from refseg_jax.models.encoders.resnet import ResNet, ResNetConfig
from refseg_jax.models.encoders.swin import Swin, SwinConfig
from refseg_jax.models.layers.activations import gelu
from refseg_jax.models.layers.attention import MultiHeadAttention
from refseg_jax.models.layers.decoder import MaskDecoder
from refseg_jax.models.layers.dense import Dense
from refseg_jax.models.layers.draws import PYTORCH, Draws
from refseg_jax.models.layers.early_fusion import (
    GatedResidual,
    PixelWordAttention,
    pixels_in_one_axis,
)
from refseg_jax.models.layers.mlp import MLP
from refseg_jax.models.layers.resize import resize_bilinear

BACKBONES = {"swin": Swin, "resnet": ResNet}
HE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
NARROW = nn.initializers.normal(0.02)
DRAWS = {"released": Draws(HE, NARROW, NARROW, PYTORCH), "flax": Draws()}


@dataclasses.dataclass(frozen=True)
class CrossVLTConfig:
    """Defaults are those of the released code. Stages are counted from 1, as in the paper."""

    swin: SwinConfig = SwinConfig()
    bert: BertConfig = BertConfig(layers=6)  # Its layers are those of language stage 1.
    language_depths: tuple[int, ...] = (2, 2, 2)  # Of stages 2-4, fusion layer included (table IV).
    fusion_stages: tuple[int, ...] = (1, 2, 3, 4)  # Table III (a).
    direction: str = "bi"  # Table III (d): "uni" fuses nothing into the language.
    align_stages: tuple[int, ...] = (1, 2, 3, 4)  # Table III (b); () for no alignment.
    align_loss: str = "align"  # Table III (e): "aux" segments every stage's pixels instead.
    align_at: str = "input"  # Where it is scored: "stage" is eq. 7, "input" the released code.
    align_dim: int = 256
    head_dim: int = 64  # Of the pixels' attention.
    fusion_form: str = "released"  # Of eq. 1-4: "paper" as they are printed.
    shut_gates: bool = True  # Gates, which are "released", start almost shut, for pretrained parts.
    draws: str = "released"  # How other new layers start, of fusions those that are so; or "flax".
    class_weights: tuple[float, float] = (0.9, 1.1)  # Background, foreground; eq. 8 has (1, 1).
    task_weight: float = 2.0
    align_weight: float = 1.0  # Eq. 9's lambda, where the task's weight is 1; not in the paper.
    # Or "resnet": table I. Open: between its stages there is no patch merging, so that eq. 3-4 are
    # of a stage's own output, before the stride of the next.
    backbone: str = "swin"
    resnet: ResNetConfig = ResNetConfig()

    def __post_init__(self):
        for name, choices in (
            ("backbone", BACKBONES),
            ("direction", ("bi", "uni")),
            ("align_loss", ("align", "aux")),
            ("align_at", ("input", "stage")),
            ("fusion_form", ("released", "paper")),
            ("draws", DRAWS),
        ):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"config.model.{name}={getattr(self, name)!r} is not one of "
                    + ", ".join(choices)
                )
        check_class_weights(self.class_weights)
        stages = tuple(range(1, len(self.vision.depths) + 1))
        for name in ("fusion_stages", "align_stages"):
            chosen = getattr(self, name)
            if chosen != tuple(i for i in stages if i in chosen):
                raise UserError(f"config.model.{name}={chosen} are not in-order stages of {stages}")
        if len(self.language_depths) != len(stages) - 1 or min(self.language_depths) < 1:
            raise UserError(
                f"config.model.language_depths={self.language_depths} are not the layers, one or "
                f"more each, of language stages {stages[1:]}"
            )
        for width in self.fusion_widths:
            if self.head_dim < 1 or width % self.heads(width):
                raise UserError(
                    f"config.model.head_dim={self.head_dim} makes no heads of one size in a width "
                    f"of {width} (those of the fusions are {self.fusion_widths}, of the stages "
                    f"{self.vision.widths})"
                )
        if self.align_dim < 1:
            raise UserError(f"config.model.align_dim={self.align_dim} must be 1 or more")

    @property
    def vision(self) -> SwinConfig | ResNetConfig:
        """The config of the vision encoder that is used."""
        return getattr(self, self.backbone)

    @property
    def fusion_widths(self) -> tuple[int, ...]:
        """Joint width of each stage's first attention: as released the first has twice its own."""
        first, *others = self.vision.widths
        return first * (2 if self.fusion_form == "released" else 1), *others

    @property
    def merged_widths(self) -> tuple[int, ...]:
        """Of the maps between the stages, which a Swin has merged."""
        widths = self.vision.widths
        return widths[1:] if self.backbone == "swin" else widths[:-1]

    def heads(self, width: int) -> int:
        """Of an attention of that joint width."""
        return max(1, width // self.head_dim)


class PixelFusion(nn.Module):
    """Pixels ask words, eq. 1 and the first half of eq. 2 (or 3).

    As released, a linear layer and GELU follow the sum; what comes out is the stage's feature for
    the decoder as well as the update of the pixels.
    """

    dim: int  # Joint width.
    heads: int
    dtype: Any = jnp.float32
    draws: Draws = Draws()

    @nn.compact
    def __call__(self, vision: jax.Array, language: jax.Array, token_mask: jax.Array) -> jax.Array:
        """vision [B, n, C], language [B, T, D], token_mask bool [B, T] -> [B, n, C]."""
        how = dict(dtype=self.dtype, draws=self.draws, name="attention")
        attention = PixelWordAttention(self.dim, self.heads, **how)
        fused = vision + attention(vision, language, token_mask)
        how = dict(dtype=self.dtype, kernel_init=self.draws.pixels, name="mix")
        return gelu(Dense(vision.shape[-1], **how)(fused))


class PrintedFusion(nn.Module):
    """Eq. 1 and the first half of eq. 2 (or 3) as printed: MHCA(V, L) + V.

    Paper leaves open: what makes queries, keys and values (linear layers), and norms (none).
    """

    dim: int
    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, vision: jax.Array, language: jax.Array, token_mask: jax.Array) -> jax.Array:
        """vision [B, n, C], language [B, T, D], token_mask bool [B, T] -> [B, n, C]."""
        attention = MultiHeadAttention(self.dim, self.heads, self.dtype, name="attention")
        return vision + attention(vision, language, language, token_mask)


class PrintedUpdate(nn.Module):
    """Second half of eq. 2 (or eq. 4) as printed: x + FFN(update), [B, n, C] -> same.

    Paper leaves open: the feed-forward block; here four times as wide, with GELU.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, update: jax.Array) -> jax.Array:
        C = x.shape[-1]
        return x + MLP((4 * C, C), activation=gelu, dtype=self.dtype, name="ffn")(update)


class LanguageStage(nn.Module):
    """BERT layers; in the first of them, with `fused`, the words ask the pixels, eq. 5."""

    config: BertConfig
    depth: int
    fused: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, language: jax.Array, token_mask: jax.Array, vision: jax.Array, train: bool
    ) -> jax.Array:
        """language [B, T, D], token_mask bool [B, T], vision [B, n, C] -> [B, T, D]."""
        layer = nn.remat(BertLayer, static_argnums=(3,)) if self.config.remat else BertLayer
        if self.fused:
            fusion = layer(self.config, self.dtype, name="fusion")
            language = fusion(language, token_mask, train, vision)
        for i in range(self.depth - self.fused):
            block = layer(self.config, self.dtype, name=f"blocks_{i}")
            language = block(language, token_mask, train)
        return language


class Alignment(nn.Module):
    """Sim of eq. 6: cosine of every pixel with the sentence, both projected to `dim`."""

    dim: int
    dtype: Any = jnp.float32
    draws: Draws = Draws()

    @nn.compact
    def __call__(self, vision: jax.Array, sentence: jax.Array) -> jax.Array:
        """vision [B, n, C], sentence [B, D] -> float32 [B, n]."""
        how = dict(dtype=self.dtype, kernel_init=self.draws.alignment)

        def unit(x: jax.Array, name: str) -> jax.Array:
            return unit_length(Dense(self.dim, **how, name=name)(x))

        return jnp.einsum("bnc,bc->bn", unit(vision, "vision"), unit(sentence, "language"))


class CrossVLT(nn.Module):
    """The whole model. `dtype` is that of activations; parameters are float32."""

    config: CrossVLTConfig
    dtype: Any = jnp.float32
    Config: ClassVar = CrossVLTConfig

    def setup(self):
        cfg = self.config
        widths, draws = cfg.vision.widths, DRAWS[cfg.draws]
        # Under its own name, so that pretrained weights are found.
        setattr(self, cfg.backbone, BACKBONES[cfg.backbone](cfg.vision, dtype=self.dtype))
        self.bert = Bert(cfg.bert, dtype=self.dtype)
        self.language_stages = [
            LanguageStage(
                cfg.bert, depth, cfg.direction == "bi" and i in cfg.fusion_stages, self.dtype
            )
            for i, depth in enumerate(cfg.language_depths, 2)
        ]

        def fusion(dim):
            if cfg.fusion_form == "paper":
                return PrintedFusion(dim, cfg.heads(dim), self.dtype)
            return PixelFusion(dim, cfg.heads(dim), self.dtype, draws)

        def gate():
            if cfg.fusion_form == "paper":
                return PrintedUpdate(self.dtype)
            return GatedResidual(self.dtype, cfg.shut_gates)

        self.fusions = [fusion(width) for width in cfg.fusion_widths]
        self.gates = [gate() for _ in widths]
        self.merged_fusions = [fusion(width) for width in cfg.merged_widths]
        self.merged_gates = [gate() for _ in widths[1:]]
        if cfg.align_loss == "aux":
            self.aux_heads = [Dense(1, dtype=self.dtype) for _ in widths]
        elif cfg.align_stages:
            self.alignments = [Alignment(cfg.align_dim, self.dtype, draws) for _ in widths]
            self.temperature = self.param(
                "temperature", nn.initializers.ones, (len(cfg.align_stages),)
            )
        self.decoder = MaskDecoder(self.dtype, draws.decoder)

    def __call__(
        self, image: jax.Array, tokens: jax.Array, token_mask: jax.Array, train: bool = False
    ) -> dict[str, Any]:
        """image f32 [B, H, W, 3] (normalised), tokens int32 [B, T], token_mask bool [B, T].

        Returns float32 `logits` [B, H, W] (foreground's minus background's), `class_logits`
        [B, H, W, 2], and `stage_logits`, a list of [B, h_i, w_i], one per aligned stage: the
        similarity over its temperature, or the auxiliary head's logits.
        """
        cfg = self.config
        language = self.bert(tokens, token_mask, train)
        encoder = getattr(self, cfg.backbone)
        vision = encoder.embed(image.astype(self.dtype), train)
        shape, vision = vision.shape, pixels_in_one_axis(vision)
        features, stage_logits = [], []
        last = len(cfg.vision.depths) - 1
        for i in range(last + 1):
            fused = i + 1 in cfg.fusion_stages
            if i:
                language = self.language_stages[i - 1](language, token_mask, vision, train)
            vision = encoder.stage(i, vision.reshape(shape), train)
            shape, vision = vision.shape, pixels_in_one_axis(vision)
            if i + 1 in cfg.align_stages:
                logits = self._stage_logits(i, vision, language)
                stage_logits.append(logits.reshape(shape[:-1]))
            feature = vision
            if fused:
                feature = self.fusions[i](vision, language, token_mask)
                # The last gate's result goes nowhere; published checkpoints have it all the same.
                vision = self.gates[i](vision, feature)  # Eq. 2: M_i.
            features.append(feature.reshape(shape))
            if i < last:
                vision = encoder.merge(i, vision.reshape(shape))
                shape, vision = vision.shape, pixels_in_one_axis(vision)
                if fused:  # Eq. 3-4.
                    update = self.merged_fusions[i](vision, language, token_mask)
                    vision = self.merged_gates[i](vision, update)
        return {
            **self.decoder(features, image.shape[1:3], train),
            "stage_logits": stage_logits,
        }

    def _stage_logits(self, i: int, vision: jax.Array, language: jax.Array) -> jax.Array:
        if self.config.align_loss == "aux":
            # Paper leaves open: the auxiliary head; one linear layer on the same V_i.
            return self.aux_heads[i](vision)[..., 0].astype(jnp.float32)
        temperature = self.temperature[self.config.align_stages.index(i + 1)]
        return self.alignments[i](vision, language[:, 0]) / temperature

    def loss(
        self, outputs: dict[str, Any], mask: jax.Array, valid: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Eq. 6-9: mask bool [B, H, W], valid bool [B] -> (scalar, its parts). No use of `key`."""
        cfg = self.config
        task = two_class_loss(outputs["logits"], mask, valid, cfg.class_weights)
        loss, scalars = cfg.task_weight * task, {"loss_task": task}
        for stage, logits in zip(cfg.align_stages, outputs["stage_logits"], strict=True):
            labels = mask
            if cfg.align_at == "input":
                logits = resize_bilinear(logits, mask.shape[1:], align_corners=True)
            else:
                labels = majority_downsample(mask, cfg.vision.patch_size * 2 ** (stage - 1))
            align = masked_mean(sigmoid_bce(logits, labels), valid)
            scalars[f"loss_{cfg.align_loss}{stage}"] = align
            loss = loss + cfg.align_weight * align
        return loss, scalars
