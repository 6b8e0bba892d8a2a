"""The checks of a run before it starts: the same for pretrain.py, doctor.py --config and submit.py --dry-run.

    load_config ──▶ check_data, without torch ──▶ check_network ──describe_run──▶ what the run will do, in one line

The fast checks come first; libraries that take seconds to import are imported behind them.
"""

import contextlib
import sys
from typing import TYPE_CHECKING

from pipeline.config import ClassificationConfig, Config
from pipeline.config.fields import ClassWeights
from pipeline.errors import InputError
from pipeline.feed.order import Order, partition
from pipeline.job import handoff
from pipeline.shards import own_images, public_datasets
from pipeline.shards.index import ShardSet
from pipeline.shards.open_data import open_manifests, require_kind
from pipeline.train.schedule import Schedule

if TYPE_CHECKING:
    from pipeline.world import World


def check_data(config: Config, training: ShardSet, validation: ShardSet | None, ranks: int) -> Order:
    """Returns the order of the training samples. Raises InputError for data of another kind than the task's, and for
    settings that do not fit the data or the ranks."""
    for shards in filter(None, (training, validation)):
        require_kind(config.task, shards)
    if validation and validation.classes != training.classes:
        raise InputError(
            f"{config.data.val or validation.root} and {config.data.train_paths[0]} have different classes, so their "
            "labels mean different things: pack the validation split again with --classes-from"
        )
    if isinstance(config.task, ClassificationConfig):
        _check_class_weights(config.task.class_weights, training.classes)
    order = Order.of(config, training.part_samples)
    # Both are computed for their errors.
    partition(order, 0, ranks, config)
    Schedule.of(config, order.steps_per_epoch)
    return order


def _check_class_weights(setting: ClassWeights | None, classes: list[str]) -> None:
    """Raises InputError for weights that are not one for each class."""
    found = ""
    if isinstance(setting, tuple) and len(setting) != len(classes):
        found = f"{len(setting)} numbers"
    if isinstance(setting, dict) and setting.keys() != set(classes):
        unknown = [name for name in setting if name not in classes]
        missing = [name for name in classes if name not in setting]
        found = f"unknown classes {unknown[:10]} and none for {missing[:10]}"
    if found:
        wanted = f"a weight for each of the {len(classes)} classes {classes[:10]}"
        raise InputError(f"task.class_weights: expected {wanted}, found {found}; 1 leaves a class as it is")


def check_network(
    config: Config, training: ShardSet, validation: ShardSet | None, order: Order, world: "World"
) -> None:
    """Raises InputError for data that the task cannot use, image sizes that the network cannot use, and keys that
    DeepSpeed does not accept."""
    from pipeline.feed.task_transforms import require_annotations
    from pipeline.tasks.classify import check_image_sizes
    from pipeline.train.deepspeed_config import deepspeed_config

    for shards in filter(None, (training, validation)):
        require_annotations(config.task, shards)
    if sizes := config.augment.size_schedule.values():
        check_image_sizes(config.model, config.image.size, len(training.classes), sizes)
    # The number of parameters is not known yet, and only the keys are checked here.
    accumulation = partition(order, world.rank, world.size, config).accumulation
    deepspeed_config(config, world, accumulation, num_parameters=1)


def check_machine(config: Config, world: "World") -> None:
    """Raises InputError where this rank's machine lacks a compiler that the settings need on its kind of device."""
    from pipeline.train.compile import require_compiler

    if config.engine.compile:
        require_compiler(world.device.type, "engine.compile")
    # torchvision's kernel of roi_align is not deterministic on a GPU, so it compiles another with Triton.
    is_deterministic_gpu = config.train.deterministic and world.device.type == "cuda"
    if is_deterministic_gpu and config.task.uses_roi_align:
        require_compiler(world.device.type, f"train.deterministic of a {config.task.name}")


def forecast(config: Config, ranks: int) -> str:
    """Returns the description of a run on `ranks` GPUs, after all checks. Raises InputError as the run would.

    Data that are not packed are packed by the run, so of those only the network is checked.
    """
    handoff.check_handoffs(config)
    paths, validation_path = own_images.data_paths(config.data)
    unpacked = list(filter(public_datasets.is_unpacked, [*paths, validation_path or paths[0]]))
    if unpacked:
        for path in unpacked:
            public_datasets.check(path)
        # Any classes do for building a network.
        _check_build(config, ["of", "unpacked", "data"])
        return "steps are known once the run has packed its data"
    training, validation = open_manifests(config.data)
    order = check_data(config, training, validation, ranks)
    from pipeline.job.describe_run import describe_run
    from pipeline.world import World

    # DeepSpeed prints its device, and standard output is for a command's result.
    with contextlib.redirect_stdout(sys.stderr):
        check_network(config, training, validation, order, World(size=ranks))
    num_parameters = _check_build(config, training.classes)
    description = describe_run(config, training, validation, order, ranks, num_parameters)
    steps = Schedule.of(config, order.steps_per_epoch).total
    hours = _estimate_hours(config, steps, ranks, len(training.classes))
    return "; ".join([*description.values(), hours])


def _check_build(config: Config, classes: list[str]) -> int:
    """Returns the number of the network's trainable parameters. Raises InputError for one that cannot be built."""
    from pipeline.tasks.build import build_task
    from pipeline.train.optim import trainable

    task = build_task(config.task, config.model, config.image, classes)
    return sum(parameter.numel() for _, parameter in trainable(task.model))


def _estimate_hours(config: Config, steps: int, ranks: int, num_classes: int) -> str:
    if not config.task.trains_on_one_size:
        return "hours depend on the sizes of whole images and are not computed"
    from pipeline import flops, network

    flops_per_image = network.training_flops(config.task, config.model, config.image.size, num_classes)
    flops_per_rank = flops_per_image * steps * config.train.global_batch_size / ranks
    flop_hours = flops_per_rank / flops.MFU / 3600
    on_devices = " or ".join(f"{flop_hours / peak:,.1f} on {name}" for name, peak in flops.PEAK_FLOPS.items())
    return f"hours of training if each rank has a GPU and reaches {flops.MFU:.0%} of its bf16 peak: {on_devices}"
