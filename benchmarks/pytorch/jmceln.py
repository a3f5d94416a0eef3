"""JMCELN in PyTorch, under the names of refseg_jax/models/jmceln.py. Maps are [B,C,h,w]."""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pytorch.clip import ClipText, ClipVision, ConvNorm
from benchmarks.pytorch.layers import MultiHeadAttention, from_windows, resize, to_map, to_windows
from benchmarks.pytorch.swin_bert import WindowAttention
from refseg_jax.models.jmceln import JMCELNConfig
from refseg_jax.models.layers.norms import EPSILON


def flat(x: Tensor) -> Tensor:
    """[B,C,h,w] -> [B,h*w,C]."""
    return x.flatten(2).transpose(1, 2)


class SwitchNorm(nn.Module):
    """Mixtures of the statistics of each instance, layer and batch, in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.mean_mixture, self.var_mixture = (nn.Parameter(torch.ones(3)) for _ in range(2))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x.float(), (2, 3), correction=0)  # [B,C]: the others follow.

        def pooled(axis: int) -> tuple[Tensor, Tensor]:
            between, centre = torch.var_mean(mean, axis, correction=0, keepdim=True)
            return centre, var.mean(axis, keepdim=True) + between

        batch = self.running_mean, self.running_var
        if self.training:
            new = pooled(0)
            with torch.no_grad():
                for running, value in zip(batch, new, strict=True):
                    running.lerp_(value[0], 0.1)
            batch = new
        mean, var = (
            weights[0] * instance + weights[1] * layer + weights[2] * whole
            for weights, instance, layer, whole in zip(
                (self.mean_mixture.softmax(0), self.var_mixture.softmax(0)),
                (mean, var),
                pooled(1),
                batch,
                strict=True,
            )
        )
        factor = self.weight * torch.rsqrt(var + EPSILON)
        shift = self.bias - mean * factor
        return torch.addcmul(shift[..., None, None], x, factor[..., None, None]).to(x.dtype)


class Neck(nn.Module):
    """Maps [B,C_i,h_i,w_i], fine to coarse, and the sentence [B,E] -> [B,dim,h_1,w_1]."""

    def __init__(self, config: JMCELNConfig):
        super().__init__()
        sigma = functools.partial(ConvNorm, width=config.dim, size=1, activation=F.leaky_relu_)
        self.sentence = sigma(config.text.embed_dim)
        for i, width in enumerate(config.vision.widths[-config.levels :], 1):
            self.add_module(f"vision{i}", sigma(width))
            if i < config.levels:
                self.add_module(f"join{i}", sigma(2 * config.dim))

    def forward(self, maps: list[Tensor], sentence: Tensor) -> Tensor:
        level = len(maps)
        fused = self.sentence(sentence[..., None, None])
        fused = fused * self.get_submodule(f"vision{level}")(maps[-1])
        for i in range(level - 1, 0, -1):
            finer = self.get_submodule(f"vision{i}")(maps[i - 1])
            fused = torch.cat([resize(fused, finer.shape[2:]), finer], 1)
            fused = self.get_submodule(f"join{i}")(fused)
        return fused


class LSRAN(nn.Module):
    """Long and short relations: [B,C,h,w] -> same."""

    def __init__(self, config: JMCELNConfig):
        super().__init__()
        C, self.window = config.dim, config.window
        self.norm = nn.LayerNorm(C)
        self.attention = WindowAttention(C, config.heads, config.window)
        self.relations = [f"relation{i}" for i, _ in enumerate(config.dilations, 1)]
        for name, dilation in zip(self.relations, config.dilations, strict=True):
            part = C // len(config.dilations)
            self.add_module(name, ConvNorm(C, part, 3, dilation=dilation))
        self.mix, self.boundary = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3, padding=1)

    def forward(self, fused: Tensor) -> Tensor:
        h, w = fused.shape[2:]
        y = self.norm(fused.permute(0, 2, 3, 1))
        y = F.pad(y, (0, 0, 0, -w % self.window, 0, -h % self.window))
        size = y.shape[1:3]
        y = self.attention(to_windows(y, self.window), None)
        y = fused + from_windows(y, self.window, *size)[:, :h, :w].permute(0, 3, 1, 2)
        relations = [self.get_submodule(name)(y) for name in self.relations]
        return self.mix(torch.cat(relations, 1)) * self.boundary(fused)


class PAN(nn.Module):
    """The maps before and after a stage's attention, [B,C,h,w] -> the stage's map."""

    def __init__(self, C: int):
        super().__init__()
        self.widths = C // 4, C // 2, C
        self.before, self.after = nn.Conv2d(C, C // 4, 1), nn.Conv2d(C, sum(self.widths), 1)
        width = sum(self.widths)
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.filter2 = nn.Conv2d(C // 4, C // 2, 3, padding=1)
        self.filter3 = nn.Conv2d(C // 2, C, 3, padding=1)
        self.out, self.norm = nn.Conv2d(C, C, 1), SwitchNorm(C)

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        first, second, third = self.depthwise(self.after(after)).split(self.widths, 1)
        y = first * self.before(before)
        y = third * self.filter3(second * self.filter2(y))
        return before + self.norm(self.out(y))


class Stage(nn.Module):
    """Embeddings [B,Q,C] gather from a map, then the map from them."""

    def __init__(self, config: JMCELNConfig):
        super().__init__()
        self.embedding, self.mask = (MultiHeadAttention(config.dim, config.heads) for _ in range(2))
        self.pan = PAN(config.dim)

    def forward(self, queries: Tensor, fused: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """`fused`, the neck's map, as [B,h*w,C]; x [B,C,h,w]."""
        pixels = flat(x)
        queries = queries + self.embedding(queries, fused, pixels)
        after = pixels + self.mask(pixels, queries, queries)
        return queries, self.pan(x, to_map(after, x.shape[2:]))


class Upsampling(nn.Module):
    """Map [B,C,h,w] -> logits of background and foreground [B,2,*size]."""

    def __init__(self, config: JMCELNConfig):
        super().__init__()
        self.doublings, C = config.doublings, config.dim
        for i in range(self.doublings):
            self.add_module(f"conv{i}", nn.Conv2d(C, C // 2, 3, padding=1, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(C // 2))
            C //= 2
        self.classifier = nn.Conv2d(C, 2, 1)
        self.register_load_state_dict_pre_hook(self._take_kernels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        for i in range(self.doublings):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = self.get_submodule(f"norm{i}")(self.get_submodule(f"conv{i}")(x))
            x = F.relu_(x)
        return resize(self.classifier(x), size)

    @staticmethod
    def _take_kernels(module: nn.Module, state: dict[str, Any], prefix: str, *_) -> None:
        """The arrays `kernel0` ... [3,3,C,D] of ours are the convolutions' weights."""
        for i in range(module.doublings):
            if (ours := f"{prefix}kernel{i}") in state:
                state[f"{prefix}conv{i}.weight"] = state.pop(ours).permute(3, 2, 0, 1)


class JMCELN(nn.Module):
    """image [B,3,H,W], tokens int64 [B,T], token_mask bool [B,T] -> logits [B,H,W]."""

    def __init__(self, config: JMCELNConfig):
        super().__init__()
        assert config.lsran and config.pan and config.adaptive and config.stages
        assert config.sentence == "eot" and not config.vision.pool
        self.vision, self.text = ClipVision(config.vision), ClipText(config.text)
        self.neck, self.lsran = Neck(config), LSRAN(config)
        self.levels = config.levels
        self.queries = nn.Parameter(torch.zeros(config.queries, config.dim))
        self.stages = [f"stages_{i}" for i in range(config.stages)]
        for name in self.stages:
            self.add_module(name, Stage(config))
        self.upsampling = Upsampling(config)

    def forward(self, image: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
        maps = self.vision(image)[-self.levels :]
        _, sentence = self.text(tokens, token_mask)
        fused = self.neck(maps, sentence)
        x, queries = self.lsran(fused), self.queries.expand(len(image), -1, -1)
        fused = flat(fused)
        for name in self.stages:
            queries, x = self.get_submodule(name)(queries, fused, x)
        background, foreground = self.upsampling(x, image.shape[2:]).unbind(1)
        return foreground - background

    def loss(self, image: Tensor, tokens: Tensor, token_mask: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy against mask bool [B,H,W]: of two classes, that of their difference."""
        logits = self(image, tokens, token_mask)
        return F.binary_cross_entropy_with_logits(logits, mask.float())
