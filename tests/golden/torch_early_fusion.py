"""LAVT and CrossVLT in plain PyTorch, forward passes in evaluation mode only.

A second reading of the released code's mathematics, with the operations that it uses: 1x1
convolutions over [B, C, S] beside the linear layers, instance norms, NCHW maps in the decoder.
Modules bear the names of the authors' checkpoints, which therefore load. The golden tests hold it
to their outputs, and the benchmarks take it as the time to beat.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refseg_jax.models.crossvlt import CrossVLTConfig
from refseg_jax.models.lavt import LAVTConfig
from tests.golden.torch_encoders import (
    Bert,
    BertAttention,
    BertLayer,
    Output,
    PatchEmbed,
    SwinStage,
    attend,
)

PADDING = -1e4  # What both add to the attention logits of padding tokens.


class Decoder(nn.Module):
    """The stages' maps, NCHW, from fine to coarse -> logits [B,2,*size]."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        dim = widths[-1] // 2
        width_in = widths[-1]
        for stage in range(len(widths), 1, -1):
            for part, width in ((1, width_in + widths[stage - 2]), (2, dim)):
                conv = nn.Conv2d(width, dim, 3, padding=1, bias=False)
                self.add_module(f"conv{part}_{stage}", conv)
                self.add_module(f"bn{part}_{stage}", nn.BatchNorm2d(dim))
            width_in = dim
        self.conv1_1 = nn.Conv2d(dim, 2, 1)

    def forward(self, maps: list[Tensor], size: torch.Size) -> Tensor:
        def resize(x: Tensor, size: torch.Size) -> Tensor:
            return F.interpolate(x, size, mode="bilinear", align_corners=True)

        x = maps[-1]
        for stage in range(len(maps), 1, -1):
            finer = maps[stage - 2]
            x = torch.cat([resize(x, finer.shape[2:]), finer], 1)
            for part in (1, 2):
                x = getattr(self, f"conv{part}_{stage}")(x)
                x = F.relu(getattr(self, f"bn{part}_{stage}")(x))
        return resize(self.conv1_1(x), size)


def gate(width: int) -> nn.Sequential:
    first, second = (nn.Linear(width, width, bias=False) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second, nn.Tanh())


def projection(width_in: int, width: int, after: nn.Module) -> nn.Sequential:
    """[B,C,S] -> [B,width,S]."""
    return nn.Sequential(nn.Conv1d(width_in, width, 1), after)


def normed_map(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """[B,h,w,C] -> normalised, [B,C,h,w]."""
    return norm(x).permute(0, 3, 1, 2).contiguous()


class ImageLanguageAttention(nn.Module):
    def __init__(self, width: int, language: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, width**-0.5
        self.f_query = projection(width, width, nn.InstanceNorm1d(width))
        self.f_key = nn.Sequential(nn.Conv1d(language, width, 1))
        self.f_value = nn.Sequential(nn.Conv1d(language, width, 1))
        self.W = projection(width, width, nn.InstanceNorm1d(width))

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """x [B,C,S], words [B,D,T], mask [B,1,T] -> [B,C,S]."""
        key, value = self.f_key(words) * mask, self.f_value(words) * mask
        rows = (y.transpose(1, 2) for y in (self.f_query(x), key, value))
        bias = (1 - mask[:, None]) * PADDING
        return self.W(attend(*rows, self.heads, self.scale, bias).transpose(1, 2))


class PWAM(nn.Module):
    def __init__(self, width: int, language: int, heads: int):
        super().__init__()
        self.vis_project = projection(width, width, nn.GELU())
        self.image_lang_att = ImageLanguageAttention(width, language, heads)
        self.project_mm = projection(width, width, nn.GELU())

    def forward(self, x: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        """x [B,h,w,C] -> like x."""
        y = x.flatten(1, 2).transpose(1, 2)
        y = self.vis_project(y) * self.image_lang_att(y, words, mask)
        return self.project_mm(y).transpose(1, 2).reshape(x.shape)


class LAVTStage(SwinStage):
    def __init__(self, config: LAVTConfig, i: int):
        super().__init__(config.swin, i)
        width = config.swin.widths[i]
        self.fusion = PWAM(width, config.bert.hidden, config.fusion_heads[i])
        self.res_gate = gate(width)


class LAVT(nn.Module):
    """image [B,3,H,W], tokens int64 [B,T], mask float [B,T] -> logits [B,2,H,W]."""

    def __init__(self, config: LAVTConfig):
        super().__init__()
        stages = range(len(config.swin.depths))
        self.backbone = nn.Module()
        self.backbone.patch_embed = PatchEmbed(config.swin)
        self.backbone.layers = nn.ModuleList(LAVTStage(config, i) for i in stages)
        for i in stages:
            self.backbone.add_module(f"norm{i}", nn.LayerNorm(config.swin.widths[i]))
        self.text_encoder = Bert(config.bert)
        self.classifier = Decoder(config.swin.widths)

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        words = self.text_encoder(tokens, (1 - mask[:, None, None]) * PADDING).transpose(1, 2)
        x = self.backbone.patch_embed(image)
        maps = []
        for i, stage in enumerate(self.backbone.layers):
            x = stage.encode(x)
            fused = stage.fusion(x, words, mask[:, None])
            maps.append(normed_map(fused, getattr(self.backbone, f"norm{i}")))
            x = x + stage.res_gate(fused) * fused
            if i + 1 < len(self.backbone.layers):
                x = stage.downsample(x)
        return self.classifier(maps, image.shape[2:])


class MHCA(nn.Module):
    def __init__(self, width: int, dim: int, language: int, head_dim: int):
        super().__init__()
        self.heads = max(1, dim // head_dim)
        self.scale = (dim // self.heads) ** -0.5
        self.v_q = projection(width, dim, nn.InstanceNorm1d(dim))
        self.l_q = nn.Linear(language, dim)
        self.values_l = nn.Linear(language, dim)
        self.w_v = projection(dim, width, nn.InstanceNorm1d(width))
        self.project_mm = projection(width, width, nn.GELU())

    def forward(self, x: Tensor, words: Tensor, bias: Tensor) -> Tensor:
        """x [B,h,w,C], words [B,T,D], bias [B,1,1,T] -> like x."""
        y = x.flatten(1, 2).transpose(1, 2)
        query = self.v_q(y).transpose(1, 2)
        key, value = self.l_q(words), self.values_l(words)
        gathered = attend(query, key, value, self.heads, self.scale, bias)
        y = self.project_mm(y + self.w_v(gathered.transpose(1, 2)))
        return y.transpose(1, 2).reshape(x.shape)


class CrossVLTStage(SwinStage):
    def __init__(self, config: CrossVLTConfig, i: int):
        super().__init__(config.swin, i)
        widths, language = config.swin.widths, config.bert.hidden
        dim = 2 * widths[0] if i == 0 else widths[i]
        self.proj = nn.Linear(widths[i], config.align_dim)
        self.attn1 = MHCA(widths[i], dim, language, config.head_dim)
        self.linear1 = gate(widths[i])
        if i + 1 < len(widths):
            self.attn2 = MHCA(widths[i + 1], widths[i + 1], language, config.head_dim)
            self.linear2 = gate(widths[i + 1])


class LanguageStage(nn.Module):
    def __init__(self, config: CrossVLTConfig, i: int):
        super().__init__()
        bert = config.bert
        self.crossattention = BertAttention(bert, config.swin.widths[i])
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(bert.hidden, bert.intermediate)})
        self.output = Output(bert.intermediate, bert)
        plain = config.language_depths[i - 1] - 1
        self.layer = nn.ModuleList(BertLayer(bert) for _ in range(plain))
        self.proj = nn.Linear(bert.hidden, config.align_dim)

    def forward(self, x: Tensor, pixels: Tensor, bias: Tensor) -> Tensor:
        x = self.crossattention(x, pixels, None)
        x = self.output(F.gelu(self.intermediate["dense"](x)), x)
        for layer in self.layer:
            x = layer(x, bias)
        return x


class CrossVLT(nn.Module):
    """image [B,3,H,W], tokens int64 [B,T], mask float [B,T] -> logits [B,2,H,W], similarities.

    The similarities are a list of [B,h,w], one per stage, each over its temperature.
    """

    def __init__(self, config: CrossVLTConfig):
        super().__init__()
        stages = range(len(config.swin.depths))
        self.backbone = nn.ModuleList(nn.Module() for _ in stages)
        self.backbone[0].patch_embed = PatchEmbed(config.swin)
        for i in stages:
            self.backbone[i].layers = CrossVLTStage(config, i)
            self.backbone[i].add_module(f"norm{i}", nn.LayerNorm(config.swin.widths[i]))
        self.lang_stage1 = Bert(config.bert)
        self.lang_stage1.encoder["proj"] = nn.Linear(config.bert.hidden, config.align_dim)
        for i in stages[1:]:
            self.add_module(f"lang_stage{i + 1}", LanguageStage(config, i))
        self.temp = nn.Parameter(torch.ones(len(stages)))
        self.classifier = Decoder(config.swin.widths)

    def forward(self, image: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        bias = (1 - mask[:, None, None]) * PADDING
        words = self.lang_stage1(tokens, bias)
        x = self.backbone[0].patch_embed(image)
        maps, similarities = [], []
        for i, part in enumerate(self.backbone):
            stage, language = part.layers, getattr(self, f"lang_stage{i + 1}")
            if i:
                words = language(words, x.flatten(1, 2), bias)
            x = stage.encode(x)
            align = language.proj if i else language.encoder["proj"]
            pixels = F.normalize(stage.proj(x), dim=-1)
            sentence = F.normalize(align(words[:, 0]), dim=-1)
            similarities.append((pixels @ sentence[:, None, :, None]).squeeze(-1) / self.temp[i])
            fused = stage.attn1(x, words, bias)
            maps.append(normed_map(fused, getattr(part, f"norm{i}")))
            x = x + stage.linear1(fused) * fused
            if i + 1 < len(self.backbone):
                x = stage.downsample(x)
                fused = stage.attn2(x, words, bias)
                x = x + stage.linear2(fused) * fused
        return self.classifier(maps, image.shape[2:]), similarities
