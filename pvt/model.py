"""Pyramid Vision Transformer (PVT v1), registered with timm.

Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions",
ICCV 2021, https://arxiv.org/abs/2102.12122. Sizes below are those of pvt_large at 224 px.

    image    [B,   3, 224, 224]
    stage 0  patch 4, R 8,  3 blocks  ->  map [B,  64, 56, 56]
    stage 1  patch 2, R 4,  8 blocks  ->  map [B, 128, 28, 28]
    stage 2  patch 2, R 2, 27 blocks  ->  map [B, 320, 14, 14]
    stage 3  patch 2, R 1,  3 blocks  ->  map [B, 512,  7,  7]  and a class token
    norm, class token, head           ->  logits [B, num_classes]

Its layers are in pvt/layers.py. Shapes in comments: B batch, C channels, (H, W) the grid of a stage in tokens, N
tokens: H*W, and in the last stage one more, the class token, which comes first. R is the spatial reduction of keys and
values.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.drop import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from pvt.convert import from_any
from pvt.layers import (
    Attention,
    Block,
    Grid,
    PatchEmbed,
    Stage,
    attend,
    by_products,
    resize_pos_embed,
    set_fast,
    set_optimised_kernels,
    to_map,
)

__all__ = [
    "Attention",
    "Block",
    "Grid",
    "PatchEmbed",
    "PyramidVisionTransformer",
    "Stage",
    "attend",
    "by_products",
    "checkpoint_filter_fn",
    "set_fast",
    "set_optimised_kernels",
]

STRIDES = (4, 8, 16, 32)
"""Pixels of the input to a token of each stage."""

# pipeline/track/export imports it by this name.
_resize_pos_embed = resize_pos_embed


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
        # Each stage's patches, and the R x R tokens of its reduction, must fill the input.
        divisors = [stride * sr_ratio for stride, sr_ratio in zip(STRIDES, sr_ratios, strict=True)]
        self.size_divisor = math.lcm(*divisors)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self._check_input_size(height, width)
        self.in_chans = in_chans
        self.depths = tuple(depths)
        self.stages = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        prev_dim, prev_stride = in_chans, 1
        # Drop path rates grow linearly over the blocks of all stages, from 0 to drop_path_rate.
        num_blocks, last_block = 0, max(sum(depths) - 1, 1)
        sizes = zip(
            STRIDES,
            embed_dims,
            depths,
            num_heads,
            mlp_ratios,
            sr_ratios,
            strict=True,
        )
        for i, (stride, dim, depth, heads, mlp_ratio, sr_ratio) in enumerate(sizes):
            blocks: list[Block] = []
            for _ in range(depth):
                rate = drop_path_rate * num_blocks / last_block
                blocks.append(Block(dim, heads, mlp_ratio, sr_ratio, rate))
                num_blocks += 1
            stage = Stage(
                prev_dim,
                dim,
                patch_size=stride // prev_stride,
                grid=(height // stride, width // stride),
                blocks=blocks,
                has_cls_token=stride == STRIDES[-1],
            )
            self.stages.append(stage)
            info = {
                "num_chs": dim,
                "reduction": stride,
                "module": f"stages.{i}",
            }
            self.feature_info.append(info)
            prev_dim, prev_stride = dim, stride
        self.num_features = self.head_hidden_size = prev_dim
        self.norm = nn.LayerNorm(prev_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        # Before the head, which is initialised when it is made: the order decides which random numbers it draws.
        self.apply(_init_weights)
        self.reset_classifier(num_classes, global_pool)

    @property
    def drop_path_rates(self) -> tuple[float, ...]:
        """The rates of the residual branches in execution order: attention, then MLP, of each block."""
        return tuple(module.drop_prob for module in self.modules() if isinstance(module, DropPath))

    def _check_input_size(self, height: int, width: int) -> None:
        divisor = self.size_divisor
        if height % divisor or width % divisor:
            up = [math.ceil(side / divisor) * divisor for side in (height, width)]
            raise ValueError(
                f"input of {height}x{width} px: both sides must be divisible by {divisor}; "
                f"resize or pad it to {up[0]}x{up[1]}"
            )

    def _run_stages(
        self,
        x: Tensor,
        drop_path: Tensor | None,
        num_stages: int,
        class_token_alone: bool = False,
    ) -> list[tuple[Tensor, Grid]]:
        """Returns the tokens and the grid of each of the first `num_stages` stages.

        `class_token_alone`: the caller reads no other token of the last stage.
        """
        self._check_input_size(*x.shape[-2:])
        # A mask of another shape could broadcast without an error.
        expected = 2 * sum(self.depths), x.shape[0]
        if drop_path is not None and drop_path.shape != expected:
            raise ValueError(
                f"drop_path has shape {tuple(drop_path.shape)}; expected {expected}: a row for each entry of "
                f"drop_path_rates, a column for each image"
            )
        outputs: list[tuple[Tensor, Grid]] = []
        first = 0
        for i, stage in enumerate(self.stages[:num_stages]):
            if i:
                x = to_map(*outputs[-1])
            # Two branches of each block.
            last = first + 2 * self.depths[i]
            scales = None if drop_path is None else drop_path[first:last]
            first = last
            is_last = i == len(self.stages) - 1
            outputs.append(stage(x, scales, class_token_alone and is_last))
        return outputs

    def forward_features(self, x: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Returns the normalised tokens of the last stage [B, N, C] for images [B, in_chans, height, width]."""
        tokens, _ = self._run_stages(x, drop_path, len(self.stages))[-1]
        return self.norm(tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns logits [B, num_classes] for tokens [B, N, C], or the class token [B, C] if `pre_logits`."""
        if self.global_pool == "token":
            x = x[:, 0]
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Returns logits [B, num_classes] for images [B, in_chans, height, width]."""
        class_token_alone = self.global_pool == "token"
        tokens, _ = self._run_stages(x, drop_path, len(self.stages), class_token_alone)[-1]
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
        """Returns the maps [B, C, H, W] of the stages in `indices` (an int: the last n stages), without class token.

        Unless `intermediates_only`, it returns the tokens of the last stage that ran and the maps. The final norm
        belongs to the last stage alone: its tokens always get it, its map if `norm`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt={output_fmt!r}: stage maps are "NCHW" only')
        taken, last = feature_take_indices(len(self.stages), indices)
        num_stages = last + 1 if stop_early else len(self.stages)
        outputs = self._run_stages(x, drop_path, num_stages)
        tokens, grid = outputs[-1]
        # With `stop_early` the last stage, whose width the norm has, may not have run.
        if len(outputs) == len(self.stages):
            tokens = self.norm(tokens)
            if norm:
                outputs[-1] = tokens, grid
        # Contiguous as the maps of timm's other models; to_map gives views with the channels last.
        maps = [to_map(*output).contiguous() for i, output in enumerate(outputs) if i in taken]
        return maps if intermediates_only else (tokens, maps)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the layers that the maps of the stages in `indices` do not need; returns these stages' numbers."""
        taken, last = feature_take_indices(len(self.stages), indices)
        num_stages = last + 1
        cut = num_stages < len(self.stages)
        self.stages = self.stages[:num_stages]
        self.depths = self.depths[:num_stages]
        # The norm and the head have the width of the last stage, and are of no use without it.
        if cut or prune_norm:
            self.norm = nn.Identity()
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if cut or prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Makes a new head (none for 0 classes) on the class token (`global_pool` "token") or on all tokens ("")."""
        if global_pool not in ("token", "", None):
            raise ValueError(f'global_pool={global_pool!r}: "token" (the class token) or "" (all tokens)')
        if global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        head.apply(_init_weights)
        # A model that is on a GPU, or in evaluation mode, gets a head that is so, too.
        self.head = head.to(next(self.parameters())).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters without weight decay in the paper's recipe.

        Biases and norms are missing: timm exempts every parameter of one dimension.
        """
        return {"stages.3.cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns the layers for timm's layer-wise decay: the stem, each block (or stage, if `coarse`), norm with head.

        The embeddings that begin a later stage belong to its first block.
        """
        fine = [
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)", (0,)),
        ]
        return {
            "stem": r"^stages\.0\.(?:patch_embed|pos_embed)",
            "blocks": r"^stages\.(\d+)" if coarse else fine,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Does what nn.Module's method does, for any layout of pvt.convert."""
        # timm does not filter a `checkpoint_path` by itself.
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), *args, **kwargs)


def _init_weights(module: nn.Module) -> None:
    """Draws linear weights, position embeddings and class token from a truncated normal of 0.02; linear biases are 0.

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
    """Returns a checkpoint of any layout in pvt.convert as one of this package, with the model's grid.

    Position embeddings that were learned on another grid, which is taken to be square, are resized.
    """
    state = dict(from_any(state_dict))
    for name, own in model.state_dict().items():
        if not name.endswith("pos_embed") or name not in state:
            continue
        pos_embed = state[name]
        if pos_embed.shape[1] == own.shape[1]:
            continue
        stage = model.get_submodule(name.removesuffix(".pos_embed"))
        assert isinstance(stage, Stage)
        num_tokens = pos_embed.shape[1] - (stage.cls_token is not None)
        side = math.isqrt(num_tokens)
        # Of any other shape nothing is known; loading the checkpoint reports the sizes.
        if side * side == num_tokens:
            state[name] = resize_pos_embed(pos_embed, (side, side), stage.grid)
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
            # Evaluation resizes the short side to 256.
            "crop_pct": 224 / 256,
            "first_conv": "stages.0.patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
            "paper_ids": "arXiv:2102.12122",
        }
        for variant in ("pvt_pico", "pvt_tiny", "pvt_small", "pvt_medium", "pvt_large")
    }
)


def _create(
    variant: str,
    pretrained: bool,
    depths: tuple[int, ...],
    kwargs: dict[str, Any],
    **sizes: tuple[int, ...],
) -> nn.Module:
    """Builds a variant by timm's means. The caller's `kwargs` replace its depths and sizes."""
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        PyramidVisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"feature_cls": "getter", "out_indices": out_indices},
        **{"depths": depths, **sizes, **kwargs},
    )


@register_model
def pvt_pico(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds a PVT of 0.6 M parameters (at 32 px, 10 classes) for tests and tiny images. It is not in the paper."""
    return _create(
        "pvt_pico",
        pretrained,
        (1, 1, 1, 1),
        kwargs,
        embed_dims=(32, 64, 96, 128),
        num_heads=(1, 2, 3, 4),
        mlp_ratios=(4, 4, 4, 4),
    )


@register_model
def pvt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds PVT-Tiny: 13.2 M parameters; the paper's top-1 on ImageNet-1K is 75.1 %."""
    return _create("pvt_tiny", pretrained, (2, 2, 2, 2), kwargs)


@register_model
def pvt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds PVT-Small: 24.5 M parameters; the paper's top-1 on ImageNet-1K is 79.8 %."""
    return _create("pvt_small", pretrained, (3, 4, 6, 3), kwargs)


@register_model
def pvt_medium(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds PVT-Medium: 44.2 M parameters; the paper's top-1 on ImageNet-1K is 81.2 %."""
    return _create("pvt_medium", pretrained, (3, 4, 18, 3), kwargs)


@register_model
def pvt_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Builds PVT-Large: 61.4 M parameters; the paper's top-1 on ImageNet-1K is 81.7 %."""
    return _create("pvt_large", pretrained, (3, 8, 27, 3), kwargs)
