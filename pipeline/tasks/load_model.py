"""Loads a registered model, with the preprocessing that evaluation uses.

models:/NAME@ALIAS ──resolve, verify──▶ card, weights ──▶ network; Preprocess: an image ──▶ its input
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.feed.image_ops import Finisher
from pipeline.feed.task_transforms import task_transform
from pipeline.protocols import Task
from pipeline.shards import images
from pipeline.tasks.build import build_trained
from pipeline.track import tracking_server
from pipeline.track.model_card import ModelCard
from pipeline.track.registry import registry


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Makes a network's input of an image as evaluation on a CPU does: resizes, crops or pads, normalises."""

    card: ModelCard
    """The model's card, which has its classes and image settings."""

    def __call__(self, image: Image.Image | str | Path | bytes) -> Tensor:
        """Returns [3, H, W] float32 of an image, of a file's path or of an encoded image's bytes.

        Raises OSError, and images.BadImageError for bytes that are no image.
        """
        if isinstance(image, str | Path):
            image = Path(image).read_bytes()
        picture = images.decode(images.as_fed(image)) if isinstance(image, bytes) else image.convert("RGB")
        pixels = torch.from_numpy(np.array(picture))
        transform = task_transform(self.card.task, self.card.image, len(self.card.classes))
        view = transform.evaluation_views(np.array([pixels.shape[:2]]))
        finished = torch.empty(1, 3, *view.canvas)
        Finisher(self.card.image, torch.device("cpu")).finish_window(pixels, view, finished)
        return finished[0]


def load_model(uri: str, tracking_uri: str | None = None) -> tuple[nn.Module, Preprocess]:
    """Returns the network of a registered model, in fp32 and evaluation mode, and its preprocessing.

    Raises InputError for a URI that names no version and for a version whose files differ from what was registered.
    """
    version, task = open_model(uri, tracking_uri)
    return task.model, Preprocess(version.card)


def open_model(uri: str, tracking_uri: str | None = None) -> tuple[registry.Version, Task]:
    """Returns a verified version and its task in evaluation mode. Raises as `load_model` does."""
    tracking_server.connect(tracking_server.tracking_uri(tracking_uri))
    version = registry.resolve(uri)
    card = version.card
    return version, build_trained(
        card.task,
        card.model,
        card.image,
        card.classes,
        version.weights,
    )
