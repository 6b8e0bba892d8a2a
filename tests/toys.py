"""A toy of everything that docs/extending.md says how to add, each added as its checklist says.

ordinal          a task: the classes are numbers in order, and the network says which number it sees
toy_pyramid      a backbone: five convolutions
NUMBER-NAME.png  a data layout: a folder whose name ends with .named, of images whose names begin with their class
npz              an export: the weights as NumPy's arrays
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from pipeline.config import ModelConfig, TaskConfig
from pipeline.feed.loader import MicroBatch
from pipeline.feed.task_transforms import LabelTransform
from pipeline.shards.image_listing import ImageEntry, ImageListing, make_listing
from pipeline.shards.public_datasets import Layout, Located
from pipeline.tasks.classify import ClassificationTask
from pipeline.track.export.compare_outputs import OpenedExport
from pipeline.track.export.source import ExportSource
from pipeline.track.serve.classifier import ServedClassifier
from pipeline.world import World
from pvt.create import create_model

# The task.


class OrdinalConfig(TaskConfig):
    """Classes that are numbers in order."""

    name: str = "ordinal"
    guess: float = 0.0
    """The number that the network says at first."""


def build_ordinal(task: OrdinalConfig, model: ModelConfig, image_size: int, num_classes: int) -> nn.Module:
    network = create_model(model.name, image_size, num_classes=1, drop_path_rate=model.drop_path_rate)
    nn.init.constant_(network.get_classifier().bias, task.guess)
    return network


class OrdinalTransform(LabelTransform):
    """As in classification, but the targets of training are classes [n] and no soft labels."""

    def training_batch(self, targets: Any, device: torch.device) -> Tensor:
        return self.evaluation_batch(targets, device)

    def blank_batch(self, n: int, size: int, device: torch.device) -> Tensor:
        return torch.zeros(n, dtype=torch.int64, device=device)


class OrdinalTask(ClassificationTask):
    main_metric = "rounded"

    def __init__(self, model: nn.Module, classes: list[str]) -> None:
        super().__init__(model)

    def losses(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        return (self.outputs(model, batch)[:, 0].float() - batch.targets) ** 2

    def answers(
        self, outputs: Tensor, seen: Sequence[Any], classes: Sequence[str], options: Any
    ) -> list[dict[str, Any]]:
        return [{"number": number} for number in outputs[:, 0].tolist()]

    def metric(self) -> Any:
        return OrdinalMetric()


class OrdinalMetric:
    def __init__(self) -> None:
        self._counts: Any = torch.zeros(2, dtype=torch.float64)

    def update(self, outputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        is_right = outputs[:, 0].round() == targets
        self._counts = (
            self._counts + torch.stack([torch.ones_like(weights), is_right.float()]).double() @ weights.double()
        )

    def result(self, world: World) -> dict[str, float]:
        samples, right = world.sum(self._counts).tolist()
        return {"rounded": right / samples}


class ServedOrdinal(ServedClassifier):
    columns: Mapping[str, Any] = {"number": "double"}
    params: Sequence[Any] = ()

    def answers(self, views: Sequence[Any], params: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"number": number} for number in self._logits(views)[:, 0].tolist()]

    def describe(self, answer: Mapping[str, Any]) -> tuple[str, float]:
        return f"number {answer['number']:.3g}", answer["number"]


# The backbone.


class ToyPyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32."""

    def __init__(self, num_classes: int = 10, drop_rate: float = 0.0, drop_path_rate: float = 0.0, **_: Any) -> None:
        super().__init__()
        widths = (8, 16, 24, 32)
        self.stem = nn.Conv2d(3, 8, 2, 2)
        inputs = (8, *widths)
        self.stages = nn.ModuleList(nn.Conv2d(inputs[i], width, 2, 2) for i, width in enumerate(widths))
        self.num_features = widths[-1]
        self.feature_info = [
            {"num_chs": width, "reduction": 4 << i, "module": f"stages.{i}"} for i, width in enumerate(widths)
        ]
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()

    def forward_intermediates(self, images: Tensor, indices: Any = None, intermediates_only: bool = False) -> Any:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]).relu())
        return maps[1:] if intermediates_only else (maps[-1], maps[1:])

    def forward_features(self, images: Tensor) -> Tensor:
        return self.forward_intermediates(images)[0]

    def forward_head(self, last: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = last.mean(dim=(2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def prune_intermediate_layers(self, indices: Any, prune_norm: bool = False, prune_head: bool = True) -> None:
        self.head = nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "there is nothing to recompute"


default_cfgs = generate_default_cfgs({"toy_pyramid": {"classifier": "head", "first_conv": "stem"}})


@register_model
def toy_pyramid(pretrained: bool = False, **kwargs: Any) -> Any:
    return build_model_with_cfg(ToyPyramid, "toy_pyramid", pretrained, **kwargs)


# The data layout.


def write_named(folder: Path, count: int) -> None:
    """Writes `count` grey images of four classes, which are brighter the greater the number of their class is."""
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).normal(50 + 50 * (i % 4), 5, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i % 4}-{i}.png")


def find_named(path: str | Path) -> ImageListing:
    files = list(Path(path).iterdir())
    classes = sorted({file.name.partition("-")[0] for file in files})
    entries = [ImageEntry(file.stem, str(file), classes.index(file.name.partition("-")[0])) for file in files]
    return make_listing(classes, entries)


def locate_named(path: str | Path, classes: list[str] | None) -> Located:
    listing = find_named(path)
    return Located(listing.digest, lambda: listing)


NAMED = Layout("named", lambda path: str(path).endswith(".named"), locate_named)


# The export.


def write(source: ExportSource, folder: Path) -> dict[str, str]:
    np.savez(folder / "weights.npz", **{name: tensor.numpy() for name, tensor in source.network.state_dict().items()})
    return source.varying


def load(source: ExportSource, folder: Path) -> OpenedExport:
    network = source.build()
    with np.load(folder / "weights.npz") as arrays:
        network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return OpenedExport(source.graph(network))


def call(source: ExportSource, folder: Path) -> str:
    return f"arrays = numpy.load({str(folder / 'weights.npz')!r})"


TO_NPZ = SimpleNamespace(write=write, load=load, call=call)
