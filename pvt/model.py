"""Pyramid Vision Transformer (PVT v1), registered with timm.

Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
ICCV 2021, https://arxiv.org/abs/2102.12122. Sizes below are those of pvt_large at 224 px.

    image    [B,   3, 224, 224]
    stage 0  patch 4, R 8,  3 blocks  ->  map [B,  64, 56, 56]
    stage 1  patch 2, R 4,  8 blocks  ->  map [B, 128, 28, 28]
    stage 2  patch 2, R 2, 27 blocks  ->  map [B, 320, 14, 14]
    stage 3  patch 2, R 1,  3 blocks  ->  map [B, 512,  7,  7]  and a class token
    norm, class token, head           ->  logits [B, num_classes]

Shapes in comments: B batch, C channels, D channels of a head, (H, W) the grid of a stage in tokens, N tokens:
H*W, and in the last stage one more, the class token, which comes first. R is the spatial reduction of keys
and values, M their number.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pvt.convert import from_any

__all__ = ["PyramidVisionTransformer", "checkpoint_filter_fn"]

STRIDES = (4, 8, 16, 32)  # pixels of the input to a token of each stage

Grid = tuple[int, int]


MAX_KEYS_ON_CPU = 256
"""Up to so many, matrix products are quicker there than PyTorch's fused attention, and their size does not matter."""


class Patches(nn.Conv2d):
    """A linear map of disjoint patches: map [B, C_in, p*H, p*W] -> tokens [B, H*W, C].

    With a convolution's weights. As a matrix product, which needs no unfolding here and hands on tokens as they are
    wanted; if not `is_fast`, as a convolution.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__(in_chans, dim, patch_size, stride=patch_size)
        self.is_fast = True

    def forward(self, input: Tensor) -> Tensor:
        if not _takes_fast_path(self):
            return super().forward(input).flatten(2).transpose(1, 2)
        p = self.stride[0]
        x = input.permute(0, 2, 3, 1).unflatten(2, (-1, p)).unflatten(1, (-1, p))  # [B, H, p, W, p, C_in]
        x = x.transpose(2, 3).flatten(3).flatten(1, 2)  # [B, H*W, p*p*C_in]
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Disjoint patches to tokens: map [B, C_in, patch*H, patch*W] -> tokens [B, H*W, C]."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = Patches(in_chans, dim, patch_size)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        grid = x.shape[-2] // self.proj.stride[0], x.shape[-1] // self.proj.stride[1]
        return self.norm(self.proj(x)), grid


class Attention(nn.Module):
    """Spatial-reduction attention (section 3.3 of the paper): a key and a value for each R x R tokens."""

    def __init__(self, dim: int, num_heads: int, sr_ratio: int) -> None:
        super().__init__()
        self.is_fast = True
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.sr = Patches(dim, dim, sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, eps=1e-5) if sr_ratio > 1 else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid, num_queries: int | None = None) -> Tensor:
        """`num_queries`: what comes out for the first so many tokens alone."""
        q = self.q(x[:, :num_queries]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, N, D]
        if self.sr is not None and self.norm is not None:
            x = self.norm(self.sr(to_map(x, grid)))  # [B, M, C]
        kv = self.kv(x).unflatten(-1, (2, self.num_heads, -1))  # [B, M, 2, heads, D]
        k, v = kv.permute(2, 0, 3, 1, 4).unbind()  # each [B, heads, M, D]
        attended = attend(q, k, v) if _takes_fast_path(self) else F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then MLP, each a pre-norm residual branch: tokens [B, N, C] -> [B, N, C]."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, sr_ratio: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, sr_ratio)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid, drop_path: Tensor | None = None, num_wanted: int | None = None) -> Tensor:
        """`drop_path`: multipliers [2, B] in place of random ones. `num_wanted`: of so many tokens, the first ones; the
        others count as keys and values alone."""
        attended = self.attn(_for_products(self.norm1(x)), grid, num_queries=num_wanted)
        x = x[:, :num_wanted]
        if drop_path is None:
            x = x + self.drop_path1(attended)
            return x + self.drop_path2(self.mlp(_for_products(self.norm2(x))))
        scale1, scale2 = drop_path.to(x.dtype)[..., None, None].unbind()  # each [B, 1, 1]
        x = torch.addcmul(x, attended, scale1)
        return torch.addcmul(x, self.mlp(_for_products(self.norm2(x))), scale2)


class Stage(nn.Module):
    """One level of the pyramid: map [B, C_in, patch*H, patch*W] -> tokens [B, N, C] and their grid (H, W).

    `grid` is the one that the position embeddings are learned on; for others they are resized.
    """

    def __init__(
        self, in_chans: int, dim: int, patch_size: int, grid: Grid, blocks: list[Block], has_cls_token: bool
    ) -> None:
        super().__init__()
        self.is_fast = True
        self.grid = grid
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if has_cls_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, has_cls_token + grid[0] * grid[1], dim))
        self.blocks = nn.ModuleList(blocks)

    def _pos_embed_on(self, grid: Grid) -> Tensor:
        """Position embeddings [1, N, C] for a grid. The class token's row has no place on it and is kept."""
        if grid == self.grid:
            return self.pos_embed
        return _resize_pos_embed(self.pos_embed, self.grid, grid)

    def forward(
        self, x: Tensor, drop_path: Tensor | None = None, class_token_alone: bool = False
    ) -> tuple[Tensor, Grid]:
        """`class_token_alone`: nobody looks at the other tokens, so the last block may leave them out."""
        x, grid = self.patch_embed(x)
        if self.cls_token is not None:
            # Not len(x), which torch.export takes for a constant.
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = x + self._pos_embed_on(grid)
        # In training alone: with one token an image, products round by the number of images, and a score would too.
        shortens = class_token_alone and self.training and _takes_fast_path(self)
        for i, block in enumerate(self.blocks):
            scales = None if drop_path is None else drop_path[2 * i : 2 * i + 2]
            wanted = 1 if shortens and i == len(self.blocks) - 1 else None
            inputs = x, grid, scales, wanted
            x = checkpoint(block, *inputs) if self.grad_checkpointing else block(*inputs)
        return x, grid


class PyramidVisionTransformer(nn.Module):
    """PVT v1 as a classifier and as a backbone, with timm's model interface.

    `img_size` (pixels, an int or (height, width)) sets the grids that position embeddings are learned on. Any
    input size divisible by `size_divisor` (32 for all registered models) works; others raise ValueError.

    `forward`, `forward_features` and `forward_intermediates` take `drop_path`: multipliers of shape
    [len(drop_path_rates), B], row i for residual branch i in execution order, each 0 or 1 / (1 - rate). They
    always apply, in evaluation mode too. Without them, branches drop at random as with timm's DropPath: in
    training mode only.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if sr_ratios[-1] != 1:
            raise ValueError(f"sr_ratios={sr_ratios}: end in 1, as the class token has no place on a grid")
        self.size_divisor = math.lcm(*(stride * r for stride, r in zip(STRIDES, sr_ratios, strict=True)))
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self._check_input_size(height, width)
        self.in_chans, self.depths = in_chans, tuple(depths)
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        prev_dim, prev_stride = in_chans, 1
        sizes = zip(STRIDES, embed_dims, depths, num_heads, mlp_ratios, sr_ratios, strict=True)
        for i, (stride, dim, depth, heads, mlp_ratio, sr_ratio) in enumerate(sizes):
            # Linear over the blocks of all stages, from 0 to drop_path_rate.
            rates = [drop_path_rate * (sum(depths[:i]) + j) / max(sum(depths) - 1, 1) for j in range(depth)]
            blocks = [Block(dim, heads, mlp_ratio, sr_ratio, rate) for rate in rates]
            grid, patch_size = (height // stride, width // stride), stride // prev_stride
            has_cls_token = stride == STRIDES[-1]
            self.stages.append(Stage(prev_dim, dim, patch_size, grid, blocks, has_cls_token))
            self.feature_info.append({"num_chs": dim, "reduction": stride, "module": f"stages.{i}"})
            prev_dim, prev_stride = dim, stride
        self.num_features = self.head_hidden_size = prev_dim
        self.norm = nn.LayerNorm(prev_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(_init_weights)
        self.reset_classifier(num_classes, global_pool)

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """Rates of the residual branches in execution order: attention, then MLP, of each block."""
        return tuple(module.drop_prob for module in self.modules() if isinstance(module, DropPath))

    def _check_input_size(self, height: int, width: int) -> None:
        if height % self.size_divisor or width % self.size_divisor:
            up = [math.ceil(side / self.size_divisor) * self.size_divisor for side in (height, width)]
            raise ValueError(
                f"input of {height}x{width} px: both sides must be divisible by {self.size_divisor}; "
                f"resize or pad it to {up[0]}x{up[1]}"
            )

    def _run_stages(
        self, x: Tensor, drop_path: Tensor | None, num_stages: int, class_token_alone: bool = False
    ) -> list[tuple[Tensor, Grid]]:
        """Tokens and grid of each of the first `num_stages` stages. `class_token_alone`: all that is looked at."""
        self._check_input_size(*x.shape[-2:])
        expected = 2 * sum(self.depths), x.shape[0]
        if drop_path is not None and drop_path.shape != expected:
            raise ValueError(
                f"drop_path has shape {tuple(drop_path.shape)}; expected {expected}: a row for each entry of "
                f"drop_path_rates, a column for each image"
            )
        outputs: list[tuple[Tensor, Grid]] = []
        for i, stage in enumerate(self.stages[:num_stages]):
            first, last = 2 * sum(self.depths[:i]), 2 * sum(self.depths[: i + 1])
            if i:
                x = to_map(*outputs[-1])
            scales = None if drop_path is None else drop_path[first:last]
            outputs.append(stage(x, scales, class_token_alone and i == len(self.stages) - 1))
        return outputs

    def forward_features(self, x: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Image [B, in_chans, height, width] -> normalised tokens of the last stage [B, N, C]."""
        tokens, _ = self._run_stages(x, drop_path, len(self.stages))[-1]
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, N, C] -> logits [B, num_classes], or the class token [B, C] if `pre_logits`."""
        x = self.head_drop(x[:, 0] if self.global_pool == "token" else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, drop_path: Tensor | None = None) -> Tensor:
        tokens, _ = self._run_stages(x, drop_path, len(self.stages), self.global_pool == "token")[-1]
        return self.forward_head(self.norm(tokens))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        drop_path: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps [B, C, H, W] of the stages in `indices` (an int: so many last ones), without class token.

        Unless `intermediates_only`, they follow the tokens of the last stage that ran. The final norm belongs
        to the last stage alone: its tokens always get it, its map if `norm`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt={output_fmt!r}: stage maps are "NCHW" only')
        taken, last = feature_take_indices(len(self.stages), indices)
        outputs = self._run_stages(x, drop_path, last + 1 if stop_early else len(self.stages))
        tokens, grid = outputs[-1]
        if len(outputs) == len(self.stages):
            tokens = self.norm(tokens)
            if norm:
                outputs[-1] = tokens, grid
        maps = [to_map(*output).contiguous() for i, output in enumerate(outputs) if i in taken]
        return maps if intermediates_only else (tokens, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of the stages in `indices` do not need; returns those counted from stage 0."""
        taken, last = feature_take_indices(len(self.stages), indices)
        cut = last + 1 < len(self.stages)
        self.stages, self.depths = self.stages[: last + 1], self.depths[: last + 1]
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if cut or prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head (none for 0 classes) on the class token (`global_pool` "token") or all tokens ("")."""
        if global_pool not in ("token", "", None):
            raise ValueError(f'global_pool={global_pool!r}: "token" (the class token) or "" (all tokens)')
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        head.apply(_init_weights)
        self.head = head.to(next(self.parameters())).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """The paper's recipe; timm leaves out biases and norms by itself, as they have one dimension."""
        return {"stages.3.cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise decay: the stem, each block (if `coarse`, stage), and norm with head.

        The embeddings that begin a later stage are with its first block.
        """
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,))]
        return {
            "stem": r"^stages\.0\.(?:patch_embed|pos_embed)",
            "blocks": r"^stages\.(\d+)" if coarse else fine,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """nn.Module's, for any layout of pvt.convert: timm does not filter a `checkpoint_path` by itself."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), *args, **kwargs)


def set_optimised_kernels(network: nn.Module, enable: bool = True) -> None:
    """Whether the parts of a PVT take the quicker ways to compute what they compute, as they do unless told."""
    for module in network.modules():
        if isinstance(module, Patches | Attention | Stage):
            module.is_fast = enable


def _takes_fast_path(module: "Patches | Attention | Stage") -> bool:
    return module.is_fast and not torch.compiler.is_exporting()  # graphs are to be told in the usual operators


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v: q [B, heads, N, D], k and v [B, heads, M, D] -> [B, heads, N, D].

    In the way that is quickest for the device and the number of keys (`python -m benchmarks.attention`).
    """
    if q.device.type == "cpu" and k.shape[2] <= MAX_KEYS_ON_CPU:
        return by_products(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` as two matrix products, with the weights between them in the precision of the products."""
    with torch.autocast(q.device.type, enabled=False):  # which would have the softmax written in fp32
        return (q @ (k * k.shape[-1] ** -0.5).transpose(-2, -1)).softmax(-1) @ v


def _for_products(x: Tensor) -> Tensor:
    """As autocast would have it for each of the matrix products that follow, but once for all of them."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def to_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens [B, N, C] -> map [B, C, H, W], without the class token. A view, in channels-last order."""
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def _resize_pos_embed(pos_embed: Tensor, old: Grid, new: Grid) -> Tensor:
    """[1, N, C] for a grid -> the same for another. A class token's row has no place on it and is kept."""
    num_prefix = pos_embed.shape[1] - old[0] * old[1]
    # In fp32, because weights between neighbours are thirds, sevenths and so on, which bf16 rounds.
    learned = to_map(pos_embed.float(), old)
    resized = F.interpolate(learned, size=new, mode="bilinear", align_corners=False)
    tokens = resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :num_prefix], tokens], dim=1)


def _init_weights(module: nn.Module) -> None:
    """Linear weights, position embeddings and class token from a truncated normal of 0.02, linear biases 0.

    Convolutions and norms keep PyTorch's defaults, as in the public code.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Stage):
        nn.init.trunc_normal_(module.pos_embed, std=0.02)
        if module.cls_token is not None:
            nn.init.trunc_normal_(module.cls_token, std=0.02)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A checkpoint in any layout of pvt.convert -> this package's, with position embeddings for the model's grid.

    What was learned on another grid is taken to be square there.
    """
    state = dict(from_any(state_dict))
    for name, own in model.state_dict().items():
        if name.endswith("pos_embed") and name in state and state[name].shape[1] != own.shape[1]:
            stage = model.get_submodule(name.removesuffix(".pos_embed"))
            assert isinstance(stage, Stage)
            tokens = state[name].shape[1] - (stage.cls_token is not None)
            side = math.isqrt(tokens)
            if side * side == tokens:
                state[name] = _resize_pos_embed(state[name], (side, side), stage.grid)
    return state


# register_model finds the table by its name. No weights are named, as there are none to download.
default_cfgs = generate_default_cfgs(
    {
        variant: {
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "num_classes": 1000,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "interpolation": "bicubic",
            "crop_pct": 224 / 256,  # evaluation resizes the short side to 256
            "first_conv": "stages.0.patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
            "paper_ids": "arXiv:2102.12122",
        }
        for variant in ("pvt_pico", "pvt_tiny", "pvt_small", "pvt_medium", "pvt_large")
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        PyramidVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"feature_cls": "getter", "out_indices": kwargs.pop("out_indices", (0, 1, 2, 3))},
        **kwargs,
    )


@register_model
def pvt_pico(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """0.6 M parameters at 32 px with 10 classes: for tests and tiny images, not in the paper."""
    sizes = {"embed_dims": (32, 64, 96, 128), "num_heads": (1, 2, 3, 4), "mlp_ratios": (4, 4, 4, 4)}
    return _create("pvt_pico", pretrained, **{"depths": (1, 1, 1, 1), **sizes, **kwargs})


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """13.2 M parameters; the paper's top-1 on ImageNet-1K is 75.1 %."""
    return _create("pvt_tiny", pretrained, **{"depths": (2, 2, 2, 2), **kwargs})


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """24.5 M parameters; the paper's top-1 on ImageNet-1K is 79.8 %."""
    return _create("pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """44.2 M parameters; the paper's top-1 on ImageNet-1K is 81.2 %."""
    return _create("pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """61.4 M parameters; the paper's top-1 on ImageNet-1K is 81.7 %."""
    return _create("pvt_large", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})
