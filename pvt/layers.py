"""The layers of a Pyramid Vision Transformer: patch embedding, spatial-reduction attention, block and stage.

    map ─ PatchEmbed ─▶ tokens ─ + position embeddings ─ Block, Block, … ─▶ tokens of a stage
                                                           │
                                    Attention, MLP, each a residual branch with drop path

Shapes in comments: B batch, C channels, D channels of a head, (H, W) the grid of a stage in tokens, N tokens:
H*W, and in the last stage one more, the class token, which comes first. R is the spatial reduction of keys
and values, M their number.

Patches, Attention and Stage have optimised kernels, which they use by default, and reference kernels. Both compute the
same up to rounding; see `set_optimised_kernels`.
"""

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models import checkpoint
from torch import Tensor, nn

__all__ = [
    "Attention",
    "Block",
    "Grid",
    "PatchEmbed",
    "Patches",
    "Stage",
    "attend",
    "by_products",
    "resize_pos_embed",
    "set_fast",
    "set_optimised_kernels",
    "to_map",
]

Grid = tuple[int, int]
"""Height and width in tokens."""

MAX_KEYS_ON_CPU = 256
"""Up to this number of keys, matrix products are faster on a CPU than PyTorch's fused attention, and their size does
not matter."""


class Patches(nn.Conv2d):
    """A linear map of disjoint patches: map [B, C_in, p*H, p*W] -> tokens [B, H*W, C].

    It has a convolution's weights. The optimised kernel is a matrix product, which needs no unfolding here and returns
    tokens in the layout that follows; the reference kernel is the convolution.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__(in_chans, dim, patch_size, stride=patch_size)
        self.is_optimised = True

    def forward(self, input: Tensor) -> Tensor:
        if not _is_optimised(self):
            return super().forward(input).flatten(2).transpose(1, 2)
        p = self.stride[0]
        x = input.permute(0, 2, 3, 1)  # [B, p*H, p*W, C_in]
        x = x.unflatten(2, (-1, p)).unflatten(1, (-1, p))  # [B, H, p, W, p, C_in]
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)  # [B, H*W, p*p*C_in]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # [C, p*p*C_in]
        return F.linear(x, weight, self.bias)


class PatchEmbed(nn.Module):
    """Patch embedding: map [B, C_in, patch*H, patch*W] -> normalised tokens [B, H*W, C] of disjoint patches."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = Patches(in_chans, dim, patch_size)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Returns the tokens and their grid."""
        height, width = x.shape[-2:]
        grid = height // self.proj.stride[0], width // self.proj.stride[1]
        return self.norm(self.proj(x)), grid


class Attention(nn.Module):
    """Spatial-reduction attention (section 3.3 of the paper): one key and value for each R x R tokens."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.is_optimised = True
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.sr = Patches(dim, dim, sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, eps=1e-5) if sr_ratio > 1 else None
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        num_queries: int | None = None,
    ) -> Tensor:
        """Returns the outputs of the first `num_queries` tokens; None: of all."""
        q = self.q(x[:, :num_queries])  # [B, N, C]
        q = q.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, D]
        if self.sr is not None and self.norm is not None:
            x = self.norm(self.sr(to_map(x, grid)))  # [B, M, C]
        kv = self.kv(x).unflatten(-1, (2, self.num_heads, -1))  # [B, M, 2, heads, D]
        k, v = kv.permute(2, 0, 3, 1, 4).unbind()  # each [B, heads, M, D]
        # Both kernels have the same weights and agree up to rounding.
        kernel = attend if _is_optimised(self) else F.scaled_dot_product_attention
        attended = kernel(q, k, v)  # [B, heads, N, D]
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then MLP, each a pre-norm residual branch: tokens [B, N, C] -> [B, N, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        sr_ratio: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        # The public code's eps: 1e-6 in blocks, 1e-5 in patch embeddings and after spatial reduction.
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, sr_ratio)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        grid: Grid,
        drop_path: Tensor | None = None,
        num_wanted: int | None = None,
    ) -> Tensor:
        """Returns the first `num_wanted` tokens; the others serve as keys and values only. None: all tokens.

        `drop_path`: multipliers [2, B] of the residual branches in place of random ones.
        """
        attended = self.attn(_cast_once(self.norm1(x)), grid, num_queries=num_wanted)
        x = x[:, :num_wanted]
        if drop_path is None:
            x = x + self.drop_path1(attended)
            return x + self.drop_path2(self.mlp(_cast_once(self.norm2(x))))
        scale1, scale2 = drop_path.to(x.dtype)[..., None, None].unbind()  # each [B, 1, 1]
        # Product and residual sum in one pass over memory.
        x = torch.addcmul(x, attended, scale1)
        return torch.addcmul(x, self.mlp(_cast_once(self.norm2(x))), scale2)


class Stage(nn.Module):
    """One level of the pyramid: map [B, C_in, patch*H, patch*W] -> tokens [B, N, C] and their grid (H, W).

    Position embeddings are learned on `grid` and resized for other grids.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        grid: Grid,
        blocks: list[Block],
        has_cls_token: bool,
    ) -> None:
        super().__init__()
        self.is_optimised = True
        self.grid = grid
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if has_cls_token else None
        num_tokens = has_cls_token + grid[0] * grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, dim))
        self.blocks = nn.ModuleList(blocks)

    def _pos_embed_on(self, grid: Grid) -> Tensor:
        """Returns the position embeddings [1, N, C] for a grid."""
        # A resize to the same grid would change nothing, and take time.
        if grid == self.grid:
            return self.pos_embed
        return resize_pos_embed(self.pos_embed, self.grid, grid)

    def forward(
        self,
        x: Tensor,
        drop_path: Tensor | None = None,
        class_token_alone: bool = False,
    ) -> tuple[Tensor, Grid]:
        """Returns the tokens and their grid. With `class_token_alone` the last block may skip the other tokens.

        `drop_path`: multipliers [2 * len(blocks), B] of the residual branches in place of random ones.
        """
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            # Not len(x), which torch.export takes for a constant.
            cls_token = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat([cls_token, x], dim=1)
        x = x + self._pos_embed_on(grid)
        # In training only: the rounding of products with one token an image depends on the number of images, and an
        # evaluation's score would depend on it, too.
        shortens = class_token_alone and self.training and _is_optimised(self)
        for i, block in enumerate(self.blocks):
            scales = None if drop_path is None else drop_path[2 * i : 2 * i + 2]
            num_wanted = 1 if shortens and i == len(self.blocks) - 1 else None
            inputs = x, grid, scales, num_wanted
            x = checkpoint(block, *inputs) if self.grad_checkpointing else block(*inputs)
        return x, grid


def set_optimised_kernels(network: nn.Module, enable: bool = True) -> None:
    """Makes all layers of a PVT use their optimised kernels, which they do by default, or else the reference ones."""
    for module in network.modules():
        if isinstance(module, Patches | Attention | Stage):
            module.is_optimised = enable


# Code that was written for earlier versions imports this name.
set_fast = set_optimised_kernels


def _is_optimised(module: Patches | Attention | Stage) -> bool:
    # Exported graphs have the reference kernels: runtimes and converters know these operators.
    return module.is_optimised and not torch.compiler.is_exporting()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Returns softmax(q kᵀ / √D) v: q [B, heads, N, D], k and v [B, heads, M, D] -> [B, heads, N, D].

    It takes the fastest kernel for the device and the number of keys (`python -m benchmarks.attention`).
    """
    if q.device.type == "cpu" and k.shape[2] <= MAX_KEYS_ON_CPU:
        return by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes `attend` as two matrix products, with the weights between them in the precision of the products."""
    # Autocast would compute and store the softmax in fp32.
    with torch.autocast(q.device.type, enabled=False):
        scaled = k * k.shape[-1] ** -0.5
        weights = (q @ scaled.transpose(-2, -1)).softmax(-1)  # [B, heads, N, M]
        return weights @ v


def _cast_once(x: Tensor) -> Tensor:
    """Casts the input of several matrix products as autocast would do for each of them."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Returns tokens [B, N, C] as a map [B, C, H, W], without the class token. It is a view, channels last."""
    height, width = grid
    return tokens[:, -height * width :].transpose(1, 2).unflatten(2, grid)


def resize_pos_embed(pos_embed: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resizes position embeddings [1, N, C] from one grid to another.

    A class token's row has no place on the grid and stays as it is.
    """
    num_prefix = pos_embed.shape[1] - old[0] * old[1]
    # In fp32, because weights between neighbours are thirds, sevenths and so on, which bf16 rounds.
    learned = to_map(pos_embed.float(), old)
    resized = F.interpolate(
        learned,
        size=new,
        mode="bilinear",
        align_corners=False,
    )
    tokens = resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :num_prefix], tokens], dim=1)
