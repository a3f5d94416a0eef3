"""LAVT in PyTorch: refseg_jax/models/lavt.py says what the parts are."""

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pytorch.early_fusion import EarlyFusion, PixelWordAttention
from refseg_jax.models.lavt import LAVTConfig


class PWAM(nn.Module):
    """vision [B,h,w,C] and language [B,T,D] under mask bool [B,T] -> like vision."""

    def __init__(self, width: int, language: int, heads: int):
        super().__init__()
        self.vision, self.mix = (nn.Linear(width, width) for _ in range(2))
        self.attention = PixelWordAttention(width, language, width, heads, width**-0.5)

    def forward(self, vision: Tensor, language: Tensor, mask: Tensor) -> Tensor:
        gathered = self.attention(vision, language, mask)
        return F.gelu(self.mix(F.gelu(self.vision(vision)) * gathered))


class LAVT(EarlyFusion):
    """The whole model."""

    def __init__(self, config: LAVTConfig):
        super().__init__(config)
        for i, (width, heads) in enumerate(
            zip(config.swin.widths, config.fusion_heads, strict=True)
        ):
            self.add_module(f"fusions_{i}", PWAM(width, config.bert.hidden, heads))

    def outputs(self, image: Tensor, tokens: Tensor, token_mask: Tensor) -> tuple[Tensor]:
        language, vision = self.bert(tokens, token_mask), self.swin.embed(image)
        features = []
        for i in range(len(self.config.swin.depths)):
            if i:
                vision = getattr(self, f"gates_{i - 1}")(vision, features[-1])
                vision = self.swin.merge(i - 1, vision)
            vision = self.swin.stage(i, vision)
            features.append(getattr(self, f"fusions_{i}")(vision, language, token_mask))
        return (self.decoder(features, image.shape[2:]),)

    def loss(self, image: Tensor, tokens: Tensor, token_mask: Tensor, mask: Tensor) -> Tensor:
        """mask bool [B,H,W] -> scalar."""
        return self.task_loss(*self.outputs(image, tokens, token_mask), mask)
