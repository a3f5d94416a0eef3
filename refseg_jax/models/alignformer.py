"""AlignFormer: "Learning Aligned Cross-modal Representations for Referring Image Segmentation".

Image and expression are encoded jointly: after each Swin stage a bidirectional attention (VLBA)
updates both. A deformable-attention pixel decoder refines the vision features into per-pixel
embeddings V_e, a transformer decoder turns the language into one centre embedding L_e, and the
mask's logits are L_e . V_e. Sections and equations are the paper's.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.errors import UserError
from refseg_jax.losses.contrastive import cmic_loss
from refseg_jax.losses.segmentation import majority_downsample, masked_mean, sigmoid_bce
from refseg_jax.models.encoders.bert import Bert, BertConfig
from refseg_jax.models.encoders.swin import Swin, SwinConfig
from refseg_jax.models.layers.activations import gelu
from refseg_jax.models.layers.deformable import DeformableEncoder
from refseg_jax.models.layers.dense import Dense, Weights
from refseg_jax.models.layers.dropout import check_rate
from refseg_jax.models.layers.early_fusion import pixels_in_one_axis
from refseg_jax.models.layers.mlp import MLP
from refseg_jax.models.layers.positions import sine_positions
from refseg_jax.models.layers.resize import resize_bilinear
from refseg_jax.models.layers.sentence import SENTENCES, sentence_vector
from refseg_jax.models.layers.transformer import DecoderLayer

FUSIONS = ("vlba", "vlua", "none")


@dataclasses.dataclass(frozen=True)
class AlignFormerConfig:
    """Defaults are the paper's (section 4.1); fields marked "open" are where it is silent."""

    swin: SwinConfig = SwinConfig()
    bert: BertConfig = BertConfig()
    fusion: str = "vlba"  # Table 3: "vlua" never updates the language; "none" fuses nothing.
    grouping: bool = True  # Table 2: False drops the transformer decoder for a linear classifier.
    fuse_hidden: float = 1.0  # Open: hidden width of fuse(.), in output widths.
    gate_hidden: float = 1.0  # Open: hidden width of gate(.), in output widths.
    lateral: bool = False  # Open: stage 1 joins the 1/4 map, as in Mask2Former.
    # Open: a linear layer on L_e, initialised small, and a learned bias of the logits, initialised
    # at the log-odds of this foreground share: training from scratch then starts at the share's
    # entropy and not at large random logits. 0: neither, as printed.
    prior: float = 0.0
    query: str = "cls"  # Open: the query starts from [CLS] of L_4', or the "mean" of its tokens.
    dim: int = 256
    heads: int = 8
    points: int = 4
    pixel_layers: int = 6
    pixel_remat: bool = False  # Recomputes each of these layers in the backward pass.
    pixel_ffn: int = 1024
    decoder_layers: int = 6
    decoder_ffn: int = 2048
    dropout: float = 0.0  # Open: in both decoders.
    cmic_weight: float = 0.5  # Lambda of eq. 13; 0 turns CMIC off (table 4).
    cmic_samples: int = 20  # M.

    def __post_init__(self):
        check_rate(self.dropout)
        if self.heads < 1 or self.dim % self.heads or self.dim % 4:
            raise UserError(
                f"config.model.dim={self.dim} must be a multiple of 4 and of heads={self.heads}"
            )
        if self.fusion not in FUSIONS:
            raise UserError(
                f"config.model.fusion={self.fusion!r} is not one of {', '.join(FUSIONS)}"
            )
        if self.query not in SENTENCES:
            raise UserError(
                f"config.model.query={self.query!r} is not one of {', '.join(SENTENCES)}"
            )
        narrowest = min(*self.swin.widths, self.bert.hidden)
        for name in ("fuse_hidden", "gate_hidden"):
            if int(narrowest * getattr(self, name)) < 1:
                raise UserError(
                    f"config.model.{name}={getattr(self, name)} leaves no hidden channel of "
                    f"{narrowest}"
                )
        if self.cmic_weight and not self.grouping:
            raise UserError(
                "config.model.grouping=False has no centre embedding to contrast with: "
                "set config.model.cmic_weight=0"
            )


class GatedFusion(nn.Module):
    """Eq. 4 and 6 (or 5 and 7): x' = x + m * gate(m), m = fuse(cat(x, response))."""

    fuse_hidden: float
    gate_hidden: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, response: jax.Array) -> jax.Array:
        """x, response [B, n, width] -> [B, n, width]."""
        width = x.shape[-1]

        def mlp(hidden, activation, name):
            widths = (int(width * hidden), width)
            return MLP(widths, activation, dtype=self.dtype, name=name)

        # Paper leaves open: the activations; GELU in fuse, ReLU then tanh in gate.
        m = mlp(self.fuse_hidden, gelu, "fuse")(jnp.concatenate([x, response], -1))
        return x + m * jnp.tanh(mlp(self.gate_hidden, nn.relu, "gate")(m))


class VLBA(nn.Module):
    """Vision-language bidirectional attention, eq. 1-7; one map for both directions, one head."""

    fuse_hidden: float = 1.0
    gate_hidden: float = 1.0
    update_language: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, vision: jax.Array, language: jax.Array, token_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """vision [B, S, C], language [B, T, D], token_mask bool [B, T] -> both, updated."""
        channels, width = vision.shape[-1], language.shape[-1]

        def dense(features, name):
            return Dense(features, dtype=self.dtype, name=name)

        def fusion(name):
            return GatedFusion(self.fuse_hidden, self.gate_hidden, self.dtype, name=name)

        # Words are few: the layers of eq. 1-3 that take every pixel are applied to the words, or to
        # what they have gathered. Weights of sum 1 leave a bias what it is.
        to_query, query_bias = Weights(channels, dtype=self.dtype, name="vision_query")(channels)
        key = dense(channels, "language_key")(language)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        attention = product("bsc,btc->bst", vision, key @ to_query.T)
        attention += product("btc,c->bt", key, query_bias)[:, None]
        attention /= math.sqrt(channels)  # Eq. 1.
        over_tokens = jax.nn.softmax(jnp.where(token_mask[:, None], attention, -1e9), axis=2)
        value = dense(channels, "w1")(dense(channels, "language_value")(language))
        from_language = jnp.einsum("bst,btc->bsc", over_tokens.astype(self.dtype), value)
        updated = fusion("vision_fusion")(vision, from_language)  # Eq. 2.
        if self.update_language:
            over_pixels = jax.nn.softmax(attention, axis=1)
            from_vision = jnp.einsum("bst,bsc->btc", over_pixels.astype(self.dtype), vision)
            response = dense(width, "w2")(dense(channels, "vision_value")(from_vision))  # Eq. 3.
            language = fusion("language_fusion")(language, response)
        return updated, language


class PixelDecoder(nn.Module):
    """Section 3.2: deformable attention over 1/8, 1/16, 1/32, then bilinear up to 1/4."""

    config: AlignFormerConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: list[jax.Array], train: bool
    ) -> tuple[jax.Array, list[jax.Array], list[tuple[int, int]]]:
        """Four [B, h_i, w_i, C_i], fine to coarse.

        Returns V_e [B, h_1, w_1, dim], and the refined levels 1/8, 1/16, 1/32 as
        [B, S_i, dim] with their (h, w).
        """
        cfg = self.config

        def project(x, name):
            y = Dense(cfg.dim, dtype=self.dtype, name=name)(pixels_in_one_axis(x))
            groups = math.gcd(32, cfg.dim)
            norm = nn.GroupNorm(groups, epsilon=1e-5, dtype=self.dtype, name=f"{name}_norm")
            return norm(y).reshape(*x.shape[:3], cfg.dim)

        finest, *levels = features
        shapes = [x.shape[1:3] for x in levels]
        levels = [project(x, f"project{i}") for i, x in enumerate(levels, 2)]
        levels = DeformableEncoder(
            layers=cfg.pixel_layers,
            dim=cfg.dim,
            heads=cfg.heads,
            points=cfg.points,
            ffn_dim=cfg.pixel_ffn,
            dropout=cfg.dropout,
            remat=cfg.pixel_remat,
            dtype=self.dtype,
            name="encoder",
        )(levels, train)
        pixels = resize_bilinear(levels[0], finest.shape[1:3])
        if cfg.lateral:
            pixels = pixels + project(finest, "lateral")
            pixels = nn.Conv(cfg.dim, (3, 3), dtype=self.dtype, name="lateral_out")(pixels)
        return pixels, [pixels_in_one_axis(x) for x in levels], shapes


class CentreDecoder(nn.Module):
    """Section 3.2: the language query gathers from the levels into the centre embedding L_e."""

    config: AlignFormerConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        language: jax.Array,
        token_mask: jax.Array,
        levels: list[jax.Array],
        shapes: list[tuple[int, int]],
        train: bool,
    ) -> jax.Array:
        """language [B, T, D], levels [B, S_i, dim] from 1/8 to 1/32 -> L_e [B, dim]."""
        cfg = self.config
        query = sentence_vector(language, token_mask, cfg.query)
        query = Dense(cfg.dim, dtype=self.dtype, name="query")(query)[:, None]
        level_embedding = self.param(
            "level_embedding", nn.initializers.normal(0.02), (len(levels), cfg.dim)
        )
        memory = [x + level_embedding[i].astype(x.dtype) for i, x in enumerate(levels)]
        positions = [sine_positions(*shape, cfg.dim) for shape in shapes]
        for i in range(cfg.decoder_layers):
            level = len(levels) - 1 - i % len(levels)  # 1/32, 1/16, 1/8, and again.
            query = DecoderLayer(
                cfg.dim, cfg.heads, cfg.decoder_ffn, cfg.dropout, self.dtype, name=f"layer{i}"
            )(query, memory[level], key_positions=positions[level], train=train)
        if cfg.prior:
            query = Dense(
                cfg.dim,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.02),
                name="projection",
            )(query)
        return query[:, 0]


class AlignFormer(nn.Module):
    """The whole model. `dtype` is that of activations; parameters are float32."""

    config: AlignFormerConfig
    dtype: Any = jnp.float32
    Config: ClassVar = AlignFormerConfig

    def setup(self):
        cfg = self.config
        self.swin = Swin(cfg.swin, dtype=self.dtype)
        self.bert = Bert(cfg.bert, dtype=self.dtype)
        if cfg.fusion != "none":
            self.fusions = [
                VLBA(cfg.fuse_hidden, cfg.gate_hidden, cfg.fusion == "vlba", dtype=self.dtype)
                for _ in cfg.swin.depths
            ]
        self.pixel_decoder = PixelDecoder(cfg, self.dtype)
        log_odds = math.log(cfg.prior / (1 - cfg.prior)) if cfg.prior else 0.0
        if cfg.grouping:
            self.centre_decoder = CentreDecoder(cfg, self.dtype)
            self.bias = 0.0
            if cfg.prior:
                self.bias = self.param("bias", nn.initializers.constant(log_odds), ())
        else:
            bias_init = nn.initializers.constant(log_odds)
            self.classifier = Dense(1, dtype=self.dtype, bias_init=bias_init)

    def __call__(
        self, image: jax.Array, tokens: jax.Array, token_mask: jax.Array, train: bool = False
    ) -> dict[str, jax.Array]:
        """image f32 [B, H, W, 3] (normalised), tokens int32 [B, T], token_mask bool [B, T].

        Returns float32 `logits` [B, h, w] at 1/4 (h = ceil(H / 4)), `pixel_embedding` V_e
        [B, h, w, dim].
        """
        cfg = self.config
        language = self.bert(tokens, token_mask, train)
        vision = self.swin.embed(image.astype(self.dtype))
        features = []
        stages = len(cfg.swin.depths)
        for i in range(stages):
            vision = self.swin.stage(i, vision, train)
            shape, vision = vision.shape, pixels_in_one_axis(vision)
            if cfg.fusion != "none":
                vision, language = self.fusions[i](vision, language, token_mask)
            features.append(vision.reshape(shape))
            if i < stages - 1:
                vision = self.swin.merge(i, vision.reshape(shape))
        pixels, levels, shapes = self.pixel_decoder(features, train)
        pixels = pixels.astype(jnp.float32)
        if not cfg.grouping:
            logits = self.classifier(pixels)[..., 0].astype(jnp.float32)
            return {"logits": logits, "pixel_embedding": pixels}
        centre = self.centre_decoder(language, token_mask, levels, shapes, train)
        if cfg.lateral:
            logits = jnp.einsum("bhwc,bc->bhw", pixels, centre.astype(jnp.float32))
        else:
            # V_e is the 1/8 map resized, which is linear: a model that only predicts needs no V_e.
            logits = jnp.einsum("bsc,bc->bs", levels[0], centre, preferred_element_type=jnp.float32)
            logits = resize_bilinear(logits.reshape(-1, *shapes[0]), pixels.shape[1:3])
        return {"logits": logits + self.bias, "pixel_embedding": pixels}

    def loss(
        self, outputs: dict[str, jax.Array], mask: jax.Array, valid: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Eq. 13 at 1/4: mask bool [B, H, W], valid bool [B] -> (scalar, its parts)."""
        cfg = self.config
        logits = outputs["logits"]
        labels = majority_downsample(mask, cfg.swin.patch_size)
        loss = masked_mean(sigmoid_bce(logits, labels), valid)  # Eq. 8-9.
        scalars = {"loss_pixel_text": loss}
        if cfg.cmic_weight:
            pixels = outputs["pixel_embedding"]
            flat = (len(pixels), -1)
            per_image = cmic_loss(
                pixels.reshape(*flat, cfg.dim),
                logits.reshape(flat),
                labels.reshape(flat),
                key,
                cfg.cmic_samples,
            )
            scalars["loss_cmic"] = masked_mean(per_image, valid)
            loss = loss + cfg.cmic_weight * scalars["loss_cmic"]
        return loss, scalars
