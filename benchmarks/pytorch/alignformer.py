"""AlignFormer in PyTorch: refseg_jax/models/alignformer.py says what the parts are.

Deformable attention is the `grid_sample` form that its authors publish beside their CUDA operator.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pytorch.layers import (
    MLP,
    AddNorm,
    DecoderLayer,
    FeedForward,
    constant,
    majority_downsample,
    map_positions,
    resize,
    to_map,
)
from benchmarks.pytorch.swin_bert import Bert, Swin
from refseg_jax.models.alignformer import AlignFormerConfig
from refseg_jax.models.layers.deformable import Shapes, pixel_centres


class GatedFusion(nn.Module):
    """Eq. 4-7: x and response [B,n,width] -> like x."""

    def __init__(self, width: int, config: AlignFormerConfig):
        super().__init__()
        self.fuse = MLP(2 * width, int(width * config.fuse_hidden), width, F.gelu)
        self.gate = MLP(width, int(width * config.gate_hidden), width)

    def forward(self, x: Tensor, response: Tensor) -> Tensor:
        m = self.fuse(torch.cat([x, response], -1))
        return x + m * self.gate(m).tanh()


class VLBA(nn.Module):
    """Eq. 1-7: vision [B,S,C] and language [B,T,D] -> both, updated; mask bool [B,T]."""

    def __init__(self, channels: int, width: int, config: AlignFormerConfig):
        super().__init__()
        self.vision_query, self.vision_value, self.w1 = (
            nn.Linear(channels, channels) for _ in range(3)
        )
        self.language_key, self.language_value = (nn.Linear(width, channels) for _ in range(2))
        self.w2 = nn.Linear(channels, width)
        self.vision_fusion = GatedFusion(channels, config)
        self.language_fusion = GatedFusion(width, config)

    def forward(self, vision: Tensor, language: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.vision_query(vision) @ self.language_key(language).mT
        attention = attention / math.sqrt(vision.shape[-1])
        over_tokens = attention.masked_fill(~mask[:, None], -1e9).softmax(2)
        over_pixels = attention.softmax(1)
        for_vision = self.w1(over_tokens @ self.language_value(language))
        for_language = self.w2(over_pixels.mT @ self.vision_value(vision))
        return self.vision_fusion(vision, for_vision), self.language_fusion(language, for_language)


def level_sizes(shapes: Shapes) -> np.ndarray:
    """(w, h) of each level: float32 [L,1,2]."""
    return np.array([[shape[::-1]] for shape in shapes], np.float32)


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention: query [B,Lq,dim] over inputs [B,S,dim] -> like query."""

    def __init__(self, dim: int, heads: int, levels: int, points: int):
        super().__init__()
        self.grid = (heads, levels, points)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.sampling_offsets = nn.Linear(dim, 2 * math.prod(self.grid))
        self.attention_weights = nn.Linear(dim, math.prod(self.grid))

    def forward(self, query: Tensor, inputs: Tensor, shapes: Shapes) -> Tensor:
        heads = self.grid[0]
        B, S, dim = inputs.shape
        value = self.value_proj(inputs).view(B, S, heads, -1).permute(0, 2, 3, 1).flatten(0, 1)
        # From here on heads stand beside images: [B*heads,...].
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.grid, 2))
        offsets = offsets.transpose(1, 2).flatten(0, 1)
        weights = self.attention_weights(query).unflatten(-1, (heads, -1)).softmax(-1)
        weights = weights.transpose(1, 2).flatten(0, 1)

        size = constant(level_sizes, shapes, device=query.device)
        centres = constant(pixel_centres, shapes, device=query.device)
        # `grid_sample` counts from -1 to 1.
        places = 2 * (centres[:, None, None] + offsets / size) - 1
        levels = value.split([h * w for h, w in shapes], 2)
        sampled = [
            F.grid_sample(level.unflatten(2, shape), places[:, :, i], align_corners=False)
            for i, (level, shape) in enumerate(zip(levels, shapes, strict=True))
        ]
        y = (torch.cat(sampled, -1) * weights[:, None]).sum(-1)
        return self.output_proj(y.view(B, dim, -1).mT)


class DeformableEncoderLayer(nn.Module):
    """Deformable attention of all levels over all levels, then a feed-forward block."""

    def __init__(self, config: AlignFormerConfig, levels: int):
        super().__init__()
        dim = config.dim
        self.attention = MSDeformAttn(dim, config.heads, levels, config.points)
        self.attention_end = AddNorm(dim, config.dropout)
        self.feed_forward = FeedForward(dim, config.pixel_ffn, config.dropout)

    def forward(self, x: Tensor, position: Tensor, shapes: Shapes) -> Tensor:
        x = self.attention_end(x, self.attention(x + position, x, shapes))
        return self.feed_forward(x)


class DeformableEncoder(nn.Module):
    """The levels one after another [B,S,dim] -> same."""

    def __init__(self, config: AlignFormerConfig, levels: int):
        super().__init__()
        self.dim, self.depth = config.dim, config.pixel_layers
        self.level_embedding = nn.Parameter(torch.randn(levels, config.dim))
        for i in range(self.depth):
            self.add_module(f"layer{i}", DeformableEncoderLayer(config, levels))

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        position = torch.cat(
            [
                constant(map_positions, *shape, self.dim, device=x.device) + embedding
                for shape, embedding in zip(shapes, self.level_embedding, strict=True)
            ]
        )
        for i in range(self.depth):
            x = getattr(self, f"layer{i}")(x, position, shapes)
        return x


class PixelDecoder(nn.Module):
    """Section 3.2: four maps [B,h,w,C] -> V_e [B,dim,h_1,w_1], levels [B,S_i,dim], their sizes."""

    def __init__(self, config: AlignFormerConfig):
        super().__init__()
        dim, widths = config.dim, config.swin.widths[1:]
        for i, width in enumerate(widths, 2):
            self.add_module(f"project{i}", nn.Linear(width, dim))
            self.add_module(f"project{i}_norm", nn.GroupNorm(math.gcd(32, dim), dim))
        self.encoder = DeformableEncoder(config, len(widths))

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor], Shapes]:
        finest, *levels = features
        shapes = tuple(tuple(x.shape[1:3]) for x in levels)
        flat = []
        for i, x in enumerate(levels, 2):
            x = getattr(self, f"project{i}")(x.flatten(1, 2))
            flat.append(getattr(self, f"project{i}_norm")(x.mT).mT)
        refined = self.encoder(torch.cat(flat, 1), shapes)
        refined = refined.split([h * w for h, w in shapes], 1)
        return resize(to_map(refined[0], shapes[0]), finest.shape[1:3]), refined, shapes


class CentreDecoder(nn.Module):
    """Section 3.2: language [B,T,D] and the levels [B,S_i,dim] -> L_e [B,dim]."""

    def __init__(self, config: AlignFormerConfig, levels: int):
        super().__init__()
        self.dim, self.depth = config.dim, config.decoder_layers
        self.query = nn.Linear(config.bert.hidden, config.dim)
        self.level_embedding = nn.Parameter(torch.randn(levels, config.dim))
        sizes = config.dim, config.heads, config.decoder_ffn, config.dropout
        for i in range(self.depth):
            self.add_module(f"layer{i}", DecoderLayer(*sizes))

    def forward(self, language: Tensor, levels: list[Tensor], shapes: Shapes) -> Tensor:
        query = self.query(language[:, :1])
        memory = [x + y for x, y in zip(levels, self.level_embedding, strict=True)]
        keys = [
            x + constant(map_positions, *shape, self.dim, device=x.device)
            for x, shape in zip(memory, shapes, strict=True)
        ]
        for i in range(self.depth):
            level = len(levels) - 1 - i % len(levels)
            query = getattr(self, f"layer{i}")(query, keys[level], memory[level])
        return query[:, 0]


def cmic_loss(pixels: Tensor, logits: Tensor, labels: Tensor, samples: int) -> Tensor:
    """Eq. 10-12: pixels [B,S,C], logits [B,S], labels bool [B,S] -> scalar."""
    confidence = logits.detach().sigmoid()
    predicted = logits > 0
    loss = 0.0
    for wrong, right, weight in (
        (predicted & ~labels, ~predicted & ~labels, 1 - confidence),
        (~predicted & labels, predicted & labels, confidence),
    ):
        order = torch.rand_like(confidence).masked_fill(~right, -1)
        order, index = order.topk(min(samples, order.shape[1]))
        chosen = pixels.gather(1, index[..., None].expand(-1, -1, pixels.shape[-1]))
        weight = weight.gather(1, index) * (order >= 0)
        per_pixel = (F.softplus(-(pixels @ chosen.mT)) * weight[:, None]).sum(-1)
        loss = loss + (per_pixel * wrong).sum(1) / wrong.sum(1).clamp(min=1)
    return loss.mean()


class AlignFormer(nn.Module):
    """image float [B,3,H,W], tokens int64 [B,T], token_mask bool [B,T] -> logits [B,h,w]."""

    def __init__(self, config: AlignFormerConfig):
        super().__init__()
        assert config.fusion == "vlba" and config.grouping and config.query == "cls"
        assert not config.lateral and not config.prior
        self.config = config
        widths = config.swin.widths
        self.swin, self.bert = Swin(config.swin), Bert(config.bert)
        for i, width in enumerate(widths):
            self.add_module(f"fusions_{i}", VLBA(width, config.bert.hidden, config))
        self.pixel_decoder = PixelDecoder(config)
        self.centre_decoder = CentreDecoder(config, len(widths) - 1)

    def embed(self, image: Tensor, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """V_e [B,dim,h,w] and logits [B,h,w]."""
        language, vision = self.bert(tokens, token_mask), self.swin.embed(image)
        features = []
        for i in range(len(self.config.swin.depths)):
            vision = self.swin.stage(i, self.swin.merge(i - 1, vision) if i else vision)
            fusion = getattr(self, f"fusions_{i}")
            flat, language = fusion(vision.flatten(1, 2), language, token_mask)
            vision = flat.view(vision.shape)
            features.append(vision)
        pixels, levels, shapes = self.pixel_decoder(features)
        centre = self.centre_decoder(language, levels, shapes)
        return pixels, torch.einsum("bchw,bc->bhw", pixels, centre)

    def forward(self, image: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        return self.embed(image, tokens, token_mask)[1].float()

    def loss(self, image: Tensor, tokens: Tensor, token_mask: Tensor, mask: Tensor) -> Tensor:
        """Eq. 13: mask bool [B,H,W] -> scalar."""
        cfg = self.config
        pixels, logits = self.embed(image, tokens, token_mask)
        labels = majority_downsample(mask, cfg.swin.patch_size)
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        if cfg.cmic_weight:
            flat = pixels.flatten(2).mT, logits.flatten(1).float(), labels.flatten(1)
            loss = loss + cfg.cmic_weight * cmic_loss(*flat, cfg.cmic_samples)
        return loss
