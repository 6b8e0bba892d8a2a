"""PVT with plain attention, put together as the paper's public code is: what most who train the model run today.

    map ─▶ patches, norm ─▶ + positions ─▶ blocks ─▶ map, made contiguous ─▶ the next stage

Its own implementation, in torch and timm's drop path alone, to be measured against. It computes what pvt.model does.
"""

from collections.abc import Sequence

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.scale, self.reduction = heads, (dim // heads) ** -0.5, reduction
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, stride=reduction)
            self.norm = nn.LayerNorm(dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        batch, tokens, dim = x.shape
        q = self.q(x).reshape(batch, tokens, self.heads, dim // self.heads).permute(0, 2, 1, 3)
        if self.reduction > 1:
            x = x.permute(0, 2, 1).reshape(batch, dim, height, width)
            x = self.norm(self.sr(x).reshape(batch, dim, -1).permute(0, 2, 1))
        kv = self.kv(x).reshape(batch, -1, 2, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop(((q @ kv[0].transpose(-2, -1)) * self.scale).softmax(dim=-1))
        x = (weights @ kv[1]).transpose(1, 2).reshape(batch, tokens, dim)
        return self.proj_drop(self.proj(x))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, reduction)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        hidden = dim * mlp_ratio
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PlainPvt(nn.Module):
    def __init__(
        self,
        depths: Sequence[int],
        num_classes: int,
        image_size: int = 224,
        drop_path_rate: float = 0.0,
        dims: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        reductions: Sequence[int] = (8, 4, 2, 1),
    ) -> None:
        super().__init__()
        rates = (drop_path_rate * index / (sum(depths) - 1) for index in range(sum(depths)))
        self.patches, self.norms, self.positions = nn.ModuleList(), nn.ModuleList(), nn.ParameterList()
        self.stages = nn.ModuleList()
        before, side = 3, image_size
        for stage, dim in enumerate(dims):
            patch = 4 if stage == 0 else 2
            side //= patch
            self.patches.append(nn.Conv2d(before, dim, patch, stride=patch))
            self.norms.append(nn.LayerNorm(dim))
            self.positions.append(nn.Parameter(torch.randn(1, side * side + (stage == 3), dim) * 0.02))
            blocks = [
                Block(dim, heads[stage], mlp_ratios[stage], reductions[stage], next(rates))
                for _ in range(depths[stage])
            ]
            self.stages.append(nn.ModuleList(blocks))
            before = dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dims[-1]))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        for stage, blocks in enumerate(self.stages):
            x = self.patches[stage](x)
            height, width = x.shape[2:]
            x = self.norms[stage](x.flatten(2).transpose(1, 2))
            is_last = stage == len(self.stages) - 1
            if is_last:
                x = torch.cat((self.cls_token.expand(batch, -1, -1), x), dim=1)
            x = x + self.positions[stage]
            assert isinstance(blocks, nn.ModuleList)
            for block in blocks:
                x = block(x, height, width)
            if not is_last:
                x = x.reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()
        return self.head(self.norm(x)[:, 0])
