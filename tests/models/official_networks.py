"""Networks of other projects in a few lines of plain PyTorch: their names of weights and their forward pass, independent of timm.

Written from the published code named in ``test_published_sources.LAYOUTS``; weights are random.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Gamma(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width))


class Block(nn.Module):
    """``scale``: none, "gamma_1" (iBOT's names) or "ls1" (DINOv2's)."""

    def __init__(self, width, heads, scale):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), Mlp(width)
        if scale == "gamma_1":
            self.gamma_1, self.gamma_2 = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        elif scale == "ls1":
            self.ls1, self.ls2 = Gamma(width), Gamma(width)
        self.scale = scale

    def forward(self, x):
        first, second = {
            "": lambda: (1, 1),
            "gamma_1": lambda: (self.gamma_1, self.gamma_2),
            "ls1": lambda: (self.ls1.gamma, self.ls2.gamma),
        }[self.scale]()
        x = x + first * self.attn(self.norm1(x))
        return x + second * self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)


class Transformer(nn.Module):
    """``positions``: learned, "moco" or "mae"; ``chunks``: DINOv2's groups of blocks; ``mean_pooling``: iBOT's and MaSSL's."""

    def __init__(
        self, width, heads, *, grid=4, patch=16, depth=2, positions="learned", scale="", mean_pooling=False, chunks=0, registers=0, mask=""
    ):
        super().__init__()
        self.grid, self.patch, self.chunks, self.registers = grid, patch, chunks, registers
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        if positions == "learned":
            self.pos_embed = nn.Parameter(torch.randn(1, grid**2 + 1, width))
        else:
            self.pos_embed = nn.Parameter(sines(width, grid, row_first=positions == "moco"), requires_grad=False)
        if registers:
            self.register_tokens = nn.Parameter(torch.randn(1, registers, width))
        if mask:
            self.register_parameter(mask, nn.Parameter(torch.zeros(1, width)))
        self.patch_embed = PatchEmbed(width, patch)
        blocks = [Block(width, heads, scale) for _ in range(depth)]
        size = depth // chunks if chunks else depth
        groups = [nn.ModuleList([nn.Identity()] * first + blocks[first : first + size]) for first in range(0, depth, size)]
        self.blocks = nn.ModuleList(groups if chunks else blocks)
        self.in_order = tuple(blocks)
        self.norm = nn.Identity() if mean_pooling else nn.LayerNorm(width, eps=1e-6)
        if mean_pooling:
            self.fc_norm = nn.LayerNorm(width, eps=1e-6)

    def interpolated(self, height, width):
        """The published resampling for another size: bicubic by a factor that is 0.1 patches too large."""
        new, positions = (height // self.patch, width // self.patch), self.pos_embed
        if new == (self.grid, self.grid):
            return positions
        patches = positions[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        factors = tuple((side + 0.1) / self.grid for side in new)
        patches = F.interpolate(patches, scale_factor=factors, mode="bicubic")
        return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images):
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.interpolated(*images.shape[-2:])
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.in_order:
            x = block(x)
        x = self.norm(x)
        return self.fc_norm(x[:, 1:].mean(1)) if hasattr(self, "fc_norm") else x[:, 0]


def sines(width, grid, row_first):
    """Fixed position embeddings [1, 1 + grid², width], by a loop over places."""
    table = torch.zeros(1 + grid**2, width)
    for row in range(grid):
        for column in range(grid):
            entry = []
            for place in (row, column) if row_first else (column, row):
                angles = [place / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                entry += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            table[1 + row * grid + column] = torch.tensor(entry)
    return table[None]


class SwinBlock(nn.Module):
    def __init__(self, width, heads, window, shift, side):
        super().__init__()
        self.window, self.shift, self.side = window, shift if side > window else 0, side
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.attn = Attention(width, heads)
        places = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = places[:, None] - places[None] + window - 1
        self.attn.relative_position_bias_table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        self.attn.register_buffer("relative_position_index", apart[..., 0] * (2 * window - 1) + apart[..., 1])

    def forward(self, x):
        n, side, window = len(x), self.side, self.window
        y = self.norm1(x).view(n, side, side, -1).roll((-self.shift, -self.shift), (1, 2))
        # Which of the nine regions a place came from: places of different regions do not attend to each other.
        border = torch.tensor([0 if i < side - window else 1 if i < side - self.shift else 2 for i in range(side)])
        region = border[:, None] * 3 + border[None] if self.shift else torch.zeros(side, side, dtype=torch.long)
        y = y.view(n, side // window, window, side // window, window, -1).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(0, 2)
        region = region.view(side // window, window, side // window, window).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        attn = self.attn
        q, k, v = attn.qkv(y).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores + attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
        foreign = (region[:, :, None] != region[:, None]).repeat(n, 1, 1)[:, None]
        y = attn.proj(((scores - 100.0 * foreign).softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = y.view(n, side // window, side // window, window, window, -1).permute(0, 1, 3, 2, 4, 5).reshape(n, side, side, -1)
        x = x + y.roll((self.shift, self.shift), (1, 2)).flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class Merging(nn.Module):
    def __init__(self, width, side):
        super().__init__()
        self.side, self.norm, self.reduction = side, nn.LayerNorm(4 * width, eps=1e-6), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x):
        x = x.view(len(x), self.side, self.side, -1)
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1).flatten(1, 2)))


class Stage(nn.Module):
    def __init__(self, width, depth, heads, window, side, last):
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(width, heads, window, window // 2 * (i % 2), side) for i in range(depth))
        self.downsample = None if last else Merging(width, side)


class Swin(nn.Module):
    """iBOT's and MaSSL's: 1e-6 in the norms, downsampling at the end of a stage."""

    def __init__(self, width=24, depths=(2, 2), heads=(1, 2), window=7, side=56):
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj, self.patch_embed.norm = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width, eps=1e-6)
        last = len(depths) - 1
        self.layers = nn.ModuleList(Stage(width * 2**i, depths[i], heads[i], window, side // 2**i, i == last) for i in range(len(depths)))
        self.norm = nn.LayerNorm(width * 2**last, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed.norm(self.patch_embed.proj(images).flatten(2).transpose(1, 2))
        for stage in self.layers:
            for block in stage.blocks:
                x = block(x)
            x = stage.downsample(x) if stage.downsample is not None else x
        return self.norm(x).mean(1)
