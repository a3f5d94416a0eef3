"""CrossVLT in PyTorch: refseg_jax/models/crossvlt.py says what the parts are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pytorch.early_fusion import EarlyFusion, PixelWordAttention
from benchmarks.pytorch.layers import GatedResidual, resize
from benchmarks.pytorch.swin_bert import BertLayer
from refseg_jax.models.crossvlt import CrossVLTConfig
from refseg_jax.models.encoders.bert import BertConfig


class PixelFusion(nn.Module):
    """Eq. 1-3: vision [B,h,w,C] and language [B,T,D] under mask bool [B,T] -> like vision."""

    def __init__(self, width: int, dim: int, config: CrossVLTConfig):
        super().__init__()
        heads = max(1, dim // config.head_dim)
        self.attention = PixelWordAttention(width, config.bert.hidden, dim, heads)
        self.mix = nn.Linear(width, width)

    def forward(self, vision: Tensor, language: Tensor, mask: Tensor) -> Tensor:
        return F.gelu(self.mix(vision + self.attention(vision, language, mask)))


class LanguageStage(nn.Module):
    """Eq. 5: language [B,T,D] over pixels [B,S,C], then over itself under mask bool [B,T]."""

    def __init__(self, config: BertConfig, depth: int, channels: int):
        super().__init__()
        self.depth = depth
        self.fusion = BertLayer(config, channels)
        for i in range(depth - 1):
            self.add_module(f"blocks_{i}", BertLayer(config))

    def forward(self, language: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        language = self.fusion(language, None, pixels)
        for i in range(self.depth - 1):
            language = getattr(self, f"blocks_{i}")(language, mask)
        return language


class Alignment(nn.Module):
    """Eq. 6: vision [B,h,w,C] and sentence [B,D] -> cosines [B,h,w]."""

    def __init__(self, width: int, config: CrossVLTConfig):
        super().__init__()
        self.vision = nn.Linear(width, config.align_dim)
        self.language = nn.Linear(config.bert.hidden, config.align_dim)

    def forward(self, vision: Tensor, sentence: Tensor) -> Tensor:
        pixels = F.normalize(self.vision(vision), dim=-1)
        sentence = F.normalize(self.language(sentence), dim=-1)
        return torch.einsum("bhwc,bc->bhw", pixels, sentence)


class CrossVLT(EarlyFusion):
    """The whole model."""

    def __init__(self, config: CrossVLTConfig):
        super().__init__(config)
        widths = config.swin.widths
        stages = tuple(range(1, len(widths) + 1))
        assert config.fusion_stages == config.align_stages == stages and config.direction == "bi"
        assert config.align_loss == "align" and config.align_at == "input"
        for i, width in enumerate(widths):
            dim = width if i else 2 * width
            self.add_module(f"fusions_{i}", PixelFusion(width, dim, config))
            self.add_module(f"alignments_{i}", Alignment(width, config))
            if i:
                depth = config.language_depths[i - 1]
                language = LanguageStage(config.bert, depth, width)
                self.add_module(f"language_stages_{i - 1}", language)
                self.add_module(f"merged_fusions_{i - 1}", PixelFusion(width, width, config))
                self.add_module(f"merged_gates_{i - 1}", GatedResidual(width))
        self.temperature = nn.Parameter(torch.ones(len(widths)))

    def outputs(
        self, image: Tensor, tokens: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        language, vision = self.bert(tokens, token_mask), self.swin.embed(image)
        features, similarities = [], []
        for i in range(len(self.config.swin.depths)):
            if i:
                vision = getattr(self, f"gates_{i - 1}")(vision, features[-1])
                vision = self.swin.merge(i - 1, vision)
                update = getattr(self, f"merged_fusions_{i - 1}")(vision, language, token_mask)
                vision = getattr(self, f"merged_gates_{i - 1}")(vision, update)
                stage = getattr(self, f"language_stages_{i - 1}")
                language = stage(language, token_mask, vision.flatten(1, 2))
            vision = self.swin.stage(i, vision)
            similarity = getattr(self, f"alignments_{i}")(vision, language[:, 0])
            similarities.append(similarity / self.temperature[i])
            features.append(getattr(self, f"fusions_{i}")(vision, language, token_mask))
        return self.decoder(features, image.shape[2:]), similarities

    def loss(self, image: Tensor, tokens: Tensor, token_mask: Tensor, mask: Tensor) -> Tensor:
        """Eq. 6-9: mask bool [B,H,W] -> scalar."""
        cfg, target = self.config, mask.float()
        class_logits, similarities = self.outputs(image, tokens, token_mask)
        loss = cfg.task_weight * self.task_loss(class_logits, mask)
        for logits in similarities:
            logits = resize(logits.float()[:, None], mask.shape[1:], align_corners=True)[:, 0]
            align = F.binary_cross_entropy_with_logits(logits, target)
            loss = loss + cfg.align_weight * align
        return loss
