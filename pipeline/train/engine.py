"""DeepSpeed, behind what the loop and checkpoints need: step, evaluator, weights, moments, load_moments.

Parameters, gradients, accumulation and reduction are fp32 at every ZeRO stage; bf16 and fp16 are autocast inside
the forward pass. So the weights in a checkpoint are the weights that train, whatever the stage or precision, and
stage 0 needs no master copy. fp16's loss scale is kept here, one rule for all stages.
"""

import dataclasses
import difflib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.utils.deterministic
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
)
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline import keys
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.feed.loader import MicroBatch
from pipeline.keys import Stream
from pipeline.train.optim import parameter_groups, trainable
from pipeline.train.seams import Task
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

MOMENTS = ("exp_avg", "exp_avg_sq")

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one optimiser step did. Equal on all ranks."""

    loss: float  # mean over the global batch
    grad_norm: float  # before clipping
    applied: bool  # False: gradients were not finite and the weights did not move


@dataclasses.dataclass
class LossScale:
    """fp16's dynamic loss scale: halved when gradients overflow, doubled after `window` good steps in a row."""

    value: float = 2.0**16
    good_steps: int = 0
    window: int = 2000
    floor: float = 1.0

    def update(self, finite: bool) -> None:
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, self.floor)
        elif self.good_steps == self.window:
            self.value, self.good_steps = self.value * 2, 0


class _Objective(nn.Module):
    """The module that DeepSpeed wraps: images to the weighted sum of losses, or to outputs if there are no weights."""

    def __init__(self, task: Task, dtype: torch.dtype | None, device_type: str) -> None:
        super().__init__()
        self.model = task.model
        self._losses, self._dtype, self._device_type = task.losses, dtype, device_type

    def forward(
        self, images: Tensor, targets: Any = None, weights: Tensor | None = None, drop_path: Tensor | None = None
    ) -> Any:
        if weights is None:
            return self.model(images)
        with torch.autocast(self._device_type, self._dtype, enabled=self._dtype is not None):
            losses = self._losses(self.model, images, targets, drop_path)
        return (losses * weights).sum()


class Engine:
    def __init__(self, config: Config, task: Task, world: World, accumulation: int) -> None:
        _log_to_stderr()
        # Nothing here uses DeepSpeed's compiled operators; without this it spends a minute building one at start-up.
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 - not an attribute that type checkers know
        self._config, self._world, self._accumulation = config, world, accumulation
        self._stage = config.engine.zero_stage
        self._model = task.model.to(world.device)
        self._parameters = dict(trainable(self._model))
        self.loss_scale = LossScale() if config.engine.precision == "fp16" else None
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self._model, config.optim.weight_decay),
            lr=0.0,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )
        objective = _Objective(task, _AUTOCAST.get(config.engine.precision), world.device.type)
        # Any, because DeepSpeed's annotations name every optimiser it might hold.
        self._engine: Any = deepspeed.initialize(
            model=objective,
            optimizer=self._optimizer,
            config=deepspeed_config(
                config, world, accumulation, num_parameters=sum(p.numel() for p in self._parameters.values())
            ),
            dist_init_required=False,
        )[0]

    def step(self, batches: list[MicroBatch], *, step: int, lr: float) -> Outcome:
        """One optimiser step over this rank's micro-batches of a global batch."""
        assert len(batches) == self._accumulation
        self._engine.train()
        # DeepSpeed divides by the accumulation in `backward` and by the world in its reduction; this cancels both.
        share = self._world.size * self._accumulation / self._config.train.global_batch_size
        total = torch.zeros((), device=self._world.device)
        for micro, batch in enumerate(batches):
            # For modules that draw by themselves (dropout): keyed, so that a resumed run draws the same.
            seed = keys.key(self._config.run.seed, Stream.MODULE, step, micro, self._world.rank)
            torch.manual_seed(keys.torch_seed(seed))
            loss = self._engine(batch.images, batch.targets, batch.weights, batch.drop_path)
            total += loss.detach()
            self._backward(loss * share, is_last=micro == self._accumulation - 1)
        applied, grad_norm = self._update(lr)
        loss = self._world.sum(total).item() / self._config.train.global_batch_size
        if self.loss_scale:
            self.loss_scale.update(applied)
        return Outcome(loss, grad_norm, applied)

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        """Add a micro-batch's gradients. After the last one `_update` has to follow."""
        if self.loss_scale and self._stage == 0:
            loss = loss * self.loss_scale.value
        elif self.loss_scale:
            self._engine.optimizer.override_loss_scale(self.loss_scale.value)
        self._engine.backward(loss)
        if not is_last:
            self._engine.step()  # counts the micro-batch

    def _update(self, lr: float) -> tuple[bool, float]:
        """Clip and apply the gradients. Returns whether they were applied and their norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            applied, norm = self._clip()
            self._engine.step()
            return applied, norm
        self._engine.step()
        # ZeRO leaves a step with a non-finite norm out by itself, on all ranks alike.
        return not self._engine.optimizer.overflow, float(self._engine.optimizer._global_grad_norm)

    def _clip(self) -> tuple[bool, float]:
        """What ZeRO's optimisers do at stages 1 to 3: unscale, clip, and leave out a step that is not finite."""
        scale = self.loss_scale.value if self.loss_scale else 1.0
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item() / scale
        if not math.isfinite(norm):
            for parameter in self._parameters.values():
                parameter.grad = None  # AdamW passes over parameters without a gradient
            return False, norm
        limit = self._config.optim.clip_grad
        factor = max(1.0, (norm + 1e-6) / limit) * scale if limit else scale
        if factor != 1.0:
            for gradient in gradients:
                gradient.mul_(1 / factor)
        return True, norm

    def evaluator(self) -> Callable[[Tensor], Any]:
        """The network as it is now, for evaluation: fp32, no dropping. Collective at stage 3."""

        def outputs(images: Tensor) -> Any:
            self._engine.eval()
            with torch.no_grad():
                return self._engine(images)

        return outputs

    def weights(self) -> dict[str, Tensor]:
        """The full state of the network by name, on the host. Collective at stage 3; equal on all ranks."""
        state = self._model.state_dict()
        if self._stage == 3:
            state.update((name, _full(safe_get_full_fp32_param(p))) for name, p in self._parameters.items())
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}

    def adam_steps(self) -> int:
        """Updates that were applied, which is what Adam's bias correction counts."""
        return max((int(state.get("step", 0)) for state in self._optimizer.state.values()), default=0)

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter name, moment name, full tensor on the device), in an order that all ranks share. Collective."""
        if self.adam_steps() == 0:
            self._create_moments()
        self._link_moments()
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                if self._stage == 0:
                    yield name, moment, self._optimizer.state[parameter][moment]
                else:
                    yield name, moment, _full(safe_get_full_optimizer_state(parameter, moment))

    def load_moments(self, moment_of: Callable[[str, str], Tensor], adam_steps: int) -> None:
        """Put back what `moments` and `adam_steps` gave, on any world and at any stage."""
        self._create_moments()
        self._link_moments()
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                value = moment_of(name, moment).to(self._world.device)
                if self._stage == 0:
                    self._optimizer.state[parameter][moment].copy_(value)
                else:
                    safe_set_full_optimizer_state(parameter, value, moment)
        for state in self._optimizer.state.values():
            state["step"].fill_(adam_steps)

    def _link_moments(self) -> None:
        """Let DeepSpeed find the moments of all parameters. At stages 1 and 2 it looks for them once, when the first
        of the optimiser's groups has taken its first step and the others have no moments yet."""
        if self._stage in (1, 2):
            zero = self._engine.optimizer
            for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, flat, self._optimizer.state)

    def _create_moments(self) -> None:
        # DeepSpeed has no call for it, so take a step that changes nothing: zero loss at a learning rate of zero.
        size = self._config.image.size
        images = torch.zeros(1, 3, size, size, device=self._world.device)
        self._engine.train()
        for micro in range(self._accumulation):
            self._backward(self._engine(images).float().sum() * 0.0, is_last=micro == self._accumulation - 1)
        self._update(lr=0.0)
        for state in self._optimizer.state.values():
            state["step"].zero_()


def _full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "DeepSpeed gave no tensor for a trainable parameter"
    return tensor


def deepspeed_config(config: Config, world: World, accumulation: int, num_parameters: int) -> dict[str, Any]:
    """The DeepSpeed JSON that the typed configuration stands for, with `engine.deepspeed` merged in.

    Raises InputError where `engine.deepspeed` would contradict a generated key.
    """
    stage, clip = config.engine.zero_stage, config.optim.clip_grad or 0.0
    generated = {
        # Required by DeepSpeed and otherwise unused: batches are made by the feed.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": world.size * accumulation,
        "steps_per_print": None,
        # At stage 0 DeepSpeed reports no norm without clipping, so clipping is done here.
        "gradient_clipping": clip if stage > 0 else 0.0,
        "zero_optimization": {"stage": stage, "compute_grad_norm": True},
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
    # DeepSpeed allocates buckets of this many elements at every step, by default 500 million: 2 GB for any model.
    for bucket in ("reduce_bucket_size", "allgather_bucket_size"):
        zero.setdefault(bucket, min(num_parameters, _MOST_BUCKET_ELEMENTS))
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"engine.deepspeed.zero_optimization.{key}: {first['msg']}") from None
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


def make_deterministic() -> None:
    """Deterministic kernels only, from here on. Call before the first CUDA operation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling what `torch.empty` returns guards against uninitialised reads, at the price of writing all memory twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def _log_to_stderr() -> None:
    """DeepSpeed logs to standard output, whose last line is ours."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
