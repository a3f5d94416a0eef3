"""What LAVT and CrossVLT share in PyTorch: pixels that attend to words, the mask decoder."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pytorch.layers import ConvBlock, GatedResidual, attend, resize
from benchmarks.pytorch.swin_bert import Bert, Swin
from refseg_jax.models.crossvlt import CrossVLTConfig
from refseg_jax.models.lavt import LAVTConfig


def instance_norm(x: Tensor) -> Tensor:
    """Over the pixels of [B,S,C]."""
    return F.instance_norm(x.mT).mT


class PixelWordAttention(nn.Module):
    """vision [B,h,w,C] over language [B,T,D] under mask bool [B,T] -> like vision."""

    def __init__(
        self, channels: int, language: int, dim: int, heads: int, scale: float | None = None
    ):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.query, self.out = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.key, self.value = (nn.Linear(language, dim) for _ in range(2))

    def forward(self, vision: Tensor, language: Tensor, mask: Tensor) -> Tensor:
        query = instance_norm(self.query(vision.flatten(1, 2)))
        key, value = self.key(language), self.value(language)
        y = self.out(attend(query, key, value, self.heads, mask, scale=self.scale))
        return instance_norm(y).reshape(vision.shape)


class MaskDecoder(nn.Module):
    """Maps [B,h_i,w_i,C_i], fine to coarse -> logits of two classes [B,2,*size]."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        dim = widths[-1] // 2
        for i, width in enumerate(widths, 1):
            self.add_module(f"stage_norm{i}", nn.LayerNorm(width))
        for i, width in enumerate(widths[:-1], 2):
            coarse = widths[-1] if i == len(widths) else dim
            self.add_module(f"from{i}", ConvBlock(coarse + width, dim))
        self.classifier = nn.Conv2d(dim, 2, 1)

    def forward(self, features: list[Tensor], size: tuple[int, int]) -> Tensor:
        maps = [
            getattr(self, f"stage_norm{i}")(x).permute(0, 3, 1, 2)
            for i, x in enumerate(features, 1)
        ]
        x = maps.pop()
        while maps:
            finer = maps.pop()
            x = torch.cat([resize(x, finer.shape[2:], align_corners=True), finer], 1)
            x = getattr(self, f"from{len(maps) + 2}")(x)
        return resize(self.classifier(x).float(), size, align_corners=True)


class EarlyFusion(nn.Module):
    """What both models have: encoders, decoder, weighted cross-entropy.

    image float [B,3,H,W], tokens int64 [B,T], token_mask bool [B,T] -> logits [B,H,W].
    """

    def __init__(self, config: LAVTConfig | CrossVLTConfig):
        super().__init__()
        self.config = config
        self.swin, self.bert = Swin(config.swin), Bert(config.bert)
        # Nothing reads what the last gate makes; it is here as checkpoints have it.
        for i, width in enumerate(config.swin.widths):
            self.add_module(f"gates_{i}", GatedResidual(width))
        self.decoder = MaskDecoder(config.swin.widths)
        weights = torch.tensor(config.class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def outputs(self, image: Tensor, tokens: Tensor, token_mask: Tensor) -> tuple:
        """Logits of two classes [B,2,H,W], and what else the loss takes."""
        raise NotImplementedError

    def forward(self, image: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        background, foreground = self.outputs(image, tokens, token_mask)[0].unbind(1)
        return foreground - background

    def task_loss(self, class_logits: Tensor, mask: Tensor) -> Tensor:
        """mask bool [B,H,W] -> scalar."""
        return F.cross_entropy(class_logits, mask.long(), self.class_weights)
