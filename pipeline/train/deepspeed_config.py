"""The DeepSpeed JSON, from the typed configuration and what `engine.deepspeed` adds to it."""

import difflib
from typing import Any

from pydantic import ValidationError

from pipeline.config import Config, rule_of
from pipeline.errors import InputError
from pipeline.world import World

_MOST_BUCKET_ELEMENTS = 50_000_000

# What of DeepSpeed's configuration makes sense beside the typed one.
_PASSED_ON = (
    "activation_checkpointing",
    "comms_logger",
    "communication_data_type",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
)


def deepspeed_config(config: Config, world: World, accumulation: int, num_parameters: int) -> dict[str, Any]:
    """The DeepSpeed JSON that the typed configuration stands for, with `engine.deepspeed` merged in.

    Raises InputError where `engine.deepspeed` would contradict a generated key.
    """
    stage, clip = config.engine.stage(num_parameters), config.optim.clip_grad or 0.0
    generated = {
        # Required by DeepSpeed and otherwise unused: batches are made by the feed.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": world.size * accumulation,
        "steps_per_print": None,
        # At stage 0 DeepSpeed reports no norm without clipping, so clipping is done here.
        "gradient_clipping": clip if stage > 0 else 0.0,
        "zero_optimization": {"stage": stage, "compute_grad_norm": True},
        # It would wait for the device twice a step, for a throughput that nobody reads.
        "timers": {"throughput": {"enabled": False}},
    }
    extra = config.engine.deepspeed
    for name in extra:
        if name in ("fp16", "bf16", "torch_autocast"):
            raise InputError(f"engine.deepspeed.{name}: the precision is set by engine.precision")
        if name not in _PASSED_ON and name not in generated:
            near = difflib.get_close_matches(name, [*_PASSED_ON, *generated], n=1)
            hint = f"did you mean {near[0]}?" if near else f"passed on are: {', '.join(_PASSED_ON)}"
            raise InputError(f"engine.deepspeed.{name}: not a key that is passed on to DeepSpeed; {hint}")
    merged = _merge(generated, extra, "engine.deepspeed")
    zero = merged["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(part), dict) and zero[part].get("device") == "nvme":
            raise InputError(
                f"engine.deepspeed.zero_optimization.{part}.device: nvme: checkpoints and the moving average need the "
                "state in memory; use cpu"
            )
    # DeepSpeed allocates buckets of this many elements at every step, by default 500 million: 2 GB for any model.
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):  # even numbers, or it refuses
        zero.setdefault(bucket, min(num_parameters + num_parameters % 2, _MOST_BUCKET_ELEMENTS))
    if stage == 3:
        # By default DeepSpeed keeps copies of weights below 100,000 elements and gathers each by a call of its own,
        # after every update: 542 calls for PVT-Large. Partitioned they come with the others.
        zero.setdefault("stage3_param_persistence_threshold", 0)
    if "zero_optimization" not in extra:
        return merged
    from pipeline.train.import_deepspeed import deepspeed  # which takes seconds, and what is generated fits DeepSpeed

    try:
        deepspeed.runtime.zero.config.DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"engine.deepspeed.zero_optimization.{key}: {rule_of(first)}") from None
    return merged


def _merge(generated: dict[str, Any], extra: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(generated)
    for name, value in extra.items():
        if isinstance(value, dict) and isinstance(generated.get(name, {}), dict):
            merged[name] = _merge(generated.get(name, {}), value, f"{path}.{name}")
        elif name in generated and generated[name] != value:
            raise InputError(f"{path}.{name}: {value!r} contradicts {generated[name]!r}, which other settings give")
        else:
            merged[name] = value
    return merged
