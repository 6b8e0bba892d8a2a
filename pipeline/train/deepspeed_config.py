"""DeepSpeed's JSON configuration, from the typed configuration and what `engine.deepspeed` adds to it."""

import difflib
from typing import Any

from pydantic import ValidationError

from pipeline.config import Config, rule_of
from pipeline.errors import InputError
from pipeline.world import World

_MOST_BUCKET_ELEMENTS = 50_000_000

# The keys of DeepSpeed's configuration that do not conflict with the typed one.
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
    """Returns DeepSpeed's configuration for the typed one, with `engine.deepspeed` merged in.

    Raises InputError where `engine.deepspeed` would contradict a generated key.
    """
    stage = config.engine.stage(num_parameters)
    clip = config.optim.clip_grad or 0.0
    generated = {
        # Required by DeepSpeed and otherwise unused, because the feed makes the batches.
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
            hint = f"passed on are: {', '.join(_PASSED_ON)}"
            if near:
                hint = f"did you mean {near[0]}?"
            raise InputError(f"engine.deepspeed.{name}: not a key that is passed on to DeepSpeed; {hint}")
    merged = _merge(generated, extra, "engine.deepspeed")
    zero = merged["zero_optimization"]
    for section in ("offload_optimizer", "offload_param"):
        offload = zero.get(section)
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            raise InputError(
                f"engine.deepspeed.zero_optimization.{section}.device: nvme: checkpoints and the moving average need "
                "the state in memory; use cpu"
            )
    # DeepSpeed allocates buckets of this many elements at every step, by default 500 million: 2 GB for any model. It
    # refuses odd numbers.
    bucket_size = min(num_parameters + num_parameters % 2, _MOST_BUCKET_ELEMENTS)
    zero.setdefault("reduce_bucket_size", bucket_size)
    zero.setdefault("allgather_bucket_size", bucket_size)
    if stage == 3:
        # By default DeepSpeed keeps copies of weights below 100,000 elements and gathers each by a call of its own,
        # after every update: 542 calls for PVT-Large. Partitioned weights are gathered together.
        zero.setdefault("stage3_param_persistence_threshold", 0)
    if "zero_optimization" not in extra:
        return merged
    # DeepSpeed takes seconds to import, and what is generated here needs no validation.
    from pipeline.train.import_deepspeed import deepspeed

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
        key = f"{path}.{name}"
        ours = generated.get(name, {})
        if isinstance(value, dict) and isinstance(ours, dict):
            merged[name] = _merge(ours, value, key)
        elif name in generated and ours != value:
            raise InputError(f"{key}: {value!r} contradicts {ours!r}, which other settings give")
        else:
            merged[name] = value
    return merged
