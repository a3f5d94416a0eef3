"""Swin and BERT in plain PyTorch, under the names of the released early-fusion checkpoints.

For evaluation: without dropout. Windows are cut and rolled and position biases looked up, as in
Microsoft's Swin, and attention is written out, as in Hugging Face's BERT.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refseg_jax.models.encoders.bert import BertConfig
from refseg_jax.models.encoders.swin import SwinConfig


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, bias: Tensor | None
) -> Tensor:
    """query [B,S,D], key and value [B,T,D], bias of the logits [B,1,1,T] -> [B,S,D]."""
    q, k, v = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key, value))
    logits = q @ k.transpose(-2, -1) * scale
    if bias is not None:
        logits = logits + bias
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(query.shape)


class WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        span = 2 * window - 1
        self.relative_position_bias_table = nn.Parameter(0.02 * torch.randn(span**2, heads))
        cells = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = cells[:, None] - cells + window - 1
        self.register_buffer("relative_position_index", offset[..., 0] * span + offset[..., 1])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [B * windows, cells, C], mask [windows, cells, cells] to add -> like x."""
        rows, cells, C = x.shape
        q, k, v = self.qkv(x).view(rows, cells, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        logits = q * self.scale @ k.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        logits = logits + bias.view(cells, cells, -1).permute(2, 0, 1).contiguous()
        if mask is not None:
            logits = logits.view(-1, len(mask), self.heads, cells, cells) + mask[:, None]
            logits = logits.view(rows, self.heads, cells, cells)
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(rows, cells, C))


def to_windows(x: Tensor, window: int) -> Tensor:
    """[B,h,w,C] -> [B * windows, window², C]."""
    B, h, w, C = x.shape
    x = x.view(B, h // window, window, w // window, window, C).transpose(2, 3)
    return x.reshape(-1, window * window, C)


def from_windows(x: Tensor, window: int, h: int, w: int) -> Tensor:
    """[B * windows, window², C] -> [B,h,w,C]."""
    x = x.view(-1, h // window, w // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, h, w, x.shape[-1])


def shift_mask(h: int, w: int, window: int, shift: int) -> Tensor:
    """-100 between cells of a rolled map that come from its different sides, else 0."""
    regions = torch.zeros(1, h, w, 1)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            regions[:, rows, columns] = 3 * i + j
    regions = to_windows(regions, window).squeeze(-1)
    return (regions[:, None] != regions[:, :, None]) * -100.0


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, hidden: int, shift: int):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        y = F.pad(self.norm1(x), (0, 0, 0, -w % self.window, 0, -h % self.window))
        padded = y.shape[1:3]
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self.attn(to_windows(y, self.window), mask if self.shift else None)
        y = from_windows(y, self.window, *padded)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y[:, :h, :w].contiguous()
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PatchMerging(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        neighbours = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(neighbours, -1)))


class SwinStage(nn.Module):
    """Blocks and patch merging; the models add what they do around them."""

    def __init__(self, config: SwinConfig, i: int):
        super().__init__()
        self.window, width = config.window, config.widths[i]
        self.blocks = nn.ModuleList(
            SwinBlock(
                width,
                config.num_heads[i],
                config.window,
                int(width * config.mlp_ratio),
                config.window // 2 if j % 2 else 0,
            )
            for j in range(config.depths[i])
        )
        if i + 1 < len(config.depths):
            self.downsample = PatchMerging(width)

    def encode(self, x: Tensor) -> Tensor:
        h, w = (n + -n % self.window for n in x.shape[1:3])
        mask = shift_mask(h, w, self.window, self.window // 2)
        for block in self.blocks:
            x = block(x, mask)
        return x


class PatchEmbed(nn.Module):
    def __init__(self, config: SwinConfig):
        super().__init__()
        self.size = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, self.size, self.size)
        self.norm = nn.LayerNorm(config.embed_dim)

    def forward(self, image: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,h,w,C]."""
        H, W = image.shape[2:]
        x = self.proj(F.pad(image, (0, -W % self.size, 0, -H % self.size)))
        return self.norm(x.permute(0, 2, 3, 1).contiguous())


class Output(nn.Module):
    """What BERT does after an attention and after a hidden layer."""

    def __init__(self, width_in: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden, config.eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.ModuleDict):
    def __init__(self, config: BertConfig, memory: int):
        hidden = config.hidden
        parts = {
            "query": nn.Linear(hidden, hidden),
            "key": nn.Linear(memory, hidden),
            "value": nn.Linear(memory, hidden),
        }
        super().__init__({"self": nn.ModuleDict(parts), "output": Output(hidden, config)})
        self.heads, self.scale = config.heads, (hidden // config.heads) ** -0.5

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None) -> Tensor:
        own = self["self"]
        query, key, value = own["query"](x), own["key"](memory), own["value"](memory)
        return self["output"](attend(query, key, value, self.heads, self.scale, bias), x)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config, config.hidden)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden, config.intermediate)})
        self.output = Output(config.intermediate, config)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention(x, x, bias)
        return self.output(F.gelu(self.intermediate["dense"](x)), x)


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden)
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden, config.eps)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.position_embeddings(torch.arange(tokens.shape[1]))
        types = self.token_type_embeddings(torch.zeros_like(tokens))
        return self.LayerNorm(self.word_embeddings(tokens) + places + types)


class Bert(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(BertLayer(config) for _ in range(config.layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        for layer in self.encoder["layer"]:
            x = layer(x, bias)
        return x
