"""CoupAlign: "Coupling Word-Pixel with Sentence-Mask Alignments for Referring Image Segmentation".

Before each of four stages, words and pixels attend to each other (WPA). A transformer decoder then
proposes N masks, which the sentence weighs by similarity (SMA); their weighted sum is the mask.
Beside it a loss contrasts the pixels of the mask with all others. Sections, equations and tables
are the paper's.
"""

import dataclasses
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from refseg_jax.errors import UserError
from refseg_jax.losses.contrastive import unit_length
from refseg_jax.losses.pixel_contrast import pixel_contrast_loss
from refseg_jax.losses.segmentation import majority_downsample, masked_mean, sigmoid_bce
from refseg_jax.models.encoders.bert import Bert, BertConfig
from refseg_jax.models.encoders.darknet import DarkNet, DarkNetConfig
from refseg_jax.models.encoders.resnet import ResNet, ResNetConfig
from refseg_jax.models.encoders.swin import Swin, SwinConfig
from refseg_jax.models.layers.attention import MultiHeadAttention
from refseg_jax.models.layers.decoder import ConvBlock
from refseg_jax.models.layers.dense import Dense, Weights
from refseg_jax.models.layers.dropout import check_rate
from refseg_jax.models.layers.early_fusion import GatedResidual, pixels_in_one_axis
from refseg_jax.models.layers.norms import EPSILON
from refseg_jax.models.layers.positions import sine_positions
from refseg_jax.models.layers.resize import resize_bilinear
from refseg_jax.models.layers.sentence import SENTENCES, sentence_vector
from refseg_jax.models.layers.transformer import DecoderLayer

BACKBONES = {"swin": Swin, "resnet": ResNet, "darknet": DarkNet}


@dataclasses.dataclass(frozen=True)
class CoupAlignConfig:
    """Defaults are the paper's (section 4.1); fields marked "open" are where it is silent."""

    backbone: str = "swin"  # Or "resnet", "darknet": supplement, tables 1-2. Their configs:
    swin: SwinConfig = SwinConfig()
    resnet: ResNetConfig = ResNetConfig()
    darknet: DarkNetConfig = DarkNetConfig()
    bert: BertConfig = BertConfig()  # Its layers are shared out evenly among the stages.
    wpa_stages: tuple[int, ...] = (1, 2, 3, 4)  # Table 5, counted from 1; (): none (table 4).
    direction: str = "bi"  # Table 4: "uni" never updates the words.
    joint_dim: int = 768  # Open: d of eq. 4.
    # Open: gates start narrow, as LAVT's do, to disturb pretrained encoders little.
    shut_gates: bool = True
    heads: int = 8  # Of the cross attention; open: and of the mask generator.
    position_grid: int = 14  # Side of e_p, eq. 7; it is resized to a map of another size.
    sma: bool = True  # Table 4: False drops proposals and SMA for a linear classifier of Y_1.
    queries: int = 100  # N, table 3.
    generator_dim: int = 256  # Open: d_q.
    generator_layers: int = 6
    generator_ffn: int = 2048  # Open.
    generator_pre_norm: bool = True  # Open: where its layers normalise.
    dropout: float = 0.0  # Open: in the mask generator.
    seg_dim: int = 512  # Open: d_s.
    sentence: str = "cls"  # L_g; "mean" of the last stage's words where [CLS] is not pretrained.
    similarity_temperature: float = 1.0  # Open: divides the cosine of eq. 11; none is printed.
    # Open: W_Y small and a learned bias of the logits, at first the log-odds of this foreground
    # share: training from scratch then starts calmly. 0: neither, as printed.
    prior: float = 0.0
    aux_weight: float = 0.1  # Lambda of eq. 17; 0 turns the auxiliary loss off (table 4).
    aux_temperature: float = 0.1  # Open: tau of eq. 14-15.
    aux_normalize: bool = True  # Open: vectors of length 1 in eq. 14-15.

    def __post_init__(self):
        check_rate(self.dropout)
        widths = self.bert.hidden, self.generator_dim
        if self.heads < 1 or any(width % self.heads for width in widths):
            raise UserError(
                f"config.model.heads={self.heads} do not divide bert.hidden and generator_dim, "
                f"{widths[0]} and {widths[1]}"
            )
        if self.generator_dim % 4:
            raise UserError(
                f"config.model.generator_dim={self.generator_dim} is not a multiple of 4, as sine "
                "positions need"
            )
        for name, choices in (
            ("backbone", BACKBONES),
            ("direction", ("bi", "uni")),
            ("sentence", SENTENCES),
        ):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"config.model.{name}={getattr(self, name)!r} is not one of "
                    + ", ".join(choices)
                )
        stages = tuple(range(1, len(self.vision.depths) + 1))
        if self.wpa_stages != tuple(i for i in stages if i in self.wpa_stages):
            raise UserError(
                f"config.model.wpa_stages={self.wpa_stages} are not in-order stages of {stages}"
            )
        if self.bert.layers < len(stages) or self.bert.layers % len(stages):
            raise UserError(
                f"config.model.bert.layers={self.bert.layers} cannot be shared out evenly among "
                f"{len(stages)} stages"
            )

    @property
    def vision(self) -> SwinConfig | ResNetConfig | DarkNetConfig:
        """The config of the vision encoder that is used."""
        return getattr(self, self.backbone)


class WPA(nn.Module):
    """Word-pixel alignment, eq. 1-6: bidirectional attention of one head, gated into both sides.

    Eq. 5 prints the values as L_i and V_i, whose widths do not fit; they are the L^_i and V^_i of
    eq. 4. As the paper has matrices, nothing has a bias.
    """

    dim: int  # Joint width d.
    update_language: bool = True
    shut_gates: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, vision: jax.Array, language: jax.Array, token_mask: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """vision [B, h, w, C], language [B, T, D], token_mask bool [B, T] -> both, updated.

        Third comes what each word attends to, float32 [B, T, h, w], of sum 1 over the pixels.
        """
        B, h, w, C = vision.shape
        T, D = language.shape[1:]

        def dense(features: int, name: str) -> Dense:
            return Dense(features, use_bias=False, dtype=self.dtype, name=name)

        def gated(name: str) -> GatedResidual:
            return GatedResidual(self.dtype, self.shut_gates, name=name)

        # Words are few: what eq. 4 and 5 do with V^ of every pixel is done with the words instead.
        projection, _ = Weights(self.dim, False, self.dtype, name="vision_in")(C)
        pixels = pixels_in_one_axis(vision)
        words = dense(self.dim, "language_in")(language)
        attention = jnp.einsum(
            "bsc,btc->bst", pixels, words @ projection.T, preferred_element_type=jnp.float32
        )
        attention /= math.sqrt(self.dim)  # Eq. 4.
        over_words = jax.nn.softmax(jnp.where(token_mask[:, None], attention, -1e9), axis=2)
        over_pixels = jax.nn.softmax(attention, axis=1)
        for_pixels = jnp.einsum(
            "bst,btc->bsc", over_words.astype(self.dtype), dense(C, "vision_out")(words)
        )
        vision = gated("vision_gate")(pixels, for_pixels).reshape(vision.shape)
        if self.update_language:
            for_words = jnp.einsum("bst,bsc->btc", over_pixels.astype(self.dtype), pixels)
            for_words = dense(D, "language_out")(for_words @ projection)
            language = gated("language_gate")(language, for_words)
        return vision, language, over_pixels.mT.reshape(B, T, h, w)


class CrossAttention(nn.Module):
    """Eq. 7-8: one multi-head attention among pixels and words, added to the pixels."""

    heads: int
    grid: int  # Side of the learned positions.
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, vision: jax.Array, language: jax.Array, token_mask: jax.Array) -> jax.Array:
        """V_o [B, h, w, C], L_o [B, T, D], token_mask bool [B, T] -> S_o [B, h, w, C]."""
        B, h, w, C = vision.shape
        D = language.shape[-1]

        def dense(features: int, name: str) -> Dense:
            return Dense(features, dtype=self.dtype, name=name)

        shape = (self.grid, self.grid, D)
        positions = self.param("positions", nn.initializers.normal(0.02), shape)[None]
        vision = pixels_in_one_axis(vision)
        pixels = dense(D, "vision_in")(vision)
        pixels += resize_bilinear(positions, (h, w)).reshape(1, h * w, D).astype(pixels.dtype)
        both = jnp.concatenate([pixels, dense(D, "language_in")(language)], axis=1)
        mask = jnp.concatenate([jnp.ones((B, h * w), bool), token_mask], axis=1)
        # Of the outputs only the pixels' are used, so only they ask.
        attention = MultiHeadAttention(D, self.heads, self.dtype, name="attention")
        attended = attention(pixels, both, both, mask)
        return (vision + dense(C, "vision_out")(attended)).reshape(B, h, w, C)


class MaskGenerator(nn.Module):
    """Eq. 9: learned queries gather from the fused map into N mask embeddings.

    Paper leaves open: positions and the place of norms. Positions are DETR's: sines for the pixels,
    for the queries themselves. Layers are pre-norm (`generator_pre_norm`): trained from scratch,
    post-norm layers made all queries, and with them all proposals, the same.
    """

    config: CoupAlignConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, fused: jax.Array, train: bool) -> jax.Array:
        """S_o [B, h, w, C] -> Q_o [B, N, generator_dim]."""
        cfg = self.config
        B, h, w, _ = fused.shape
        dim = cfg.generator_dim
        memory = Dense(dim, dtype=self.dtype, name="memory")(pixels_in_one_axis(fused))
        if cfg.generator_pre_norm:
            memory = nn.LayerNorm(EPSILON, dtype=self.dtype, name="memory_norm")(memory)
        queries = self.param("queries", nn.initializers.normal(1.0), (cfg.queries, dim))
        queries = queries.astype(self.dtype)
        positions = sine_positions(h, w, dim).astype(self.dtype)
        masks = jnp.broadcast_to(queries, (B, *queries.shape))
        for i in range(cfg.generator_layers):
            masks = DecoderLayer(
                dim,
                cfg.heads,
                cfg.generator_ffn,
                cfg.dropout,
                self.dtype,
                cfg.generator_pre_norm,
                name=f"layer{i}",
            )(masks, memory, queries, positions, train=train)
        if cfg.generator_pre_norm:
            masks = nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm")(masks)
        return masks


class SegHead(nn.Module):
    """Eq. 10: from the fused map up to the first stage's, adding each stage's map on the way.

    S_o is as coarse as V_4, so the first `Up` leaves the size as it is.
    """

    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        fused: jax.Array,
        features: list[jax.Array],
        train: bool,
        chosen: jax.Array | None = None,
    ) -> Any:
        """S_o [B, h_4, w_4, C_4], stages' outputs [B, h_i, w_i, C_i] -> Y_1 [B, h_1, w_1, dim].

        With `chosen`, a vector [B, dim] of each sample, (Y_1, Y_1 . chosen float32 [B, h_1, w_1]);
        the second is made of what Y_1 is a sum of, and the largest map of a model that only
        predicts need not exist.
        """
        y = fused
        for i, x in reversed(list(enumerate(features, 1))):
            y = ConvBlock(self.dim, self.dtype, relu_first=True, name=f"rho{i}")(y, train)
            coarse, lateral = y, Dense(self.dim, dtype=self.dtype, name=f"gamma{i}")
            y = resize_bilinear(coarse, x.shape[1:3]) + lateral(x)
        if chosen is None:
            return y

        def product(x: jax.Array, vector: jax.Array) -> jax.Array:
            return jnp.einsum("bhwc,bc->bhw", x, vector)

        gamma = lateral.variables["params"]
        products = product(x, chosen @ gamma["kernel"].T) + (chosen @ gamma["bias"])[:, None, None]
        return y, products + resize_bilinear(product(coarse, chosen), x.shape[1:3])


class SMA(nn.Module):
    """Sentence-mask alignment, eq. 11 and the products of eq. 12 that do not involve pixels.

    As Y^_1 = Y_1 W_Y, a proposal Y^_1 . Q^_n is Y_1 . E_n with E_n = W_Y Q^_n: pixels are never
    projected, and by linearity the mask is Y_1 . sum_n Q_w[n] E_n, one product instead of N.
    """

    dim: int  # D, the sentence's width.
    seg_dim: int
    temperature: float = 1.0
    small: bool = False  # Whether W_Y starts small.
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, masks: jax.Array, sentence: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Q_o [B, N, d_q], L_g [B, D] -> float32 Q_w [B, N] and E [B, N, seg_dim]."""
        init = nn.initializers.normal(0.02) if self.small else nn.initializers.lecun_normal()
        masks = Dense(self.dim, use_bias=False, dtype=self.dtype, name="masks")(masks)
        cosine = jnp.einsum("bnd,bd->bn", unit_length(masks), unit_length(sentence))
        embeddings = Dense(
            self.seg_dim, use_bias=False, dtype=self.dtype, kernel_init=init, name="pixels"
        )(masks)
        return jax.nn.softmax(cosine / self.temperature), embeddings.astype(jnp.float32)


class CoupAlign(nn.Module):
    """The whole model. `dtype` is that of activations; parameters are float32."""

    config: CoupAlignConfig
    dtype: Any = jnp.float32
    Config: ClassVar = CoupAlignConfig
    has_details: ClassVar[bool] = True  # The report shows them, see refseg_jax/details.py.

    @property
    def pixels(self) -> str:
        """How images are normalised, see data/transforms.py."""
        return "darknet" if self.config.backbone == "darknet" else "imagenet"

    def setup(self):
        cfg = self.config
        # Under its own name, so that pretrained weights are found.
        setattr(self, cfg.backbone, BACKBONES[cfg.backbone](cfg.vision, dtype=self.dtype))
        self.bert = Bert(cfg.bert, dtype=self.dtype)
        bidirectional = cfg.direction == "bi"
        self.alignments = [
            WPA(cfg.joint_dim, bidirectional, cfg.shut_gates, self.dtype) for _ in cfg.vision.depths
        ]
        self.cross_attention = CrossAttention(cfg.heads, cfg.position_grid, self.dtype)
        self.seg_head = SegHead(cfg.seg_dim, self.dtype)
        log_odds = math.log(cfg.prior / (1 - cfg.prior)) if cfg.prior else 0.0
        if cfg.sma:
            self.mask_generator = MaskGenerator(cfg, self.dtype)
            self.mask_alignment = SMA(
                cfg.bert.hidden,
                cfg.seg_dim,
                cfg.similarity_temperature,
                bool(cfg.prior),
                self.dtype,
            )
            self.bias = 0.0
            if cfg.prior:
                self.bias = self.param("bias", nn.initializers.constant(log_odds), ())
        else:
            # Paper leaves open: what remains without SMA. Here: no proposals either.
            init = nn.initializers.constant(log_odds)
            self.classifier = Dense(1, dtype=self.dtype, bias_init=init)

    def __call__(
        self,
        image: jax.Array,
        tokens: jax.Array,
        token_mask: jax.Array,
        train: bool = False,
        details: bool = False,
    ) -> dict[str, Any]:
        """image f32 [B, H, W, 3] (normalised), tokens int32 [B, T], token_mask bool [B, T].

        Returns float32 `logits` M [B, h, w] at 1/4 (h = ceil(H / 4)) and `pixels` Y_1
        [B, h, w, seg_dim]. With `details` also a dict `details` of float32 arrays to look at:
        `word_attention`, a list of [B, T, h_i, w_i], what each word attends to in each WPA; with
        SMA `proposals` Y_N [B, N, h, w] (logits, whose weighted sum is M but for rounding) and
        `proposal_weights` Q_w [B, N].
        """
        cfg = self.config
        encoder = getattr(self, cfg.backbone)
        vision = encoder.embed(image.astype(self.dtype), train)
        language = self.bert.embed(tokens, train)
        stages = len(cfg.vision.depths)
        depth = cfg.bert.layers // stages
        features, word_attention = [], []
        for i in range(stages):
            # Paper leaves open: where stages 2-4 begin. Here: after patch merging, where a map
            # has the size and width that section 3.2 gives to the stage.
            vision = encoder.merge(i - 1, vision, train) if i else vision
            if i + 1 in cfg.wpa_stages:
                vision, language, attention = self.alignments[i](vision, language, token_mask)
                word_attention.append(attention)
            vision = encoder.stage(i, vision, train)
            language = self.bert.layers(language, token_mask, i * depth, (i + 1) * depth, train)
            features.append(vision)
        fused = self.cross_attention(vision, language, token_mask)

        shown = {"word_attention": word_attention}
        if cfg.sma:
            masks = self.mask_generator(fused, train)
            sentence = sentence_vector(language, token_mask, cfg.sentence)
            weights, embeddings = self.mask_alignment(masks, sentence)
            chosen = jnp.einsum("bn,bnc->bc", weights, embeddings)
            pixels, logits = self.seg_head(fused, features, train, chosen)
            pixels, logits = pixels.astype(jnp.float32), logits + self.bias
            if details:
                shown["proposals"] = jnp.einsum("bhwc,bnc->bnhw", pixels, embeddings) + self.bias
                shown["proposal_weights"] = weights
        else:
            pixels = self.seg_head(fused, features, train).astype(jnp.float32)
            logits = self.classifier(pixels)[..., 0].astype(jnp.float32)
        outputs = {"logits": logits, "pixels": pixels}
        return {**outputs, "details": shown} if details else outputs

    def loss(
        self, outputs: dict[str, Any], mask: jax.Array, valid: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Eq. 13-17: mask bool [B, H, W], valid bool [B] -> (scalar, its parts); `key` unused."""
        cfg = self.config
        logits = resize_bilinear(outputs["logits"], mask.shape[1:])
        loss = masked_mean(sigmoid_bce(logits, mask), valid)
        scalars = {"loss_segmentation": loss}
        if cfg.aux_weight:
            # In the dtype they were computed in, which says that bfloat16 is enough for their loss.
            pixels = outputs["pixels"].astype(self.dtype)
            # Paper leaves open: how the mask is resized to Y_1; by majority.
            labels = majority_downsample(mask, cfg.vision.patch_size)
            per_image = pixel_contrast_loss(
                pixels.reshape(len(pixels), -1, cfg.seg_dim),
                labels.reshape(len(pixels), -1),
                cfg.aux_temperature,
                cfg.aux_normalize,
            )
            scalars["loss_aux"] = masked_mean(per_image, valid)
            loss = loss + cfg.aux_weight * scalars["loss_aux"]
        return loss, scalars
