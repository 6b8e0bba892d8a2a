"""What a run is refused for before it starts: the same for pretrain.py, doctor.py --config and submit.py --dry-run.

    config.load ──▶ check_data, without torch ──▶ check_network ──▶ what the run will take, in one line

The quick rules come first, and what takes seconds to import is imported behind them.
"""

import contextlib
import sys
from typing import TYPE_CHECKING

from pipeline.config import Config, DetectionConfig, MaskRcnnConfig
from pipeline.errors import InputError
from pipeline.feed.order import Order, padding_waste, partition
from pipeline.job import handoff
from pipeline.shards import public_datasets
from pipeline.shards.index import ShardSet
from pipeline.shards.open_data import open_manifests
from pipeline.train.schedule import Schedule

if TYPE_CHECKING:
    from pipeline.world import World


def check_data(config: Config, training: ShardSet, validation: ShardSet | None, ranks: int) -> Order:
    """Returns the order of the training samples. Raises InputError for settings that do not fit the data or the
    ranks."""
    if validation and validation.classes != training.classes:
        raise InputError(
            f"{config.data.val} and {config.data.train_paths[0]} have different classes, so their labels mean "
            "different things: pack the validation split again with --classes-from"
        )
    order = Order.of(config, training.part_samples)
    partition(order, 0, ranks, config)
    Schedule.of(config, order.steps_per_epoch)
    return order


def check_network(
    config: Config, training: ShardSet, validation: ShardSet | None, order: Order, world: "World"
) -> None:
    """Raises InputError for data that the task does not take, image sizes that the network does not take, and keys that
    DeepSpeed does not take."""
    from pipeline.feed.task_transforms import require_kind
    from pipeline.tasks.classify import check_image_sizes
    from pipeline.train.deepspeed_config import deepspeed_config

    for shards in filter(None, (training, validation)):
        require_kind(config.task, shards)
    if sizes := config.augment.image_size.values():
        check_image_sizes(config.model, config.image.size, len(training.classes), sizes)
    accumulation = partition(order, world.rank, world.size, config).accumulation
    deepspeed_config(config, world, accumulation, num_parameters=1)


def check_machine(config: Config, world: "World") -> None:
    """Raises InputError where this rank's machine lacks what the settings need on its kind of device."""
    from pipeline.train.compile import require_compiler

    if config.engine.compile:
        require_compiler(world.device.type, "engine.compile")
    # torchvision's kernel of roi_align is not deterministic on a GPU, so it compiles another with Triton.
    if isinstance(config.task, MaskRcnnConfig) and config.train.deterministic and world.device.type == "cuda":
        require_compiler(world.device.type, "train.deterministic of a mask_rcnn")


def forecast(config: Config, ranks: int) -> str:
    """Says how long a run on `ranks` GPUs is, once nothing refuses it. Raises InputError as the run would.

    A data set in a public layout is packed by the run, so that only the network is checked without it.
    """
    handoff.check_handoffs(config)
    if any(map(public_datasets.is_public, filter(None, [*config.data.train_paths, config.data.val]))):
        _build(config, ["of", "unpacked", "data"])
        return "steps are known once the run has packed its data"
    training, validation = open_manifests(config.data)
    order = check_data(config, training, validation, ranks)
    from pipeline.world import World

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed reports its device, and a result has standard output
        check_network(config, training, validation, order, World(size=ranks))
    _build(config, training.classes)
    steps = Schedule.of(config, order.steps_per_epoch).total
    hours = _hours(config, steps, ranks, len(training.classes))
    length = f"{steps:,} steps ({order.steps_per_epoch:,} an epoch) with {ranks} rank{'s' * (ranks > 1)}"
    return "; ".join([length, padding(order, ranks, config) or "no padding", hours])


def padding(order: Order, ranks: int, config: Config) -> str:
    """Says what part of the work is padding, and with how many ranks there is none; empty where there is none."""
    waste = padding_waste(order, ranks, config)
    if not waste:
        return ""
    worlds = range(1, min(2 * ranks, order.lanes) + 1)
    better = [str(size) for size in worlds if not padding_waste(order, size, config)]
    return f"{waste:.1%} of the work is padding; ranks without any: {', '.join(better) or 'none up to double'}"


def _build(config: Config, classes: list[str]) -> None:
    from pipeline.tasks.build import build_task

    build_task(config.task, config.model, config.image, classes)


def _hours(config: Config, steps: int, ranks: int, num_classes: int) -> str:
    if isinstance(config.task, DetectionConfig):
        return "hours depend on the sizes of whole images and are not computed"
    from pipeline import flops, network

    per_image = network.training_flops(config.task, config.model, config.image.size, num_classes)
    work = per_image * steps * config.train.global_batch_size / ranks / flops.MFU / 3600
    each = " or ".join(f"{work / peak:,.1f} on {name}" for name, peak in flops.PEAK_FLOPS.items())
    return f"hours of training if each rank has a GPU and reaches {flops.MFU:.0%} of its bf16 peak: {each}"
