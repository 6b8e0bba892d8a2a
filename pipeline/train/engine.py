"""DeepSpeed, behind what the loop and checkpoints need: a step in two halves, evaluation, weights, Adam's moments.

    batches ──forward──▶ PendingStep ──▶ the loop: reduces the loss, judges it ──▶ update ──▶ Outcome
                              └──────────────────────────────────────────────────▶ discard

Parameters, gradients, accumulation and reduction are fp32 at every ZeRO stage; bf16 and fp16 are autocast inside
the forward pass. So the weights in a checkpoint are the weights that train, whatever the stage or precision, and
stage 0 needs no master copy. fp16's loss scale is kept here, one rule for all stages.
"""

import copy
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.func
import torch.utils.deterministic
from torch import Tensor, nn
from torch.profiler import record_function

from pipeline import keys
from pipeline.config import Config
from pipeline.feed.loader import MicroBatch
from pipeline.keys import Stream
from pipeline.protocols import Task
from pipeline.train.compile import compile_blocks
from pipeline.train.deepspeed_config import deepspeed_config
from pipeline.train.device_timer import DeviceTimer
from pipeline.train.import_deepspeed import deepspeed, prepare_deepspeed
from pipeline.train.loss_scale import LossScale
from pipeline.train.moments import Fragment, Moments, ReadMoment, local_partition
from pipeline.train.objective import Objective, ReplicaGradients, ReplicaOutputs
from pipeline.train.optim import parameter_groups, trainable
from pipeline.train.outcome import Outcome
from pipeline.world import World

Evaluator = Callable[[MicroBatch], Any]
"""Returns what the metric is given for a batch."""
Tensors = dict[str, Tensor]
"""Tensors by the names that the network gives its parameters and buffers."""


class PendingStep(NamedTuple):
    """A step without its last backward pass. It holds that pass's activations until `update` or `discard` ends it."""

    loss_sum: Tensor
    """The weighted sum of this rank's losses, a scalar on the device."""
    last_loss: Tensor
    """The part of the last micro-batch, with its graph."""
    buffers: list[Tensor]
    """The network's buffers as they were before the step."""
    timer: DeviceTimer


class Engine:
    def __init__(self, config: Config, task: Task, world: World, blank: Callable[[int], list[MicroBatch]]) -> None:
        """`blank` makes a step's micro-batches in which every sample has zero weight."""
        prepare_deepspeed()
        self._config = config
        self._world = world
        self._blank = blank
        self._accumulation = len(blank(0))
        # DeepSpeed divides by the accumulation in `backward` and by the world in its reduction; this cancels both.
        self._loss_factor = world.size * self._accumulation / config.train.global_batch_size
        self._model = task.model.to(world.device)
        self._parameters = dict(trainable(self._model))
        self._buffers = dict(self._model.named_buffers())
        self._batch_statistics = _find_batch_statistics(self._model)
        self.num_parameters = sum(parameter.numel() for parameter in self._parameters.values())
        self.stage = config.engine.stage(self.num_parameters)
        # A copy without memory, to be run with other weights. Made before the blocks are compiled, so it is not.
        self._skeleton = copy.deepcopy(task.model).to("meta")
        if config.engine.compile:
            compile_blocks(
                getattr(self._model, "backbone", self._model),
                sizes_vary=config.task.sees_whole_images,
                deterministic=config.train.deterministic,
            )
        self.loss_scale = LossScale() if config.engine.precision == "fp16" else None
        depths = task.depths if config.optim.has_layer_rates else None
        # The learning rate is set before each update. `_clip` needs the fused implementation.
        self._optimizer = torch.optim.AdamW(
            parameter_groups(self._model, config.optim, depths),
            lr=0.0,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )
        self._objective = Objective(task, config.engine.precision, world.device.type)
        self.deepspeed_config = deepspeed_config(config, world, self._accumulation, self.num_parameters)
        # Any, because DeepSpeed's annotations name every optimiser it might hold.
        self._engine: Any = deepspeed.initialize(
            model=self._objective,
            optimizer=self._optimizer,
            # DeepSpeed edits what it is given.
            config=copy.deepcopy(self.deepspeed_config),
            dist_init_required=False,
        )[0]
        self._engine.train()
        if self.stage == 0:
            # DeepSpeed's own goes through all modules after each step: 3.5 ms for PVT-Large, the optimiser's 0.1 ms.
            self._engine.zero_grad = self._optimizer.zero_grad
            # For one rank DeepSpeed would copy all gradients into one piece and back.
            self._engine.enable_backward_allreduce = world.size > 1
        zero_optimizer = self._engine.optimizer
        self._moments = Moments(self.stage, world, self._parameters, self._optimizer, zero_optimizer)
        self._has_moments = False

    def forward(self, batches: list[MicroBatch], *, step: int) -> PendingStep:
        """Computes all of a step but its last backward pass, over this rank's micro-batches of a global batch.

        The losses of all ranks are known then, and what they show can still be acted on: `update` or `discard` has to
        follow, the same one on all ranks.
        """
        assert len(batches) == self._accumulation
        self._set_training_mode()
        buffers = self._clone_buffers()
        # On the device, so that the host does not wait for each micro-batch.
        loss_sum = torch.zeros((), device=self._world.device)
        timer = DeviceTimer(self._world.device)
        *earlier, last = batches
        for micro, batch in enumerate(earlier):
            loss = self._forward_micro_batch(batch, step, micro, timer)
            loss_sum += loss.detach()
            self._backward(loss, self._loss_factor, is_last=False)
        last_loss = self._forward_micro_batch(last, step, len(earlier), timer)
        loss_sum += last_loss.detach()
        return PendingStep(loss_sum, last_loss, buffers, timer)

    def _forward_micro_batch(self, batch: MicroBatch, step: int, micro: int, timer: DeviceTimer) -> Tensor:
        self.seed_modules(step, micro)
        with timer, record_function("forward"):
            return self._engine(batch)

    def update(self, pending: PendingStep, *, lr: float, loss: float, skip: bool = False) -> Outcome:
        """Does the last backward pass of a step and applies its gradients.

        `loss` is the mean of the global batch, for the Outcome. With `skip`, on all ranks alike, no weight moves.
        """
        # A skipped step takes the way of gradients that are not finite, which is there at every stage.
        factor = math.nan if skip else self._loss_factor
        self._backward(pending.last_loss, factor, is_last=True)
        with record_function("update"):
            norm, skipped = self._apply_gradients(lr)
        outcome = Outcome(loss, pending.timer.seconds(), norm, skipped)
        # Batch norms have seen the samples of a skipped step in its forward pass.
        if pending.buffers and not outcome.applied:
            self._restore_buffers(pending.buffers)
        self._share_batch_statistics()
        # A step that was skipped for its loss shows nothing about the loss scale.
        if self.loss_scale and not skip:
            is_above_floor = self.loss_scale.value > self.loss_scale.floor
            outcome.overflow = is_above_floor and not outcome.applied
            self.loss_scale.update(outcome.applied)
        return outcome

    def discard(self, pending: PendingStep) -> None:
        """Ends a step as if it had never begun: weights and buffers are those from before it.

        The gradients of its other micro-batches have been accumulated inside DeepSpeed, and only an update empties
        that. So the step is skipped.
        """
        self.update(pending, lr=0.0, loss=math.nan, skip=True)

    def step(self, batches: list[MicroBatch], *, step: int, lr: float) -> Outcome:
        """Takes a whole step, for benchmarks and tests: the training loop has more to do between its halves."""
        pending = self.forward(batches, step=step)
        loss = self._world.sum(pending.loss_sum).item() / self._config.train.global_batch_size
        return self.update(pending, lr=lr, loss=loss)

    def _clone_buffers(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._buffers.values()]

    def _restore_buffers(self, clones: list[Tensor]) -> None:
        for buffer, clone in zip(self._buffers.values(), clones, strict=True):
            buffer.copy_(clone)

    def _set_training_mode(self) -> None:
        # Setting the mode of a thousand modules takes milliseconds.
        if not self._objective.training:
            self._engine.train()

    def seed_modules(self, step: int, micro: int) -> None:
        """Seeds modules that draw random numbers by themselves (dropout), so that a resumed run draws the same."""
        key = keys.key(self._config.run.seed, Stream.MODULE, step, micro, self._world.rank)
        seed = keys.torch_seed(key)
        # As torch.manual_seed does, which also formats the call stack for each kind of device that is not there.
        torch.default_generator.manual_seed(seed)
        if self._world.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _share_batch_statistics(self) -> None:
        """Gives all ranks the first one's statistics of batch norms, which are those that are evaluated and saved.

        Batch norms collect statistics of their own rank's samples.
        """
        if not self._batch_statistics or self._world.size == 1:
            return
        flat = torch.cat([buffer.flatten() for buffer in self._batch_statistics])
        shared = self._world.sum(flat * self._world.is_first)
        sizes = [buffer.numel() for buffer in self._batch_statistics]
        for buffer, values in zip(self._batch_statistics, shared.split(sizes), strict=True):
            buffer.copy_(values.view_as(buffer))

    def _backward(self, loss: Tensor, factor: float, *, is_last: bool) -> None:
        """Adds a micro-batch's gradients. After the last one `_apply_gradients` has to follow."""
        with record_function("backward"):
            loss = loss * factor
            if self.loss_scale and self.stage == 0:
                loss = loss * self.loss_scale.value
            elif self.loss_scale:
                self._engine.optimizer.override_loss_scale(self.loss_scale.value)
            self._engine.backward(loss)
            if not is_last:
                # No update: DeepSpeed counts the micro-batch.
                self._engine.step()

    def _apply_gradients(self, lr: float) -> tuple[Tensor | float, bool | None]:
        """Clips and applies the gradients. Returns their norm before clipping and `Outcome.skipped`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.stage == 0:
            norm = self._clip()
            self._engine.step()
            return norm, None
        self._engine.step()
        # ZeRO skips a step with a non-finite norm by itself, on all ranks alike.
        zero = self._engine.optimizer
        return zero._global_grad_norm, bool(zero.overflow)

    def _clip(self) -> Tensor:
        """Does at stage 0 what ZeRO's optimisers do at stages 1 to 3: unscale, clip, and skip a step whose norm is not
        finite. Returns the norm before clipping."""
        scale = self.loss_scale.value if self.loss_scale else 1.0
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients) / scale
        divisor = torch.full_like(norm, scale)
        limit = self._config.optim.clip_grad
        if limit:
            divisor *= ((norm + 1e-6) / limit).clamp(min=1.0)
        # Fused AdamW divides and skips by itself, on the device, if it is asked to in the way of torch.amp.GradScaler.
        # So the host does not wait for the norm before the update.
        optimizer: Any = self._optimizer
        optimizer.grad_scale = divisor if limit or self.loss_scale else None
        optimizer.found_inf = 1.0 - norm.isfinite().float()
        return norm

    def gradients(self, batch: MicroBatch, *, step: int, micro: int) -> Tensors:
        """Returns the loss ("loss") and its gradients by parameter for one micro-batch of this rank alone, before any
        reduction. Collective at stage 3; changes nothing."""
        # Clones, because batch norms update their buffers in place.
        state = {name: buffer.clone() for name, buffer in self._buffers.items()}
        weights = self.gather_full(self.local_weights())
        for name, tensor in weights.items():
            state[name] = tensor.detach().requires_grad_()
        network = ReplicaGradients(self._objective, self._skeleton.train(), list(weights))
        self.seed_modules(step, micro)
        return torch.func.functional_call(network, _prefixed(state), (batch,))

    def evaluator(self) -> Evaluator:
        """Returns the network as it is now, for evaluation in fp32 without dropout. Calling it is collective at
        stage 3."""

        def compute_outputs(batch: MicroBatch) -> Any:
            self._engine.eval()
            with torch.no_grad():
                return self._engine(batch, evaluates=True)

        return compute_outputs

    def evaluator_of(self, weights: Tensors) -> Evaluator:
        """Returns the network with the given weights, by name, for evaluation. Calling it is not collective."""
        network = ReplicaOutputs(self._objective, self._skeleton.eval())
        state = _prefixed({**self._buffers, **weights})

        def compute_outputs(batch: MicroBatch) -> Any:
            with torch.no_grad():
                return torch.func.functional_call(network, state, (batch,))

        return compute_outputs

    def weights(self, local: Tensors | None = None) -> Tensors:
        """Returns the full state of the network by name, on the device. Collective at stage 3; equal on all ranks.

        `local`, in the form of `local_weights`, takes the place of the trained weights.
        """
        if local is None:
            local = self.local_weights()
        return {**self._untrained_state(), **self.gather_full(local)}

    def _untrained_state(self) -> Tensors:
        """Returns buffers and frozen parameters."""
        # At stage 3 parameters hold no values outside of a gather; buffers are not partitioned.
        state = self._model.state_dict()
        for name in self._parameters:
            del state[name]
        frozen = {name: parameter for name, parameter in self._model.named_parameters() if name in state}
        if frozen and self.stage == 3:
            with deepspeed.zero.GatheredParameters(list(frozen.values())):
                for name, parameter in frozen.items():
                    state[name] = parameter.detach().clone()
        return state

    def local_weights(self) -> Tensors:
        """Returns what this rank holds of each trainable parameter in fp32: all of it; at stage 3 its partition,
        flat."""
        if self.stage == 3:
            return self._partitions
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @functools.cached_property
    def _partitions(self) -> Tensors:
        # Kept, because DeepSpeed waits for the device whenever it is asked for one.
        return {name: local_partition(parameter) for name, parameter in self._parameters.items()}

    @property
    def keeps_copies(self) -> bool:
        """Whether every rank holds all parameters."""
        return self.stage < 3

    def gather_full(self, local: Tensors) -> Tensors:
        """Returns the full tensors of what `local_weights` gives. Collective at stage 3."""
        if self.stage != 3:
            return local
        gather = self._engine.optimizer._fp32_state_allgather
        weights = {}
        for name, partition in local.items():
            weights[name] = gather(self._parameters[name], partition)
        return weights

    def partition_of(self, name: str, whole: Tensor) -> Tensor:
        """Returns what `local_weights` would hold on this rank if the parameter `name` had the value `whole`."""
        if self.stage != 3:
            return whole
        parameter: Any = self._parameters[name]
        size = parameter.partition_numel()
        start = self._world.rank * size
        partition = whole.flatten()[start : start + size]
        padding = size - partition.numel()
        return torch.nn.functional.pad(partition, (0, padding))

    def adam_steps(self) -> int:
        """Returns the number of updates that were applied."""
        return self._moments.adam_steps()

    def fragments(self) -> Iterator[Fragment]:
        """Returns this rank's share of Adam's moments. The ranks' shares together hold each value once."""
        self._ensure_moments()
        return self._moments.fragments()

    def load_moments(self, read: ReadMoment, adam_steps: int) -> None:
        """Puts back what `fragments` and `adam_steps` gave, on any world and at any stage."""
        self._ensure_moments()
        self._moments.load(read, adam_steps)

    @torch.no_grad()
    def load_weights(self, weights: Tensors) -> None:
        """Puts the network into a state that `weights` gave, as if the engine had been built on it. Collective."""
        if self.stage == 3:
            self._load_partitions(weights)
            return
        self._model.load_state_dict(weights)
        for parameter in self._parameters.values():
            # Stages 1 and 2 update a copy of this rank's range, and the parameters from that.
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping:
                address = mapping.lp_fragment_address
                end = address.start + address.numel
                mapping.hp_fragment.copy_(parameter.flatten()[address.start : end])

    def _load_partitions(self, weights: Tensors) -> None:
        with deepspeed.zero.GatheredParameters(list(self._parameters.values()), modifier_rank=0):
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])
        for name, buffer in self._model.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        for name, parameter in self._parameters.items():
            local_partition(parameter).copy_(self.partition_of(name, weights[name]))

    def _ensure_moments(self) -> None:
        if self._has_moments:
            return
        if self.adam_steps() == 0:
            self._create_moments()
        self._moments.link()
        self._has_moments = True

    def _create_moments(self) -> None:
        # DeepSpeed has no call for it, so take a step that changes nothing: zero loss at a learning rate of zero.
        self._set_training_mode()
        buffers = self._clone_buffers()
        *earlier, last = self._blank(0)
        for batch in earlier:
            self._backward(self._engine(batch), 1.0, is_last=False)
        self._backward(self._engine(last), 1.0, is_last=True)
        self._apply_gradients(lr=0.0)
        self._moments.reset_steps(0)
        self._restore_buffers(buffers)


def _find_batch_statistics(model: nn.Module) -> list[Tensor]:
    """Returns the running means and variances of the network's batch norms."""
    statistics = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            statistics += [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    return statistics


def _prefixed(state: Tensors) -> Tensors:
    """Returns the network's state under the names that it has inside an objective."""
    return {f"model.{name}": tensor for name, tensor in state.items()}


def make_deterministic() -> None:
    """Has torch use deterministic kernels only, from here on. Call it before the first CUDA operation."""
    # Without it torch refuses matrix products on a GPU, because cuBLAS then may compute them in varying order.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling what `torch.empty` returns guards against uninitialised reads, at the price of writing all memory twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
