"""Initialises a run's network, and loads the registered weights that it starts from.

init.model ──registry, on rank 0──▶ one version ──its folder──▶ every rank: network.read_weights ──▶ the task's model
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pipeline import network
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.job.publish import read_parent
from pipeline.protocols import Task
from pipeline.tasks.build import build_task, start_from
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.world import World
from pvt.model import set_optimised_kernels

# MLflow takes more than a second to import, so only ranks that fetch a model from the registry import it.
if TYPE_CHECKING:
    from pipeline.track.registry.registry import Version


def build_initial_task(config: Config, classes: list[str]) -> Task:
    """Returns the run's task, whose network all ranks initialise with the same weights."""
    torch.manual_seed(config.run.seed)
    task = build_task(config.task, config.model, config.image, classes)
    set_optimised_kernels(task.model, config.engine.optimised_kernels)
    return task


def load_initial_weights(config: Config, world: World, task: Task, classes: list[str]) -> str | None:
    """Loads the weights that init.model names, if it names any; returns the exact version.

    Rank 0 fetches and checks them; the others read its copy, or their node's own where disks are not shared.
    """
    if config.init is None:
        return None
    uri = config.init.model
    name, alias, _ = uri.partition("@")
    # A run that is started again keeps its version, although the alias may have moved since.
    previous_parent = read_parent(config.run.folder)
    if alias and previous_parent and previous_parent.startswith(f"{name}/"):
        uri = previous_parent

    def fetch(uri: str) -> "Version":
        from pipeline.track import tracking_server
        from pipeline.track.registry import registry

        tracking_server.connect(tracking_server.tracking_uri(config.tracking.uri, config.run.root))
        return registry.resolve(uri)

    def load() -> None:
        local_folder = folder if (folder / WEIGHTS).exists() else fetch(pinned).folder
        card = ModelCard.read(local_folder)
        if card.model.name != config.model.name:
            raise InputError(
                f"init.model {pinned} is a {card.model.name}, but model.name is {config.model.name}: "
                f"set model.name={card.model.name} or start from another model"
            )
        start_from(
            task,
            config.task,
            config.model,
            classes,
            network.read_weights(local_folder / WEIGHTS),
            pinned,
            source_task=card.task,
            source_classes=card.classes,
        )

    # Rank 0 alone resolves the alias, so that all ranks load the same version even while it is being moved.
    version = world.first_then_all(lambda: fetch(uri) if world.is_first else None)
    folder, pinned = world.from_first((version.folder, version.uri) if version else (Path(), uri))
    world.first_then_all(load)
    return pinned
