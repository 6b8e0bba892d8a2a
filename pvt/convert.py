"""Converts state dicts of PVT v1 between this package, the public repository (whai362/PVT) and Transformers.

    public repository  <->  this package  <->  Transformers' PvtForImageClassification

All three have the same tensors under different names; Transformers also splits our fused `attn.kv` in two. Every
function takes and returns a flat dict and does not change its argument; tensors that need no joining share memory
with it. ValueError names every key that is unknown in the layout, or missing for a model of the depths found. The
head is optional.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "from_any",
    "from_public",
    "from_transformers",
    "to_public",
    "to_transformers",
]

Layout = Literal["ours", "public", "transformers"]


class Names(NamedTuple):
    """The names of one tensor in the three layouts.

    {s} is the stage counted from 0, {n} from 1, {b} the block of a stage from 0. A final * stands for weight and bias,
    and "key|value" for two tensors that are halves, along dimension 0, of a single one of ours.
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
    """Returns the names of a block's tensor. Our names inside a block are those of the public repository."""
    ours, public, theirs = _BLOCK_PREFIX
    halves = [theirs + half for half in transformers]
    return Names(ours + name, public + name, "|".join(halves))


_BLOCK = (
    _in_block("norm1.*", "layer_norm_1.*"),
    _in_block("attn.q.*", "attention.self.query.*"),
    _in_block("attn.kv.*", "attention.self.key.*", "attention.self.value.*"),
    _in_block("attn.proj.*", "attention.output.dense.*"),
    _in_block("norm2.*", "layer_norm_2.*"),
    _in_block("mlp.fc1.*", "mlp.dense1.*"),
    _in_block("mlp.fc2.*", "mlp.dense2.*"),
)

# Every block of a stage has these, or none.
_BLOCK_REDUCTION = (
    _in_block("attn.sr.*", "attention.self.sequence_reduction.*"),
    _in_block("attn.norm.*", "attention.self.layer_norm.*"),
)
_NORM = Names("norm.*", "norm.*", "pvt.encoder.layer_norm.*")
_HEAD = Names("head.*", "head.*", "classifier.*")


def from_public(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Converts the public repository's keys to ours, also those below "model" in a training checkpoint."""
    return _convert(state.get("model", state), "public", "ours")


def to_public(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts our keys to the public repository's, as a flat dict without "model"."""
    return _convert(state, "ours", "public")


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the keys of Transformers' PvtForImageClassification to ours.

    Transformers gives every LayerNorm an eps of 1e-6. The public code and this package use 1e-5 in patch embeddings
    and after spatial reduction: outputs agree once Transformers' modules have the same eps.
    """
    return _convert(state, "transformers", "ours")


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts our keys to those of Transformers' PvtForImageClassification. On eps see from_transformers."""
    return _convert(state, "ours", "transformers")


def from_any(state: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the keys of any layout to ours. A dict of neither foreign layout is returned unchecked."""
    if any(re.match(r"(pos_embed|patch_embed|block)\d", key) for key in state.get("model", state)):
        return from_public(state)
    # Transformers' PvtModel has no classifier around it.
    if any(key.startswith("encoder.patch_embeddings.") for key in state):
        state = {f"pvt.{key}": value for key, value in state.items()}
    if any(key.startswith("pvt.encoder.") for key in state):
        return from_transformers(state)
    return dict(state)


def _convert(state: Mapping[str, Tensor], source: Layout, target: Layout) -> dict[str, Tensor]:
    rows = _expected_tensors(state, source)
    table = [(getattr(row, source).split("|"), getattr(row, target).split("|")) for row in rows]
    expected = [name for sources, _ in table for name in sources]
    missing = [name for name in expected if name not in state]
    unknown = sorted(state.keys() - set(expected))
    # All at once, because a foreign checkpoint usually differs in a whole group of keys.
    if missing or unknown:
        raise ValueError(
            f"not a PVT v1 state dict in the layout {source!r}: missing keys {missing}, "
            f"unknown keys {unknown}; remove what is no tensor of the model, or convert from its layout"
        )
    converted: dict[str, Tensor] = {}
    for sources, targets in table:
        # A single tensor is passed on as it is, and shares its memory.
        tensor = state[sources[0]] if len(sources) == 1 else torch.cat([state[name] for name in sources])
        halves = [tensor] if len(targets) == 1 else tensor.chunk(len(targets))
        converted.update(zip(targets, halves, strict=True))
    return converted


def _expected_tensors(state: Mapping[str, Tensor], layout: Layout) -> list[Names]:
    """Returns all tensors of a model with the blocks, reductions and head that appear in the keys of `state`."""
    tensors: list[Names] = []
    for s in range(4):
        tensors += _fill(_STAGE, s)
        blocks = range(_depth(state, layout, s))
        reduction: list[Names] = []
        for b in blocks:
            tensors += _fill(_BLOCK, s, b)
            reduction += _fill(_BLOCK_REDUCTION, s, b)
        if any(getattr(names, layout) in state for names in reduction):
            tensors += reduction
    tensors.append(_CLS_TOKEN)
    tensors += _fill([_NORM])
    head = _fill([_HEAD])
    if any(getattr(names, layout) in state for names in head):
        tensors += head
    return tensors


def _depth(state: Mapping[str, Tensor], layout: Layout, s: int) -> int:
    """Returns the number of blocks of stage s, by the keys of `state`; at least 1."""
    # The prefix as a regular expression, with the number of the block as its group.
    prefix = getattr(_BLOCK_PREFIX, layout).replace(".", r"\.")
    pattern = prefix.format(s=s, n=s + 1, b=r"(\d{1,3})")
    matches = [re.match(pattern, key) for key in state]
    return 1 + max((int(match[1]) for match in matches if match), default=0)


def _fill(table: Iterable[Names], s: int = 0, b: int = 0) -> list[Names]:
    """Returns the tensors that the rows of a table stand for at stage s and block b."""
    filled: list[Names] = []
    for row in table:
        names = [name.format(s=s, n=s + 1, b=b) for name in row]
        kinds = ("weight", "bias") if row.ours.endswith("*") else ("",)
        for kind in kinds:
            filled.append(Names(*(name.replace("*", kind) for name in names)))
    return filled
