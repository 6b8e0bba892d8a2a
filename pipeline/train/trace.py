"""The samples that the engine consumed, to prove that data does not depend on the world: runs/NAME/trace/rank-R.jsonl.

The file has a line for each step, counted as in metrics.jsonl:
{"step": 7, "samples": [{"position": 0, "shard": 2, "key": "3/digit-0003", "weight": 1.0, "pixels": "…", …}, …]}
Hashes are those of the tensors themselves, sample by sample, after mixing, of images without the padding around them.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.feed.loader import MicroBatch
from pipeline.shards.index import ShardSet
from pipeline.train.meters import JsonLines


class Trace:
    """Appends to a rank's file; lines beyond `step`, from a run that went on after its last checkpoint, are dropped."""

    def __init__(self, folder: Path, rank: int, step: int, shards: ShardSet) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(folder / f"rank-{rank}.jsonl", step)
        self._shards = shards

    def write(self, step: int, batch: list[MicroBatch]) -> None:
        samples = [sample for micro in batch for sample in self._samples(micro)]
        self._lines.append({"step": step, "samples": samples})

    def _samples(self, micro: MicroBatch) -> list[dict[str, Any]]:
        # From the device at once, not sample by sample.
        images = micro.images.cpu()
        masks = None if micro.drop_path is None else micro.drop_path.T.cpu()
        samples = []
        for i, (height, width) in enumerate(micro.extents):
            shard = int(micro.samples.shard[i])
            row = int(micro.samples.row[i])
            sample = {
                "position": int(micro.samples.position[i]),
                "shard": shard,
                "key": self._shards.key(shard, row),
                "weight": float(micro.weights[i]),
                "pixels": _hash(images[i, :, :height, :width]),
                "label": _hash(*_tensors_of(micro.targets[i])),
                "drop_path": None if masks is None else _hash(masks[i]),
            }
            samples.append(sample)
        return samples


def _tensors_of(target: Any) -> list[Tensor]:
    """Returns the tensors of one sample's target, which is a tensor or a dataclass of tensors."""
    if isinstance(target, Tensor):
        return [target]
    fields = [getattr(target, field.name) for field in dataclasses.fields(target)]
    return [value for value in fields if isinstance(value, Tensor)]


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
