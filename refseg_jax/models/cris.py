"""CRIS: "CLIP-Driven Referring Image Segmentation".

CLIP's encoders give three maps of the image, word features and a vector of the whole expression. A
neck multiplies the coarsest map with that vector and joins the maps at 1/16; in a decoder its
pixels attend to each other and to the words; and of the vector a projector makes the 3x3
convolution that finds the mask. The form is that of the authors' released code, whose weights load.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from refseg_jax.errors import UserError
from refseg_jax.losses.segmentation import masked_mean, nearest_downsample, sigmoid_bce
from refseg_jax.models.encoders.clip import ClipText, ClipTextConfig, ClipVision, ClipVisionConfig
from refseg_jax.models.layers.attention_kernel import self_attention
from refseg_jax.models.layers.conv import ConvNorm
from refseg_jax.models.layers.dense import Dense, add_bias
from refseg_jax.models.layers.dropout import Dropout, check_rate, words_of
from refseg_jax.models.layers.layer_norm import LayerNorm, NormWeights
from refseg_jax.models.layers.norms import EPSILON, BatchNorm, Vectors, normalize_by
from refseg_jax.models.layers.residual_norm import residual_norm
from refseg_jax.models.layers.resize import upsample, upsampled_conv
from refseg_jax.models.layers.sample_products import sample_products
from refseg_jax.models.layers.sentence import CLIP_SENTENCES, sentence_vector


@dataclasses.dataclass(frozen=True)
class CRISConfig:
    """Defaults are those of the released code, with CLIP's ResNet-101.

    Beside ResNet-50, `embed_dim` of both encoders is 1024.
    """

    vision: ClipVisionConfig = ClipVisionConfig()
    text: ClipTextConfig = ClipTextConfig()
    # Of the maps at 1/8, 1/16 and 1/32. The second is also the decoder's width, the words' too.
    neck_dims: tuple[int, ...] = (256, 512, 1024)
    decoder_layers: int = 3
    heads: int = 8
    ffn: int = 2048
    dropout: float = 0.1  # In the decoder.
    # "eot": the end mark's state, in the space of images. "mean": of all words, where the end mark
    # is not pretrained.
    sentence: str = "eot"
    # The sentence's kernel small and its bias, at first, the log-odds of this foreground share:
    # training from scratch then starts calmly. 0: neither, as released.
    prior: float = 0.0

    def __post_init__(self):
        check_rate(self.dropout)
        if self.sentence not in CLIP_SENTENCES:
            raise UserError(
                f"config.model.sentence={self.sentence!r} is not one of {', '.join(CLIP_SENTENCES)}"
            )
        if len(self.neck_dims) != 3 or len(self.vision.depths) < 3:
            raise UserError(
                f"config.model.neck_dims={self.neck_dims} and vision.depths="
                f"{self.vision.depths}: CRIS has three widths in its neck, for the last of four "
                "stages (or of three: all its maps are then twice as fine)"
            )
        if self.vision.variant != "clip" or not self.vision.pool:
            raise UserError("config.model.vision: CRIS needs CLIP's ResNet with its attention pool")
        dim = self.dim
        if dim % 4 or dim % self.heads:
            raise UserError(
                f"config.model.neck_dims={self.neck_dims}: the second must be a multiple of 4 and "
                f"of heads={self.heads}"
            )
        if self.text.hidden != dim:
            raise UserError(
                f"config.model.text.hidden={self.text.hidden} must be the second of "
                f"neck_dims={self.neck_dims}"
            )

    @property
    def dim(self) -> int:
        """Width of the map at 1/16 and of the decoder."""
        return self.neck_dims[1]


def _sines(length: int, dim: int) -> np.ndarray:
    """Positions 0 ... length - 1 of "Attention is all you need": float32 [length, dim]."""
    angle = np.arange(length)[:, None] * 1e4 ** (-np.arange(0, dim, 2) / dim)
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(length, dim).astype(np.float32)


@functools.cache
def pixel_positions(h: int, w: int, dim: int) -> np.ndarray:
    """Sine positions float32 [h * w, dim], row by row; first half: the column, second: the row."""
    columns, rows = _sines(w, dim // 2), _sines(h, dim // 2)
    return np.concatenate([np.tile(columns, (h, 1)), np.repeat(rows, w, axis=0)], axis=-1)


class Neck(nn.Module):
    """The maps at 1/8, 1/16 and 1/32, the last times the sentence, joined at 1/16."""

    dims: tuple[int, ...]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: list[jax.Array], sentence: jax.Array, train: bool) -> jax.Array:
        """Maps [B, h_i, w_i, C_i], fine to coarse, sentence [B, E] -> [B, h_2, w_2, dims[1]]."""
        fine, middle, coarse = maps
        B, h, w, _ = middle.shape

        def conv(x: Any, dim: int, size: int, name: str) -> jax.Array:
            module = ConvNorm(dim, size, activation=nn.relu, dtype=self.dtype, name=name)
            return module(x, train)

        def norm(x: jax.Array, name: str) -> jax.Array:
            return nn.relu(BatchNorm(dtype=self.dtype, name=name)(x, train))

        def join(*xs: jax.Array, name: str) -> jax.Array:
            return conv(xs, self.dims[1], 1, name)

        said = Dense(self.dims[2], use_bias=False, dtype=self.dtype, name="sentence")(sentence)
        said = norm(said, "sentence_norm")[:, None, None]
        coarse = norm(conv(coarse, self.dims[2], 1, "coarse") * said, "coarse_norm")
        middle = conv(middle, self.dims[1], 3, "middle")
        middle = join(middle, upsample(coarse, (h, w)), name="middle_join")
        fine = nn.avg_pool(conv(fine, self.dims[0], 3, "fine"), (2, 2), (2, 2))
        fine = join(fine, middle, name="fine_join")

        fine, middle, coarse = (
            conv(x, self.dims[1], 3, f"{name}_out")
            for x, name in ((fine, "fine"), (middle, "middle"), (coarse, "coarse"))
        )
        x = join(fine, middle, upsample(coarse, (h, w)), name="join")
        # Each pixel's place, (column, row) in -1 ... 1.
        places = np.stack(np.meshgrid(np.linspace(-1, 1, w), np.linspace(-1, 1, h)), -1)
        places = jnp.broadcast_to(jnp.asarray(places, x.dtype), (B, h, w, 2))
        x = conv(jnp.concatenate([x, places], -1), self.dims[1], 3, "places")
        return conv(x, self.dims[1], 3, "out")


class Attention(nn.Module):
    """Multi-head attention with dropout of its weights, in PyTorch's layout.

    The projections of queries, keys and values are one array, `kernel` [C, 3 C], so that published
    weights are ours as they are.
    """

    heads: int
    dropout: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        key_mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """queries [B, N, C], keys and values [B, T, C], key_mask bool [B, T] -> [B, N, C]."""
        C = queries.shape[-1]
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), (C, 3 * C))
        bias = self.param("bias", nn.initializers.zeros, (3 * C,))
        weights, shifts = jnp.split(kernel.astype(self.dtype), 3, -1), jnp.split(bias, 3)
        query, key, value = (
            add_bias(x @ weight, shift)
            for x, weight, shift in zip((queries, keys, values), weights, shifts, strict=True)
        )
        width = C // self.heads
        if key_mask is None:
            dropout = self.dropout if train else 0.0
            dropped = self.make_rng("dropout") if dropout else None
            query /= math.sqrt(width)
            gathered = self_attention(query, key, value, self.heads, dropout, dropped)
        else:
            query, key, value = (
                x.reshape(*x.shape[:2], self.heads, width) for x in (query, key, value)
            )
            logits = jnp.einsum("bnhd,bthd->bhnt", query, key, preferred_element_type=jnp.float32)
            logits = jnp.where(key_mask[:, None, None], logits / math.sqrt(width), -1e9)
            attention = Dropout(self.dropout)(jax.nn.softmax(logits), train)
            gathered = jnp.einsum("bhnt,bthd->bnhd", attention.astype(self.dtype), value)
        return Dense(C, dtype=self.dtype, name="out")(gathered.reshape(queries.shape))


class DecoderLayer(nn.Module):
    """Pixels attend to each other, then to the words; norms before and after; feed-forward."""

    config: CRISConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        pixels: jax.Array,
        words: jax.Array,
        pixel_places: jax.Array,
        word_places: jax.Array,
        token_mask: jax.Array,
        train: bool,
    ) -> jax.Array:
        """pixels [B, S, C], words [B, T, C], positions [S, C] and [T, C] -> pixels."""
        cfg = self.config

        def norm(x: jax.Array, name: str, keep: bool = False) -> Any:
            return LayerNorm(EPSILON, self.dtype, name=name)(x, keep)

        def add(pixels: jax.Array, update: jax.Array, end: str, begin: str) -> Any:
            """pixels + dropout(norm(update)), and the norm of that."""
            norms = (NormWeights(name=name)(cfg.dim) for name in (end, begin))
            rate = cfg.dropout if train else 0.0
            words = words_of(self.make_rng("dropout"), pixels.shape[:1]) if rate else None
            return residual_norm(pixels, update, *norms, EPSILON, rate, words)

        def attention(name: str) -> Attention:
            return Attention(cfg.heads, cfg.dropout, self.dtype, name=name)

        def dense(width: int, name: str) -> Dense:
            return Dense(width, dtype=self.dtype, name=name)

        pixels, y = norm(pixels, "self_norm", keep=True)
        placed = y + pixel_places
        y = attention("self_attention")(placed, placed, y, train=train)
        pixels, y = add(pixels, y, "self_end", "cross_norm")

        placed = y + pixel_places
        y = attention("cross_attention")(placed, words + word_places, words, token_mask, train)
        pixels, y = add(pixels, y, "cross_end", "ffn_norm")

        y = dense(cfg.ffn, "fc1")(y)
        y = Dropout(cfg.dropout, rectified=True)(y, train)
        y = dense(cfg.dim, "fc2")(norm(y, "ffn_middle"))
        return pixels + Dropout(cfg.dropout)(y, train)


class Decoder(nn.Module):
    """The pixels of the neck's map and the words, in `decoder_layers` layers and a last norm."""

    config: CRISConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, words: jax.Array, token_mask: jax.Array, train: bool
    ) -> jax.Array:
        """x [B, h, w, C], words [B, T, C], token_mask bool [B, T] -> [B, h, w, C]."""
        B, h, w, C = x.shape
        places = pixel_positions(h, w, C), _sines(words.shape[1], C)
        places = [jnp.asarray(x, self.dtype) for x in places]
        pixels = x.reshape(B, h * w, C)
        for i in range(self.config.decoder_layers):
            layer = DecoderLayer(self.config, self.dtype, name=f"layer{i}")
            pixels = layer(pixels, words, *places, token_mask, train)
        return LayerNorm(EPSILON, self.dtype, name="norm")(pixels).reshape(x.shape)


class DoubleConv(nn.Module):
    """3x3 convolution of the map at twice its size, batch norm, ReLU: [B,h,w,C] -> [B,2h,2w,dim].

    Parameters `kernel` [3,3,C,dim] and `norm`.
    """

    dim: int
    dtype: Any = jnp.float32

    def __call__(self, x: jax.Array, train: bool, before: Vectors | None = None) -> jax.Array:
        """`before` are a batch norm, and with it a ReLU, that x has yet to go through."""
        x, norm = self.unnormed(x, train, before)
        return nn.relu(normalize_by(x, norm).astype(self.dtype))

    @nn.compact
    def unnormed(
        self, x: jax.Array, train: bool, before: Vectors | None = None
    ) -> tuple[jax.Array, Vectors]:
        """The result without norm and ReLU, and that norm."""
        _, h, w, C = x.shape
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel = self.param("kernel", init, (3, 3, C, self.dim))
        x = upsampled_conv(x, kernel.astype(self.dtype), (2 * h, 2 * w), before)
        return x, BatchNorm(name="norm").vectors(x, train)


class Projector(nn.Module):
    """A map of four times the size, convolved with a 3x3 kernel that the sentence gives.

    Before that there is a 1x1 convolution V W + b of the map V (`kernel`, `bias`). Its product with
    a cell K of the sentence's kernel is V (W K) + b K: with only 9 cells, V W is never needed.
    """

    dim: int  # Of the large map.
    prior: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, sentence: jax.Array, train: bool) -> jax.Array:
        """x [B, h, w, C], sentence [B, E] -> logits float32 [B, 4 h, 4 w]."""
        C = self.dim
        x, norm = DoubleConv(2 * C, self.dtype, name="up1").unnormed(x, train)
        x = DoubleConv(C, self.dtype, name="up2")(x, train, norm)
        weight = self.param("kernel", nn.initializers.lecun_normal(), (1, 1, C, C))[0, 0]
        bias = self.param("bias", nn.initializers.zeros, (C,))

        def start(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            log_odds = math.log(self.prior / (1 - self.prior)) if self.prior else 0.0
            return jnp.zeros(shape, dtype).at[-1].set(log_odds)

        # As PyTorch draws a linear layer, a third of the usual variance; or small.
        init = nn.initializers.variance_scaling(0.01 if self.prior else 1 / 3, "fan_in", "uniform")
        said = Dense(
            9 * C + 1, dtype=self.dtype, kernel_init=init, bias_init=start, name="sentence"
        )(sentence)
        cells, shift = said[:, :-1].reshape(-1, C, 9), said[:, -1]
        mixed = jnp.einsum("cd,bdk->bck", weight.astype(self.dtype), cells)
        products = sample_products(x, mixed.astype(self.dtype))
        products += jnp.einsum("d,bdk->bk", bias, cells)[:, :, None, None]
        # Beyond the border V W + b is 0, and so are its products.
        products = jnp.pad(products, ((0, 0), (0, 0), (1, 1), (1, 1)))
        h, w = x.shape[1:3]
        logits = sum(products[:, k, k // 3 :, k % 3 :][:, :h, :w] for k in range(9))
        return logits + shift[:, None, None]


class CRIS(nn.Module):
    """The whole model. `dtype` is that of activations; parameters are float32."""

    config: CRISConfig
    dtype: Any = jnp.float32
    Config: ClassVar = CRISConfig
    pixels: ClassVar[str] = "clip"  # How images are normalised, see data/transforms.py.
    # Probabilities, not logits, are resized: bicubic, the corners' centres where they are.
    resizes_probabilities: ClassVar[bool] = True

    def setup(self):
        cfg = self.config
        self.vision = ClipVision(cfg.vision, dtype=self.dtype)
        self.text = ClipText(cfg.text, dtype=self.dtype)
        self.neck = Neck(cfg.neck_dims, self.dtype)
        self.decoder = Decoder(cfg, self.dtype)
        self.projector = Projector(cfg.dim // 2, cfg.prior, self.dtype)

    def __call__(
        self, image: jax.Array, tokens: jax.Array, token_mask: jax.Array, train: bool = False
    ) -> dict[str, jax.Array]:
        """image f32 [B, H, W, 3] (normalised), tokens int32 [B, T], token_mask bool [B, T].

        Returns float32 `logits` [B, h, w] at 1/4: four times the side of the map at 1/16.
        """
        *_, fine, middle, _, coarse = self.vision(image.astype(self.dtype), train)
        words, sentence = self.text(tokens, token_mask)
        if self.config.sentence == "mean":
            sentence = sentence_vector(words, token_mask, "mean") @ self.text.projection
        sentence = sentence.astype(self.dtype)
        x = self.neck([fine, middle, coarse], sentence, train)
        x = self.decoder(x, words, token_mask, train)
        return {"logits": self.projector(x, sentence, train)}

    def loss(
        self, outputs: dict[str, jax.Array], mask: jax.Array, valid: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy at 1/4, of the mask's nearest pixels.

        mask bool [B, H, W], valid bool [B] -> (scalar, no parts). No use of `key`.
        """
        logits = outputs["logits"]
        mask = nearest_downsample(mask, logits.shape[1:])
        return masked_mean(sigmoid_bce(logits, mask), valid), {}
