"""DeepSpeed, behind what the loop and checkpoints need: step, evaluator, weights, fragments, load.

Parameters, gradients, accumulation and reduction are fp32 at every ZeRO stage; bf16 and fp16 are autocast inside
the forward pass. So the weights in a checkpoint are the weights that train, whatever the stage or precision, and
stage 0 needs no master copy. fp16's loss scale is kept here, one rule for all stages.
"""

import copy
import dataclasses
import functools
import importlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.func
import torch.utils.deterministic
from torch import Tensor, nn
from torch.profiler import record_function

from pipeline import keys
from pipeline.config import ClassificationConfig, Config
from pipeline.feed.loader import MicroBatch
from pipeline.keys import Stream
from pipeline.train.checkpoint_files import MOMENTS
from pipeline.train.compile import compile_blocks
from pipeline.train.deepspeed_config import deepspeed_config
from pipeline.train.import_deepspeed import deepspeed
from pipeline.train.optim import parameter_groups, trainable
from pipeline.train.protocols import Task
from pipeline.world import World

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class Outcome:
    """What one optimiser step did. Equal on all ranks. Whoever asks for more than is known waits for the device."""

    loss: float  # mean over the global batch
    own_s: float  # this rank's forward passes, in seconds: what it works before it waits for others
    norm: Tensor | float  # of the gradients, before clipping; a tensor on the device until it is known
    left_out: bool | None = None  # None: if the norm is not finite
    overflow: bool = False  # fp16's gradients overflowed, and a smaller loss scale is left to try

    @property
    def is_known(self) -> bool:
        return not isinstance(self.norm, Tensor)

    @property
    def grad_norm(self) -> float:
        if isinstance(self.norm, Tensor):
            self.norm = self.norm.item()
        return self.norm

    @property
    def applied(self) -> bool:
        """False: the weights did not move."""
        return math.isfinite(self.grad_norm) if self.left_out is None else not self.left_out


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
    """The module that DeepSpeed wraps: a batch to the weighted sum of its losses, or to what the metric is given."""

    def __init__(self, task: Task, dtype: torch.dtype | None, device_type: str) -> None:
        super().__init__()
        self.model = task.model
        self._task, self._dtype, self._device_type = task, dtype, device_type

    def forward(self, batch: MicroBatch, *, evaluates: bool = False) -> Any:
        return self.outputs(self.model, batch) if evaluates else self.loss(self.model, batch)

    def loss(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        with torch.autocast(self._device_type, self._dtype, enabled=self._dtype is not None):
            losses = self._task.losses(model, batch)
        return (losses * batch.weights).sum()

    def outputs(self, model: nn.Module, batch: MicroBatch) -> Any:
        with torch.compiler.set_stance("force_eager"):  # compiled kernels round differently, and nobody else has them
            return self._task.outputs(model, batch)


class _Outputs(nn.Module):
    """An objective's outputs of another network, whose weights can be replaced."""

    def __init__(self, objective: _Objective, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._outputs = objective.outputs

    def forward(self, batch: MicroBatch) -> Any:
        return self._outputs(self.model, batch)


class _Gradients(nn.Module):
    """Loss and gradients in one forward call, so that recomputed activations too see the weights it is called with."""

    def __init__(self, objective: _Objective, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self._loss, self._names = objective.loss, names

    def forward(self, batch: MicroBatch) -> dict[str, Tensor]:
        loss = self._loss(self.model, batch)
        parameters = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(loss, [parameters[name] for name in self._names], materialize_grads=True)
        return {"loss": loss.detach(), **dict(zip(self._names, gradients, strict=True))}


class Engine:
    def __init__(self, config: Config, task: Task, world: World, blank: Callable[[int], list[MicroBatch]]) -> None:
        """`blank` makes a step's micro-batches with nothing in them that counts."""
        _log_to_stderr()
        # Nothing here uses DeepSpeed's compiled operators; without this it spends a minute building one at start-up.
        setattr(deepspeed.ops, "__compatible_ops__", {})  # noqa: B010 - not an attribute that type checkers know
        _import_muon()
        self._config, self._world, self._blank = config, world, blank
        self._accumulation = len(blank(0))
        self._model = task.model.to(world.device)
        self._parameters = dict(trainable(self._model))
        num_parameters = sum(p.numel() for p in self._parameters.values())
        self.stage = config.engine.stage(num_parameters)
        self._skeleton = copy.deepcopy(task.model).to("meta")  # to be run with other weights
        if config.engine.compile:
            compile_blocks(
                getattr(self._model, "backbone", self._model),
                sizes_vary=not isinstance(config.task, ClassificationConfig),
                deterministic=config.train.deterministic,
            )
        self._buffers = dict(self._model.named_buffers())
        self._statistics = _batch_statistics(self._model)
        self._has_moments = False
        self.loss_scale = LossScale() if config.engine.precision == "fp16" else None
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self._model, config.optim, task.depths if config.optim.tells_layers_apart else None),
            lr=0.0,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )
        self._objective = _Objective(task, _AUTOCAST.get(config.engine.precision), world.device.type)
        # Any, because DeepSpeed's annotations name every optimiser it might hold.
        self.deepspeed_config = deepspeed_config(config, world, self._accumulation, num_parameters)
        self._engine: Any = deepspeed.initialize(
            model=self._objective,
            optimizer=self._optimizer,
            config=copy.deepcopy(self.deepspeed_config),  # which DeepSpeed edits
            dist_init_required=False,
        )[0]
        self._engine.train()
        if self.stage == 0:
            self._engine.zero_grad = self._optimizer.zero_grad  # DeepSpeed's goes through all modules, each time
            # For one rank DeepSpeed would copy all gradients into one piece and back.
            self._engine.enable_backward_allreduce = world.size > 1

    def step(
        self,
        batches: list[MicroBatch],
        *,
        step: int,
        lr: float,
        exchange: Callable[[Tensor], tuple[float, bool]] | None = None,
    ) -> Outcome:
        """One optimiser step over this rank's micro-batches of a global batch.

        `exchange` is called once, before the last backward pass, with the weighted sum of this rank's losses. It
        returns the mean loss of the global batch and whether to go on; where not, on all ranks alike, nothing moves.
        Without it the loss is reduced and the step taken.
        """
        assert len(batches) == self._accumulation
        self._train()
        buffers = [buffer.clone() for buffer in self._buffers.values()]
        # DeepSpeed divides by the accumulation in `backward` and by the world in its reduction; this cancels both.
        share = self._world.size * self._accumulation / self._config.train.global_batch_size
        total = torch.zeros((), device=self._world.device)
        timer = _Timer(self._world.device)
        mean, go_on = math.nan, True
        for micro, batch in enumerate(batches):
            self.seed_modules(step, micro)
            with timer, record_function("forward"):
                loss = self._engine(batch)
            total += loss.detach()
            is_last = micro == self._accumulation - 1
            if is_last:
                mean, go_on = (exchange or self._mean)(total)
            # Leaving a step out takes the way of gradients that are not finite, which is there at every stage.
            with record_function("backward"):
                self._backward(loss * (share if go_on else math.nan), is_last)
        with record_function("update"):
            norm, left_out = self._update(lr)
        outcome = Outcome(mean, timer.seconds(), norm, left_out)
        if buffers and not outcome.applied:
            for buffer, before in zip(self._buffers.values(), buffers, strict=True):
                buffer.copy_(before)
        self._share_statistics()
        if self.loss_scale and go_on:
            outcome.overflow = not outcome.applied and self.loss_scale.value > self.loss_scale.floor
            self.loss_scale.update(outcome.applied)
        return outcome

    def _mean(self, loss: Tensor) -> tuple[float, bool]:
        return self._world.sum(loss.clone()).item() / self._config.train.global_batch_size, True

    def _train(self) -> None:
        if not self._objective.training:  # telling a thousand modules takes milliseconds
            self._engine.train()

    def seed_modules(self, step: int, micro: int) -> None:
        """For modules that draw by themselves (dropout): keyed, so that a resumed run draws the same."""
        seed = keys.torch_seed(keys.key(self._config.run.seed, Stream.MODULE, step, micro, self._world.rank))
        # As torch.manual_seed, which formats the call stack for each kind of device that is not there.
        torch.default_generator.manual_seed(seed)
        if self._world.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _share_statistics(self) -> None:
        """Batch norms collect statistics of their own rank's samples; all go on with the first rank's, which are those
        that are evaluated and saved."""
        if self._statistics and self._world.size > 1:
            first = torch.cat([buffer.flatten() for buffer in self._statistics]) * self._world.is_first
            shared = self._world.sum(first).split([buffer.numel() for buffer in self._statistics])
            for buffer, values in zip(self._statistics, shared, strict=True):
                buffer.copy_(values.view_as(buffer))

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        """Add a micro-batch's gradients. After the last one `_update` has to follow."""
        if self.loss_scale and self.stage == 0:
            loss = loss * self.loss_scale.value
        elif self.loss_scale:
            self._engine.optimizer.override_loss_scale(self.loss_scale.value)
        self._engine.backward(loss)
        if not is_last:
            self._engine.step()  # counts the micro-batch

    def _update(self, lr: float) -> tuple[Tensor | float, bool | None]:
        """Clip and apply the gradients. Returns their norm before clipping and whether they were left out; None: if
        the norm is not finite."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.stage == 0:
            norm = self._clip()
            self._engine.step()
            return norm, None
        self._engine.step()
        # ZeRO leaves a step with a non-finite norm out by itself, on all ranks alike.
        return self._engine.optimizer._global_grad_norm, bool(self._engine.optimizer.overflow)

    def _clip(self) -> Tensor:
        """What ZeRO's optimisers do at stages 1 to 3: unscale, clip, and leave out a step that is not finite. Fused
        AdamW is told in the way of torch.amp.GradScaler, on the device: the host need not wait for the norm first."""
        scale = self.loss_scale.value if self.loss_scale else 1.0
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / scale
        divisor = torch.full_like(norm, scale)
        if limit := self._config.optim.clip_grad:
            divisor *= ((norm + 1e-6) / limit).clamp(min=1.0)
        optimizer: Any = self._optimizer
        optimizer.grad_scale = divisor if limit or self.loss_scale else None
        optimizer.found_inf = 1.0 - norm.isfinite().float()
        return norm

    def gradients(self, batch: MicroBatch, *, step: int, micro: int) -> dict[str, Tensor]:
        """The loss ("loss") and its gradients by parameter for one micro-batch, of this rank alone, before any
        reduction. Collective at stage 3; changes nothing."""
        weights = {name: tensor.detach().requires_grad_() for name, tensor in self.whole(self.local_weights()).items()}
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        network = _Gradients(self._objective, self._skeleton.train(), list(weights))
        self.seed_modules(step, micro)
        state = {f"model.{name}": tensor for name, tensor in {**buffers, **weights}.items()}
        return torch.func.functional_call(network, state, (batch,))

    def evaluator(self) -> Callable[[MicroBatch], Any]:
        """The network as it is now, for evaluation: fp32, no dropping. Calling it is collective at stage 3."""

        def outputs(batch: MicroBatch) -> Any:
            self._engine.eval()
            with torch.no_grad():
                return self._engine(batch, evaluates=True)

        return outputs

    def evaluator_of(self, weights: dict[str, Tensor]) -> Callable[[MicroBatch], Any]:
        """The same with the given weights, by name. Calling it concerns this rank alone."""
        network = _Outputs(self._objective, self._skeleton.eval())
        state = {f"model.{name}": tensor for name, tensor in {**self._buffers, **weights}.items()}

        def outputs(batch: MicroBatch) -> Any:
            with torch.no_grad():
                return torch.func.functional_call(network, state, (batch,))

        return outputs

    def weights(self, local: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The full state of the network by name, on the device, with `local` in place of the trained weights if
        given. Collective at stage 3; equal on all ranks."""
        return {**self._untrained(), **self.whole(self.local_weights() if local is None else local)}

    def _untrained(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters."""
        frozen = {name: p for name, p in self._model.named_parameters() if name not in self._parameters}
        state = {name: value for name, value in self._model.state_dict().items() if name not in self._parameters}
        if frozen and self.stage == 3:
            with deepspeed.zero.GatheredParameters(list(frozen.values())):
                state.update((name, parameter.detach().clone()) for name, parameter in frozen.items())
        return state

    def local_weights(self) -> dict[str, Tensor]:
        """What this rank holds of each trainable parameter, fp32: all of it; at stage 3 its partition, flat."""
        if self.stage == 3:
            return self._partitions
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @functools.cached_property
    def _partitions(self) -> dict[str, Tensor]:
        # Kept, because DeepSpeed waits for the device whenever it is asked for one.
        return {name: self._partition(parameter) for name, parameter in self._parameters.items()}

    @property
    def keeps_copies(self) -> bool:
        """Whether every rank holds all parameters."""
        return self.stage < 3

    def whole(self, local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Full tensors from such as `local_weights` gives. Collective at stage 3."""
        if self.stage != 3:
            return local
        zero = self._engine.optimizer
        return {name: zero._fp32_state_allgather(self._parameters[name], part) for name, part in local.items()}

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """What `local_weights` would hold on this rank if the parameter `name` had the value `whole`."""
        parameter: Any = self._parameters[name]
        if self.stage != 3:
            return whole
        size = parameter.partition_numel()
        part = whole.flatten()[self._world.rank * size :][:size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))

    def adam_steps(self) -> int:
        """Updates that were applied, which is what Adam's bias correction counts."""
        steps = [state["step"] for state in self._optimizer.state.values() if "step" in state]
        return int(torch.stack(steps).max()) if steps else 0  # one wait for the device, not one a parameter

    def fragments(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """This rank's share of Adam's moments: (parameter name, moment, where in the flattened parameter it begins,
        view of the values, flat). The ranks' shares together are everything, each value once. No communication."""
        self._have_moments()
        if self.stage == 0:
            total = sum(parameter.numel() for parameter in self._parameters.values())
            rank, size = self._world.rank, self._world.size
            return self._range(total * rank // size, total * (rank + 1) // size)
        return self._held()

    def _held(self) -> Iterator[tuple[str, str, int, Tensor]]:
        """All of the moments that this rank holds."""
        if self.stage == 0:
            return self._range(0, sum(parameter.numel() for parameter in self._parameters.values()))
        return iter(self._partitioned_share) if self.stage == 3 else self._linked_share()

    def _range(self, first: int, last: int) -> Iterator[tuple[str, str, int, Tensor]]:
        """At stage 0, those of the given range of all parameters, laid end to end."""
        offset = 0
        for name, parameter in self._parameters.items():
            start, stop = (min(max(end - offset, 0), parameter.numel()) for end in (first, last))
            offset += parameter.numel()
            for moment in MOMENTS if start < stop else ():
                yield name, moment, start, self._optimizer.state[parameter][moment].view(-1)[start:stop]

    def _linked_share(self) -> Iterator[tuple[str, str, int, Tensor]]:
        for name, parameter in self._parameters.items():
            if mapping := parameter._hp_mapping:  # pyright: ignore[reportAttributeAccessIssue] - DeepSpeed's
                for moment in MOMENTS:
                    yield name, moment, mapping.lp_fragment_address.start, mapping.get_optim_state_fragment(moment)

    @functools.cached_property
    def _partitioned_share(self) -> list[tuple[str, str, int, Tensor]]:
        share = []
        for name, parameter in self._parameters.items():
            numel = parameter.ds_numel  # pyright: ignore[reportAttributeAccessIssue] - DeepSpeed's
            for moment in MOMENTS:
                values = self._partition(parameter, moment)
                start = self._world.rank * values.numel()
                if start < numel:
                    share.append((name, moment, start, values[: numel - start]))  # without what pads the last partition
        return share

    def _partition(self, parameter: Any, moment: str | None = None) -> Tensor:
        """This rank's partition of a parameter or a moment at stage 3, fp32, flat, padded."""
        return parameter._z3_optimizer._get_fp32_opt_state_partition(parameter, True, moment)[0].detach()

    def load_moments(self, read: Callable[[str, str, int, int], Tensor], adam_steps: int) -> None:
        """Put back what `fragments` and `adam_steps` gave, on any world and at any stage.

        `read(name, moment, start, stop)` returns that range of the flattened moment.
        """
        self._have_moments()
        for name, moment, start, values in self._held():
            values.copy_(read(name, moment, start, start + values.numel()))
        for state in self._optimizer.state.values():
            state["step"].fill_(adam_steps)

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Put the network into a state that `weights` gave, as if the engine had been built on it. Collective."""
        if self.stage == 3:
            with deepspeed.zero.GatheredParameters(list(self._parameters.values()), modifier_rank=0):
                for name, parameter in self._parameters.items():
                    parameter.copy_(weights[name])
            for name, buffer in self._model.named_buffers():
                if name in weights:
                    buffer.copy_(weights[name])
        else:
            self._model.load_state_dict(weights)
        for name, parameter in self._parameters.items():
            if self.stage == 3:
                self._partition(parameter).copy_(self.part_of(name, weights[name]))
            elif mapping := getattr(parameter, "_hp_mapping", None):
                start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                mapping.hp_fragment.copy_(parameter.flatten()[start : start + numel])

    def _have_moments(self) -> None:
        if not self._has_moments:
            if self.adam_steps() == 0:
                self._create_moments()
            self._link_moments()
            self._has_moments = True

    def _link_moments(self) -> None:
        """Let DeepSpeed find the moments of all parameters. At stages 1 and 2 it looks for them once, when the first
        of the optimiser's groups has taken its first step and the others have no moments yet."""
        if self.stage in (1, 2):
            zero = self._engine.optimizer
            for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                deepspeed.utils.lazy_init_hp_params_optimizer_state(parameters, flat, self._optimizer.state)

    def _create_moments(self) -> None:
        # DeepSpeed has no call for it, so take a step that changes nothing: zero loss at a learning rate of zero.
        self._train()
        buffers = [buffer.clone() for buffer in self._buffers.values()]
        for micro, batch in enumerate(self._blank(0), 1):
            self._backward(self._engine(batch), is_last=micro == self._accumulation)
        self._update(lr=0.0)
        for state in self._optimizer.state.values():
            state["step"].zero_()
        for buffer, before in zip(self._buffers.values(), buffers, strict=True):
            buffer.copy_(before)


def _batch_statistics(model: nn.Module) -> list[Tensor]:
    """The running means and variances of the network's batch norms."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]


class _Timer:
    """Sums up how long the device works inside `with`. On a GPU it is read when something else has waited for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._marks = device.type == "cuda", []

    def __enter__(self) -> None:
        self._marks.append(self._now())

    def __exit__(self, *_: object) -> None:
        self._marks.append(self._now())

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self._on_gpu:
            return sum(began.elapsed_time(ended) for began, ended in pairs) / 1000
        return sum(ended - began for began, ended in pairs)


def make_deterministic() -> None:
    """Deterministic kernels only, from here on. Call before the first CUDA operation."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling what `torch.empty` returns guards against uninitialised reads, at the price of writing all memory twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def _import_muon() -> None:
    """DeepSpeed imports its Muon optimiser at every start. Declaring what is compiled in there takes more than a
    second, for a function that is never called."""
    with mock.patch.object(deepspeed.runtime.compiler, "compile", return_value=lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def _log_to_stderr() -> None:
    """DeepSpeed logs to standard output, whose last line is ours."""
    logger = deepspeed.utils.logger
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
