"""CoupAlign in PyTorch: refseg_jax/models/coupalign.py says what the parts are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pytorch.layers import (
    ConvBlock,
    DecoderLayer,
    GatedResidual,
    MultiHeadAttention,
    constant,
    majority_downsample,
    map_positions,
    resize,
)
from benchmarks.pytorch.swin_bert import Bert, Swin
from refseg_jax.models.coupalign import CoupAlignConfig


class WPA(nn.Module):
    """Eq. 1-6: vision [B,h,w,C] and language [B,T,D] -> both, updated; mask bool [B,T]."""

    def __init__(self, channels: int, width: int, dim: int):
        super().__init__()
        self.scale = dim**-0.5
        self.vision_in = nn.Linear(channels, dim, bias=False)
        self.language_in = nn.Linear(width, dim, bias=False)
        self.vision_out = nn.Linear(dim, channels, bias=False)
        self.language_out = nn.Linear(dim, width, bias=False)
        self.vision_gate, self.language_gate = GatedResidual(channels), GatedResidual(width)

    def forward(self, vision: Tensor, language: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        pixels, words = self.vision_in(vision.flatten(1, 2)), self.language_in(language)
        attention = pixels @ words.mT * self.scale
        over_words = attention.masked_fill(~mask[:, None], -1e9).softmax(2)
        # There are fewer words than pixels to project.
        for_pixels = (over_words @ self.vision_out(words)).view(vision.shape)
        for_words = self.language_out(attention.softmax(1).mT @ pixels)
        return self.vision_gate(vision, for_pixels), self.language_gate(language, for_words)


class CrossAttention(nn.Module):
    """Eq. 7-8: V_o [B,h,w,C], L_o [B,T,D], mask bool [B,T] -> S_o [B,h,w,C]."""

    def __init__(self, channels: int, width: int, heads: int, grid: int):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(grid, grid, width))
        self.vision_in, self.vision_out = nn.Linear(channels, width), nn.Linear(width, channels)
        self.language_in = nn.Linear(width, width)
        self.attention = MultiHeadAttention(width, heads)

    def forward(self, vision: Tensor, language: Tensor, mask: Tensor) -> Tensor:
        positions = resize(self.positions.permute(2, 0, 1)[None], vision.shape[1:3])
        pixels = self.vision_in(vision.flatten(1, 2)) + positions.flatten(2).mT
        both = torch.cat([pixels, self.language_in(language)], 1)
        mask = torch.cat([mask.new_ones(pixels.shape[:2]), mask], 1)
        update = self.vision_out(self.attention(pixels, both, both, mask))
        return vision + update.view(vision.shape)


class MaskGenerator(nn.Module):
    """Eq. 9: S_o [B,h,w,C] -> Q_o [B,N,generator_dim]."""

    def __init__(self, channels: int, config: CoupAlignConfig):
        super().__init__()
        assert config.generator_pre_norm
        self.dim, self.depth = config.generator_dim, config.generator_layers
        self.memory, self.memory_norm = nn.Linear(channels, self.dim), nn.LayerNorm(self.dim)
        self.queries = nn.Parameter(torch.randn(config.queries, self.dim))
        sizes = self.dim, config.heads, config.generator_ffn, config.dropout
        for i in range(self.depth):
            self.add_module(f"layer{i}", DecoderLayer(*sizes, pre_norm=True))
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, fused: Tensor) -> Tensor:
        B, h, w, _ = fused.shape
        memory = self.memory_norm(self.memory(fused.flatten(1, 2)))
        keys = memory + constant(map_positions, h, w, self.dim, device=fused.device)
        masks = self.queries.expand(B, -1, -1)
        for i in range(self.depth):
            masks = getattr(self, f"layer{i}")(masks, keys, memory, self.queries)
        return self.norm(masks)


class SegHead(nn.Module):
    """Eq. 10: S_o and the stages' outputs [B,h_i,w_i,C_i] -> Y_1 [B,dim,h_1,w_1]."""

    def __init__(self, widths: tuple[int, ...], dim: int):
        super().__init__()
        for i, width in enumerate(widths, 1):
            channels = width if i == len(widths) else dim
            self.add_module(f"rho{i}", ConvBlock(channels, dim, relu_first=True))
            self.add_module(f"gamma{i}", nn.Linear(width, dim))

    def forward(self, fused: Tensor, features: list[Tensor]) -> Tensor:
        y = fused.permute(0, 3, 1, 2)
        for i, x in reversed(list(enumerate(features, 1))):
            lateral = getattr(self, f"gamma{i}")(x).permute(0, 3, 1, 2)
            y = resize(getattr(self, f"rho{i}")(y), x.shape[1:3]) + lateral
        return y


class SMA(nn.Module):
    """Eq. 11-12: Q_o [B,N,d_q] and L_g [B,D] -> what the pixels are multiplied by [B,seg_dim].

    The weighted sum of masks is the mask of the weighted sum, so pixels are never projected.
    """

    def __init__(self, config: CoupAlignConfig):
        super().__init__()
        self.temperature = config.similarity_temperature
        self.masks = nn.Linear(config.generator_dim, config.bert.hidden, bias=False)
        self.pixels = nn.Linear(config.bert.hidden, config.seg_dim, bias=False)

    def forward(self, masks: Tensor, sentence: Tensor) -> Tensor:
        masks = self.masks(masks)
        cosine = F.cosine_similarity(masks, sentence[:, None], -1)
        weights = (cosine / self.temperature).softmax(-1)
        return (weights[:, None] @ self.pixels(masks))[:, 0]


def contrast(inside: Tensor, outside: Tensor, temperature: float) -> Tensor:
    """Eq. 14-15 of one image over all pairs: vectors of its classes [P,C] and [N,C] -> scalar."""
    pairs = inside @ outside.T / temperature
    loss = 0.0
    for own, opposite in ((inside, pairs.logsumexp(1)), (outside, pairs.logsumexp(0))):
        loss = loss + F.softplus(opposite - own @ own.mean(0) / temperature).mean()
    return loss


def pixel_contrast_loss(pixels: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Eq. 14-16: pixels [B,C,h,w], labels bool [B,h,w] -> scalar."""
    loss = pixels.new_zeros(())
    vectors = F.normalize(pixels.permute(0, 2, 3, 1), dim=-1)
    for vector, label in zip(vectors, labels, strict=True):
        inside, outside = vector[label], vector[~label]
        if len(inside) and len(outside):
            loss = loss + contrast(inside, outside, temperature)
    return loss / len(pixels)


class CoupAlign(nn.Module):
    """image float [B,3,H,W], tokens int64 [B,T], token_mask bool [B,T] -> logits [B,h,w]."""

    def __init__(self, config: CoupAlignConfig):
        super().__init__()
        stages = range(len(config.swin.depths))
        assert config.backbone == "swin" and config.wpa_stages == tuple(i + 1 for i in stages)
        assert config.direction == "bi" and config.sma and config.sentence == "cls"
        assert not config.prior and config.aux_normalize
        self.config = config
        widths, D = config.swin.widths, config.bert.hidden
        self.swin, self.bert = Swin(config.swin), Bert(config.bert)
        for i in stages:
            self.add_module(f"alignments_{i}", WPA(widths[i], D, config.joint_dim))
        self.cross_attention = CrossAttention(widths[-1], D, config.heads, config.position_grid)
        self.seg_head = SegHead(widths, config.seg_dim)
        self.mask_generator = MaskGenerator(widths[-1], config)
        self.mask_alignment = SMA(config)

    def embed(self, image: Tensor, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Y_1 [B,seg_dim,h,w] and logits [B,h,w]."""
        language, vision = self.bert.embeddings(tokens), self.swin.embed(image)
        stages = len(self.config.swin.depths)
        depth = self.config.bert.layers // stages
        features = []
        for i in range(stages):
            vision = self.swin.merge(i - 1, vision) if i else vision
            vision, language = getattr(self, f"alignments_{i}")(vision, language, token_mask)
            vision = self.swin.stage(i, vision)
            language = self.bert.layers(language, token_mask, i * depth, (i + 1) * depth)
            features.append(vision)
        fused = self.cross_attention(vision, language, token_mask)
        pixels = self.seg_head(fused, features)
        chosen = self.mask_alignment(self.mask_generator(fused), language[:, 0])
        return pixels, torch.einsum("bchw,bc->bhw", pixels, chosen)

    def forward(self, image: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        return self.embed(image, tokens, token_mask)[1].float()

    def loss(self, image: Tensor, tokens: Tensor, token_mask: Tensor, mask: Tensor) -> Tensor:
        """Eq. 13-17: mask bool [B,H,W] -> scalar."""
        cfg = self.config
        pixels, logits = self.embed(image, tokens, token_mask)
        logits = resize(logits.float()[:, None], mask.shape[1:])[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, mask.float())
        if cfg.aux_weight:
            labels = majority_downsample(mask, cfg.swin.patch_size)
            loss = loss + cfg.aux_weight * pixel_contrast_loss(pixels, labels, cfg.aux_temperature)
        return loss
