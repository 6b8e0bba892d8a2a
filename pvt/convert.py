"""State dicts of PVT v1 between this package, the public repository (whai362/PVT) and Transformers.

    public repository  <->  this package  <->  Transformers' PvtForImageClassification

All three hold the same tensors under other names; Transformers also splits our fused `attn.kv` in two. Every
function takes and returns a flat dict and leaves its argument alone; tensors that need no joining share
memory with it. ValueError names every key that the layout does not have, or that a model of the depths found
should have. The head is optional.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["from_any", "from_public", "from_transformers", "to_public", "to_transformers"]

Layout = Literal["ours", "public", "transformers"]


class Names(NamedTuple):
    """What one tensor is called in each layout.

    {s} counts stages from 0, {n} from 1, {b} the blocks of a stage from 0. A final * stands for weight and
    bias, and "key|value" for two tensors that are a single one of ours split along dimension 0.
    """

    ours: str
    public: str
    transformers: str


_EMBED = "pvt.encoder.patch_embeddings.{s}."
_STAGE = (
    Names("stages.{s}.pos_embed", "pos_embed{n}", _EMBED + "position_embeddings"),
    Names("stages.{s}.patch_embed.proj.*", "patch_embed{n}.proj.*", _EMBED + "projection.*"),
    Names("stages.{s}.patch_embed.norm.*", "patch_embed{n}.norm.*", _EMBED + "layer_norm.*"),
)
_CLS_TOKEN = Names("stages.3.cls_token", "cls_token", "pvt.encoder.patch_embeddings.3.cls_token")
_BLOCK_PREFIX = Names("stages.{s}.blocks.{b}.", "block{n}.{b}.", "pvt.encoder.block.{s}.{b}.")


def _in_block(name: str, *transformers: str) -> Names:
    """Within blocks, our names are those of the public repository."""
    ours, public, theirs = _BLOCK_PREFIX
    return Names(ours + name, public + name, "|".join(theirs + part for part in transformers))


_BLOCK = (
    _in_block("norm1.*", "layer_norm_1.*"),
    _in_block("attn.q.*", "attention.self.query.*"),
    _in_block("attn.kv.*", "attention.self.key.*", "attention.self.value.*"),
    _in_block("attn.proj.*", "attention.output.dense.*"),
    _in_block("norm2.*", "layer_norm_2.*"),
    _in_block("mlp.fc1.*", "mlp.dense1.*"),
    _in_block("mlp.fc2.*", "mlp.dense2.*"),
)
_BLOCK_REDUCTION = (  # in every block of a stage, or in none
    _in_block("attn.sr.*", "attention.self.sequence_reduction.*"),
    _in_block("attn.norm.*", "attention.self.layer_norm.*"),
)
_NORM = Names("norm.*", "norm.*", "pvt.encoder.layer_norm.*")
_HEAD = Names("head.*", "head.*", "classifier.*")


def from_public(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The public repository's keys to ours; those of a training checkpoint may stay under its "model"."""
    return _convert(state.get("model", state), "public", "ours")


def to_public(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our keys to the public repository's, unwrapped."""
    return _convert(state, "ours", "public")


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of Transformers' PvtForImageClassification to ours.

    Transformers gives every LayerNorm an eps of 1e-6. The public code and this package use 1e-5 in patch
    embeddings and after spatial reduction: outputs agree once Transformers' modules are set so, too.
    """
    return _convert(state, "transformers", "ours")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our keys to those of Transformers' PvtForImageClassification; see from_transformers on eps."""
    return _convert(state, "ours", "transformers")


def from_any(state: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of any layout to ours; a dict that shows neither foreign layout comes back unchecked."""
    if any(re.match(r"(pos_embed|patch_embed|block)\d", key) for key in state.get("model", state)):
        return from_public(state)
    if any(key.startswith("encoder.patch_embeddings.") for key in state):  # PvtModel's, without a classifier around it
        state = {f"pvt.{key}": value for key, value in state.items()}
    if any(key.startswith("pvt.encoder.") for key in state):
        return from_transformers(state)
    return dict(state)


def _convert(state: Mapping[str, Tensor], source: Layout, target: Layout) -> dict[str, Tensor]:
    rows = _rows(state, source)
    table = [(getattr(row, source).split("|"), getattr(row, target).split("|")) for row in rows]
    expected = [name for sources, _ in table for name in sources]
    missing = [name for name in expected if name not in state]
    unknown = sorted(state.keys() - set(expected))
    if missing or unknown:
        raise ValueError(
            f"not a PVT v1 state dict in the layout {source!r}: missing keys {missing}, "
            f"unknown keys {unknown}; remove what is no tensor of the model, or convert from its layout"
        )
    converted: dict[str, Tensor] = {}
    for sources, targets in table:
        tensor = state[sources[0]] if len(sources) == 1 else torch.cat([state[name] for name in sources])
        parts = [tensor] if len(targets) == 1 else tensor.chunk(len(targets))
        converted.update(zip(targets, parts, strict=True))
    return converted


def _rows(state: Mapping[str, Tensor], layout: Layout) -> list[Names]:
    """All tensors of a model with the blocks, reductions and head that show in the keys of `state`."""
    rows: list[Names] = []
    for s in range(4):
        rows += _fill(_STAGE, s)
        block = getattr(_BLOCK_PREFIX, layout).replace(".", r"\.").format(s=s, n=s + 1, b=r"(\d{1,3})")
        depth = 1 + max((int(match[1]) for key in state if (match := re.match(block, key))), default=0)
        reduction = [row for b in range(depth) for row in _fill(_BLOCK_REDUCTION, s, b)]
        rows += [row for b in range(depth) for row in _fill(_BLOCK, s, b)]
        rows += reduction if any(getattr(row, layout) in state for row in reduction) else []
    head = _fill([_HEAD])
    has_head = any(getattr(row, layout) in state for row in head)
    return [*rows, _CLS_TOKEN, *_fill([_NORM]), *(head if has_head else [])]


def _fill(rows: Iterable[Names], s: int = 0, b: int = 0) -> list[Names]:
    """The tensors that rows of the tables stand for at stage s and block b."""
    return [
        Names(*(name.format(s=s, n=s + 1, b=b).replace("*", kind) for name in row))
        for row in rows
        for kind in (("weight", "bias") if row.ours.endswith("*") else ("",))
    ]
