"""How long a training step takes on W ranks at ZeRO 0 to 3, from measured or assumed pieces. Arithmetic alone.

Weak scaling: every rank has the same micro-batch, however many there are. A step is

    computing       forward, backward and optimiser of one rank; the optimiser's at ZeRO 1 to 3 divided by W
  + bookkeeping     DeepSpeed's copies of gradients and weights, and its hooks in Python
  + communication   as far as it sticks out of computing
  + stragglers      σ · E(max of W standard normals) · computing: every rank has its own normal jitter, and all wait for
                    the slowest after forward (for the loss), after backward (for gradients) and after the update
  + host            max(0, what a GPU's host takes to ask for a step - all of the above): it runs ahead of the GPU, or
                    the GPU waits for it
  + data            max(0, batch / feed - all of the above)
  + checkpoints     all of it · stall of a save / time between two

What DeepSpeed 0.19 sends with this project's settings, with S bytes of fp32 weights and as many of gradients, by its
source; benchmarks.scaling compares it with what is called:

    ZeRO-0     all-reduce of S after backward
    ZeRO-1, 2  all-reduce of S too (`use_multi_rank_bucket_allreduce`), not reduce-scatter, in buckets of 50 million
               elements. At 1 it follows backward, at 2 backward waits for it (`overlap_comm` is off), so it sticks out.
               After the update all-gather of S, a call for each of the optimiser's groups
    ZeRO-3     all-gather of the weights at the start of forward, 50 million elements a call: so much is fetched
               ahead, and nothing is let go before backward (`max_reuse_distance`). Reduce-scatter of S in buckets, on
               GPUs beside backward. With DeepSpeed's own `stage3_param_persistence_threshold` every rank keeps copies
               of weights of less than 100,000 elements, and after the update there is an all-gather for each
    all        all-reduces of a few bytes: the loss after forward, at 1 to 3 the norm of each group's gradients

A collective of S bytes costs, on a ring of n ranks (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for
clusters of workstations", 2009)

    all-reduce                    2 (n - 1) · (latency + S / n / bandwidth)
    all-gather, reduce-scatter      (n - 1) · (latency + S / n / bandwidth)

first inside a node of m ranks, then with S / m between nodes, where each rank has its own adapter. Between nodes an
all-reduce takes a double binary tree where that is faster, as NCCL does (Sanders, Speck and Träff, "Two-tree
algorithms for full bandwidth broadcast, reduction and scan", 2009): 2 (latency of a tree · log₂ n + S / bandwidth).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr

ELEMENT_BYTES = 4
"""Of weights and of gradients on the wire."""
BUCKET_ELEMENTS = 50_000_000
"""Most of a bucket, as pipeline.train.deepspeed_config sets it; and what stage 3 fetches ahead, DeepSpeed's default."""
TREE_LATENCY = 8.5 / 4.0
"""Of a hop in a tree over one in a ring: NCCL's table for LL128 on a network (src/graph/tuning.cc)."""

RING_PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


class Setting(NamedTuple):
    """Of DeepSpeed."""

    stage: int
    overlap_comm: bool = False
    """By default at stage 3 alone."""
    persistent_elements: int = 0
    """`stage3_param_persistence_threshold`: smaller weights are not partitioned at stage 3. DeepSpeed's default is
    100,000, pipeline.train.deepspeed_config's is 0."""


class Link(NamedTuple):
    latency_s: float  # of a hop
    bytes_per_s: float  # each direction, of a rank


@dataclasses.dataclass(frozen=True)
class Hardware:
    inside: Mapping[str, Link]  # a node, by kind of collective
    between: Mapping[str, Link]  # nodes
    ranks_per_node: int
    copy_s_per_byte: float
    call_s: float = 0.0  # of any collective, before something is sent
    overlaps: bool = True  # reductions can go on beside backward


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What a step is put together from."""

    hardware: Hardware
    batch: int  # images of a rank
    forward_s: float
    backward_s: float
    optimizer_s: float  # for all weights
    jitter: float = 0.0  # standard deviation of a rank's computing over its mean
    hook_s: float = 0.0  # DeepSpeed's Python for a weight
    host_s: float = 0.0  # of a GPU's host for a step, whatever the batch; of a CPU it is in the passes
    feed: float = math.inf  # images a second, of a rank
    stall_s: float = 0.0  # of a save
    save_every_s: float = math.inf


class Weight(NamedTuple):
    num_elements: int
    begins: float  # the part of the forward pass that is over when it is needed


@dataclasses.dataclass(frozen=True)
class Network:
    weights: tuple[Weight, ...]  # in the order of the forward pass
    groups: tuple[int, ...]  # elements of each of the optimiser's groups

    @property
    def num_bytes(self) -> int:
        return ELEMENT_BYTES * sum(weight.num_elements for weight in self.weights)


class Call(NamedTuple):
    """A collective."""

    kind: str
    num_bytes: int  # of the whole tensor that goes in or comes out
    at: float = 0.0  # the part of the pass after which a rank can send it, or needs it


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of a step."""

    fetches: tuple[Call, ...] = ()  # asked for at the start of forward, `at`: where they are needed
    loss: tuple[Call, ...] = ()
    reductions: tuple[Call, ...] = ()  # `at`: where backward has filled the bucket
    norms: tuple[Call, ...] = ()
    gathers: tuple[Call, ...] = ()

    @property
    def calls(self) -> tuple[Call, ...]:
        return self.fetches + self.loss + self.reductions + self.norms + self.gathers


@dataclasses.dataclass(frozen=True)
class Step:
    computing_s: float
    bookkeeping_s: float
    communication_s: float
    stragglers_s: float
    host_s: float
    data_s: float
    checkpoints_s: float

    @property
    def total_s(self) -> float:
        return sum(dataclasses.astuple(self))


def step(pieces: Pieces, network: Network, setting: Setting, world_size: int) -> Step:
    computing_s = pieces.forward_s + pieces.backward_s + pieces.optimizer_s / (world_size if setting.stage else 1)
    copies_s = passes(network, setting, world_size) * network.num_bytes * pieces.hardware.copy_s_per_byte
    bookkeeping_s = copies_s + pieces.hook_s * len(network.weights)
    communication_s = exposed_s(traffic(network, setting, world_size), pieces, setting, world_size)
    stragglers_s = pieces.jitter * expected_max(world_size) * computing_s
    device_s = computing_s + bookkeeping_s + communication_s + stragglers_s
    host_s = max(0.0, pieces.host_s - device_s)
    data_s = max(0.0, pieces.batch / pieces.feed - device_s - host_s)
    checkpoints_s = (device_s + host_s + data_s) * pieces.stall_s / pieces.save_every_s
    return Step(computing_s, bookkeeping_s, communication_s, stragglers_s, host_s, data_s, checkpoints_s)


def exposed_s(sent: Traffic, pieces: Pieces, setting: Setting, world_size: int) -> float:
    """Communication that computing does not hide."""

    def costs_s(calls: Iterable[Call]) -> list[float]:
        return [collective_s(call, world_size, pieces.hardware) for call in calls]

    fetching_s = stalled_s([call.at * pieces.forward_s for call in sent.fetches], costs_s(sent.fetches))
    if setting.overlap_comm and pieces.hardware.overlaps:
        ready_s = [call.at * pieces.backward_s for call in sent.reductions]
        reducing_s = max(0.0, queued_s(ready_s, costs_s(sent.reductions)) - pieces.backward_s)
    else:
        reducing_s = sum(costs_s(sent.reductions))
    return fetching_s + reducing_s + sum(costs_s(sent.loss + sent.norms + sent.gathers))


def traffic(network: Network, setting: Setting, world_size: int) -> Traffic:
    """What DeepSpeed calls in a step, without padding. A rank alone calls nothing that takes time."""
    if world_size == 1:
        return Traffic()
    loss = (Call("all_reduce", ELEMENT_BYTES),)
    if setting.stage == 0:
        return Traffic(loss=loss, reductions=(Call("all_reduce", network.num_bytes, at=1.0),))
    backward = [Weight(weight.num_elements, 1.0 - weight.begins) for weight in reversed(network.weights)]
    kind, gathered, norm_bytes = "all_reduce", list(network.groups), ELEMENT_BYTES
    large: list[Weight] = []
    if setting.stage == 3:
        kind, norm_bytes = "reduce_scatter", 2 * ELEMENT_BYTES
        large = [weight for weight in network.weights if weight.num_elements >= setting.persistent_elements]
        gathered = [w.num_elements for w in network.weights if w.num_elements < setting.persistent_elements]
    return Traffic(
        fetches=tuple(_fetches(large)),
        loss=loss,
        reductions=tuple(
            Call(kind, ELEMENT_BYTES * bucket.num_elements, bucket.begins) for bucket in buckets(backward)
        ),
        norms=(Call("all_reduce", norm_bytes),) * len(network.groups),
        gathers=tuple(Call("all_gather", ELEMENT_BYTES * num_elements) for num_elements in gathered),
    )


def buckets(weights: Iterable[Weight], most_elements: int = BUCKET_ELEMENTS) -> list[Weight]:
    """Of gradients, in the order of the backward pass: a bucket is sent when the next one does not fit. `begins`: the
    part of the backward pass after which a gradient, or a bucket, is there."""
    filled: list[Weight] = []
    num_elements, ready = 0, 0.0
    for weight in weights:
        if num_elements and num_elements + weight.num_elements > most_elements:
            filled.append(Weight(num_elements, ready))
            num_elements = 0
        num_elements, ready = num_elements + weight.num_elements, weight.begins
    return [*filled, Weight(num_elements, 1.0)]


def _fetches(weights: Sequence[Weight]) -> list[Call]:
    """Stage 3 asks for weights until it has asked for so many elements, then for the next ones: for all of them by the
    second module of the forward pass. Who waits for one of a call's weights waits for the call."""
    calls: list[Call] = []
    left = list(weights)
    while left:
        needed, num_elements = left[0].begins, 0
        while left and num_elements < BUCKET_ELEMENTS:
            num_elements += left.pop(0).num_elements
        calls.append(Call("all_gather", ELEMENT_BYTES * num_elements, needed))
    return calls


def passes(network: Network, setting: Setting, world_size: int) -> float:
    """How many times DeepSpeed copies, scales or converts as many bytes as the gradients have, by its source and as
    counted: into buckets and flat tensors and back, divided by W, clipped, and for the norm as fp64; of what a rank
    keeps, only its part. At stage 3 also weights, into and out of what is fetched. At stage 0 AdamW clips
    as it goes, and a rank alone copies nothing."""
    if setting.stage == 0:
        return 3 * (world_size > 1)
    if setting.stage < 3:
        return 2 + (world_size > 1) + 7 / world_size
    fetched_bytes = sum(call.num_bytes for call in traffic(network, setting, world_size).fetches)
    return 3 + 7 / world_size + fetched_bytes / network.num_bytes * (1 + 1 / world_size)


def collective_s(call: Call, world_size: int, hardware: Hardware) -> float:
    """W is up to a node's ranks, or full nodes."""
    if world_size == 1:
        return 0.0
    inside = min(world_size, hardware.ranks_per_node)
    num_nodes = math.ceil(world_size / hardware.ranks_per_node)
    link, shard_bytes = hardware.between[call.kind], call.num_bytes / inside
    between_s = ring_s(call.kind, shard_bytes, num_nodes, link)
    if call.kind == "all_reduce":
        between_s = min(between_s, tree_s(shard_bytes, num_nodes, link))
    return hardware.call_s + ring_s(call.kind, call.num_bytes, inside, hardware.inside[call.kind]) + between_s


def ring_s(kind: str, num_bytes: float, num_ranks: int, link: Link) -> float:
    hops = RING_PASSES[kind] * (num_ranks - 1)
    return hops * (link.latency_s + num_bytes / num_ranks / link.bytes_per_s)


def tree_s(num_bytes: float, num_ranks: int, link: Link) -> float:
    """Of an all-reduce."""
    if num_ranks == 1:
        return 0.0
    return 2 * (TREE_LATENCY * link.latency_s * math.log2(num_ranks) + num_bytes / link.bytes_per_s)


def queued_s(ready_s: Sequence[float], costs_s: Sequence[float]) -> float:
    """When a stream is through that takes one after another, each as soon as it is ready."""
    end = 0.0
    for ready, cost in zip(ready_s, costs_s, strict=True):
        end = max(end, ready) + cost
    return end


def stalled_s(needed_s: Sequence[float], costs_s: Sequence[float]) -> float:
    """How much later a pass ends that needs one after another, all under way from its start."""
    arrived = np.cumsum(costs_s)
    return float(np.max(arrived - np.asarray(needed_s), initial=0.0))


def expected_max(num_draws: int) -> float:
    """Of so many independent draws from a standard normal distribution, by the trapezoidal rule."""
    bound = 10.0
    grid = np.linspace(-bound, bound, 20_001)
    return bound - float(np.trapezoid(ndtr(grid) ** num_draws, grid))
