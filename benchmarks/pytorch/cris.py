"""CRIS in PyTorch, under the names of refseg_jax/models/cris.py.

The operations are those of the released code: maps are enlarged before their 3x3 convolutions, and
the sentence's kernel is a grouped convolution of the mixed map.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pytorch.clip import ClipText, ClipVision, ConvNorm
from benchmarks.pytorch.layers import attend, constant, resize, to_map
from refseg_jax.models.cris import CRISConfig, pixel_positions

positions = pixel_positions.__wrapped__  # torch.compile breaks at functions with a cache.


class Neck(nn.Module):
    def __init__(self, config: CRISConfig):
        super().__init__()
        fine, dim, coarse = config.neck_dims
        *_, fine_in, middle_in, _ = config.vision.widths
        embed = config.vision.embed_dim
        self.sentence = nn.Linear(embed, coarse, bias=False)
        self.sentence_norm, self.coarse_norm = nn.BatchNorm1d(coarse), nn.BatchNorm2d(coarse)
        self.coarse = ConvNorm(embed, coarse, 1)
        self.middle = ConvNorm(middle_in, dim, 3)
        self.middle_join = ConvNorm(dim + coarse, dim, 1)
        self.fine = ConvNorm(fine_in, fine, 3)
        self.fine_join = ConvNorm(fine + dim, dim, 1)
        self.fine_out, self.middle_out = ConvNorm(dim, dim, 3), ConvNorm(dim, dim, 3)
        self.coarse_out = ConvNorm(coarse, dim, 3)
        self.join = ConvNorm(3 * dim, dim, 1)
        self.places, self.out = ConvNorm(dim + 2, dim, 3), ConvNorm(dim, dim, 3)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor, sentence: Tensor) -> Tensor:
        size = middle.shape[2:]
        said = F.relu(self.sentence_norm(self.sentence(sentence)))[..., None, None]
        coarse = F.relu(self.coarse_norm(self.coarse(coarse) * said))
        middle = torch.cat([self.middle(middle), resize(coarse, size)], 1)
        middle = self.middle_join(middle)
        fine = self.fine_join(torch.cat([F.avg_pool2d(self.fine(fine), 2), middle], 1))
        maps = [self.fine_out(fine), self.middle_out(middle), resize(self.coarse_out(coarse), size)]
        x = self.join(torch.cat(maps, 1))
        rows, columns = (torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in size)
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
        return self.out(self.places(torch.cat([x, places.expand(len(x), -1, -1, -1)], 1)))


class Attention(nn.Linear):
    """Its own weight and bias project queries, keys and values, one after the other."""

    def __init__(self, config: CRISConfig):
        super().__init__(config.dim, 3 * config.dim)
        self.heads, self.dropout = config.heads, config.dropout
        self.out = nn.Linear(config.dim, config.dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        inputs = query, key, value
        projected = map(F.linear, inputs, self.weight.chunk(3), self.bias.chunk(3))
        dropout = self.dropout if self.training else 0.0
        return self.out(attend(*projected, self.heads, mask, dropout))


class DecoderLayer(nn.Module):
    def __init__(self, config: CRISConfig):
        super().__init__()
        dim, ffn = config.dim, config.ffn
        for name in ("self_norm", "self_end", "cross_norm", "cross_end", "ffn_norm"):
            self.add_module(name, nn.LayerNorm(dim))
        self.self_attention, self.cross_attention = Attention(config), Attention(config)
        self.fc1, self.ffn_middle, self.fc2 = (
            nn.Linear(dim, ffn),
            nn.LayerNorm(ffn),
            nn.Linear(ffn, dim),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, keys: Tensor, words: Tensor, places: Tensor, mask: Tensor
    ) -> Tensor:
        """Pixels x [B,S,C], words [B,T,C], `keys` the words in their places, mask bool [B,T]."""
        y = self.self_norm(x)
        placed = y + places
        y = self.self_attention(placed, placed, y, None)
        x = x + self.dropout(self.self_end(y))
        y = self.cross_attention(self.cross_norm(x) + places, keys, words, mask)
        x = x + self.dropout(self.cross_end(y))
        y = self.dropout(F.relu_(self.fc1(self.ffn_norm(x))))
        return x + self.dropout(self.fc2(self.ffn_middle(y)))


class Decoder(nn.Module):
    """Map [B,C,h,w], words [B,T,C], token_mask bool [B,T] -> [B,C,h,w]."""

    def __init__(self, config: CRISConfig):
        super().__init__()
        self.layers = [f"layer{i}" for i in range(config.decoder_layers)]
        for name in self.layers:
            self.add_module(name, DecoderLayer(config))
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, words: Tensor, token_mask: Tensor) -> Tensor:
        _, C, h, w = x.shape
        places = constant(positions, h, w, C, device=x.device)
        # Words stand in one row, so that the first half of twice as many channels is theirs.
        in_row = constant(positions, 1, words.shape[1], 2 * C, device=x.device)[:, :C]
        keys, pixels = words + in_row, x.flatten(2).transpose(1, 2)
        for name in self.layers:
            pixels = self.get_submodule(name)(pixels, keys, words, places, token_mask)
        return to_map(self.norm(pixels), (h, w))


class DoubleConv(nn.Conv2d):
    def __init__(self, width_in: int, width: int):
        super().__init__(width_in, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return F.relu_(self.norm(super().forward(x)))


class Projector(nn.Conv2d):
    """Map [B,2C,h,w], sentence [B,E] -> logits [B,4h,4w]; itself the 1x1 convolution."""

    def __init__(self, C: int, embed: int):
        super().__init__(C, C, 1)
        self.up1, self.up2 = DoubleConv(2 * C, 2 * C), DoubleConv(2 * C, C)
        self.sentence = nn.Linear(embed, 9 * C + 1)

    def forward(self, x: Tensor, sentence: Tensor) -> Tensor:
        x = super().forward(self.up2(self.up1(x)))
        B, C, h, w = x.shape
        said = self.sentence(sentence)
        kernel, bias = said[:, :-1].reshape(B, C, 3, 3), said[:, -1]
        return F.conv2d(x.reshape(1, B * C, h, w), kernel, bias, padding=1, groups=B)[0]


class CRIS(nn.Module):
    """image [B,3,H,W], tokens int64 [B,T], token_mask bool [B,T] -> logits [B,H/4,W/4]."""

    def __init__(self, config: CRISConfig):
        super().__init__()
        assert config.sentence == "eot" and len(config.vision.depths) == 4
        self.vision, self.text = ClipVision(config.vision), ClipText(config.text)
        self.neck, self.decoder = Neck(config), Decoder(config)
        self.projector = Projector(config.dim // 2, config.text.embed_dim)

    def forward(self, image: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        *_, fine, middle, _, coarse = self.vision(image)
        words, sentence = self.text(tokens, token_mask)
        x = self.decoder(self.neck(fine, middle, coarse, sentence), words, token_mask)
        return self.projector(x, sentence)

    def loss(self, image: Tensor, tokens: Tensor, token_mask: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy against mask bool [B,H,W]."""
        logits = self(image, tokens, token_mask)
        target = F.interpolate(mask[:, None].float(), logits.shape[1:], mode="nearest")[:, 0]
        return F.binary_cross_entropy_with_logits(logits, target)
