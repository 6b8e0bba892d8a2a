"""What the dense tasks share, whose network is a head on the maps of a backbone."""

from typing import Any

from pipeline.tasks.layer_groups import layers
from pvt.dense import PREFIX, DenseNetwork


class DenseTask:
    """A dense network and the names of its classes. Subclasses add what else the interface of tasks asks for."""

    # The loss of guessing depends on what there is to be found in an image.
    chance_loss = None

    def __init__(self, model: DenseNetwork, classes: list[str]) -> None:
        assert model.num_classes == len(classes)
        self.model: Any = model
        self.classes = classes
        self.drop_path_rates = model.drop_path_rates

    @property
    def depths(self) -> dict[str, int]:
        """The layer of each of the backbone's parameters, by name."""
        return layers(self.model.backbone, PREFIX)
