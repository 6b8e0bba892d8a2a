"""The model of a step over ranks: formulas by hand, DeepSpeed's calls and copies as counted, and the command."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from benchmarks import scaling
from benchmarks.scaling import BURST, CHECKED, COLLECTIVE_BYTES, GPUS, SETTINGS, SMALL
from benchmarks.scaling_model import (
    BUCKET_ELEMENTS,
    RING_PASSES,
    Call,
    Hardware,
    Link,
    Network,
    Pieces,
    Setting,
    Weight,
    buckets,
    collective_s,
    expected_max,
    exposed_s,
    passes,
    queued_s,
    stalled_s,
    step,
    traffic,
    tree_s,
)
from pipeline import network
from pipeline.config import ClassificationConfig, EngineConfig, ModelConfig
from pipeline.errors import InputError
from pipeline.train.deepspeed_config import deepspeed_config
from pipeline.world import World
from tests.conftest import run_ranks

MILLION = 1_000_000
NETWORK = Network(
    weights=(Weight(30 * MILLION, 0.0), Weight(10, 0.25), Weight(25 * MILLION, 0.5), Weight(20, 0.75)),
    groups=(55 * MILLION, 30),
)


FREE = Link(0.0, math.inf)


def hardware(inside: Link, between: Link = FREE, **more: Any) -> Hardware:
    """Nodes of eight."""
    return Hardware(dict.fromkeys(RING_PASSES, inside), dict.fromkeys(RING_PASSES, between), 8, 0.0, **more)


def pieces(**more: Any) -> Pieces:
    return dataclasses.replace(Pieces(hardware(FREE), 8, forward_s=1.0, backward_s=2.0, optimizer_s=0.4), **more)


@pytest.mark.parametrize(
    ("kind", "seconds"), [("all_reduce", 12.0 + 6 * 0.5), ("all_gather", 6.0 + 3 * 0.5), ("reduce_scatter", 7.5)]
)
def test_ring_collective_time_on_four_ranks(kind: str, seconds: float) -> None:
    # Each rank sends three quarters of the tensor, twice for an all-reduce: 2 · ¾ · 800 B / (100 B/s) = 12 s.
    assert collective_s(Call(kind, 800), 4, hardware(Link(0.5, 100.0))) == pytest.approx(seconds)


def test_hierarchical_all_gather_time_across_nodes() -> None:
    # Inside: ⅞ · 800 / 100 = 7 s and 7 hops. Between four nodes: ¾ · 100 / 10 = 7.5 s and 3 hops.
    told = hardware(Link(0.1, 100.0), Link(1.0, 10.0), call_s=0.01)
    assert collective_s(Call("all_gather", 800), 32, told) == pytest.approx(0.01 + 7 + 0.7 + 7.5 + 3)


def test_all_reduce_uses_a_tree_where_faster() -> None:
    link = Link(1.0, 10.0)
    assert tree_s(100.0, 1, link) == 0
    assert tree_s(100.0, 8, link) == pytest.approx(2 * (8.5 / 4 * 3 + 10))
    free = hardware(FREE, link)
    assert collective_s(Call("all_reduce", 8), 8 * 512, free) == pytest.approx(tree_s(1.0, 512, link))
    assert collective_s(Call("all_reduce", 8), 8 * 2, free) == pytest.approx(2 * (1.0 + 0.05))  # a ring


def test_expected_max_of_normal_draws() -> None:
    exact = {1: 0.0, 2: 1 / math.sqrt(math.pi), 3: 1.5 / math.sqrt(math.pi)}
    assert {draws: expected_max(draws) for draws in exact} == pytest.approx(exact, abs=1e-7)
    drawn = np.random.default_rng(0).standard_normal((20_000, 64)).max(axis=1)
    assert expected_max(64) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / math.sqrt(len(drawn)))


def test_queued_and_stalled_times() -> None:
    assert queued_s([1.0, 1.5, 4.0], [1.0, 1.0, 0.5]) == 4.5  # the second waits for the first, the third is free to go
    assert stalled_s([1.0, 2.0], [0.5, 1.0]) == 0
    assert stalled_s([0.5, 0.6], [1.0, 1.0]) == pytest.approx(1.4)
    assert stalled_s([], []) == 0


def test_gradient_bucket_is_sent_when_the_next_does_not_fit() -> None:
    gradients = [Weight(3, 0.1), Weight(7, 0.3), Weight(5, 0.6), Weight(12, 0.8), Weight(1, 0.9)]
    assert buckets(gradients, 10) == [Weight(10, 0.3), Weight(5, 0.6), Weight(12, 0.8), Weight(1, 1.0)]


def test_collective_calls_by_zero_stage() -> None:
    def calls(setting: Setting) -> list[Call]:
        return list(traffic(NETWORK, setting, 16).calls)

    loss, norm = Call("all_reduce", 4), Call("all_reduce", 4)
    late, early = 4 * (25 * MILLION + 30), 4 * 30 * MILLION  # two buckets, for 50 million do not hold all
    assert calls(Setting(0)) == [loss, Call("all_reduce", 220 * MILLION + 120, at=1.0)]
    reduced = [Call("all_reduce", late, at=0.75), Call("all_reduce", early, at=1.0)]
    gathered = [Call("all_gather", 220 * MILLION), Call("all_gather", 120)]
    assert calls(Setting(1)) == calls(Setting(2)) == [loss, *reduced, norm, norm, *gathered]
    scattered = [Call("reduce_scatter", call.num_bytes, call.at) for call in reduced]
    norms = [Call("all_reduce", 8)] * 2
    fetched, small = [Call("all_gather", 220 * MILLION, at=0.0)], [Call("all_gather", 40), Call("all_gather", 80)]
    assert calls(Setting(3, persistent_elements=100_000)) == [*fetched, loss, *scattered, *norms, *small]
    whole = [Call("all_gather", 220 * MILLION + 40, at=0.0), Call("all_gather", 80, at=0.75)]
    assert calls(Setting(3)) == [*whole, loss, *scattered, *norms]


def test_communication_overlapping_backward_is_free() -> None:
    told = hardware(Link(0.0, 100.0 * MILLION))
    fit = pieces(hardware=told)
    alone = {True: Setting(2, overlap_comm=True), False: Setting(2)}
    sent = {shown: traffic(NETWORK, setting, 2) for shown, setting in alone.items()}
    # All-reduces of 100 and 120 MB take 1 and 1.2 s, and the gathers 1.1 s. Backward takes 2 s, and half a second is
    # left of it when the first bucket is there.
    exposed = {shown: exposed_s(sent[shown], fit, setting, 2) for shown, setting in alone.items()}
    assert exposed[False] == pytest.approx(1.0 + 1.2 + 1.1, rel=1e-5)
    assert exposed[True] == pytest.approx(0.5 + 1.2 + 1.1, rel=1e-5)
    # Without a stream of its own it waits.
    serial = pieces(hardware=dataclasses.replace(told, overlaps=False))
    assert exposed_s(sent[True], serial, alone[True], 2) == pytest.approx(exposed[False])
    assert exposed_s(sent[False], pieces(), alone[False], 4096) == 0


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_single_rank_step_is_computing_only(setting: Setting) -> None:
    alone = step(pieces(jitter=0.1, hardware=hardware(Link(1.0, 1.0))), NETWORK, setting, 1)
    assert alone.total_s == alone.computing_s == 3.4


def test_step_time_is_split_into_parts() -> None:
    copied = dataclasses.replace(hardware(FREE), copy_s_per_byte=1 / NETWORK.num_bytes)
    base = pieces(hardware=copied, hook_s=0.01, jitter=0.1, batch=100, feed=10.0, stall_s=0.5, save_every_s=10.0)
    two = step(base, NETWORK, Setting(1), 2)
    assert two.computing_s == pytest.approx(1.0 + 2.0 + 0.4 / 2)
    assert two.bookkeeping_s == pytest.approx(3 + 7 / 2 + 4 * 0.01)
    assert two.communication_s == 0
    assert two.stragglers_s == pytest.approx(0.1 / math.sqrt(math.pi) * 3.2)
    assert two.data_s == pytest.approx(10 - (3.2 + 6.54 + 0.32 / math.sqrt(math.pi)))  # a batch takes the feed 10 s
    assert two.checkpoints_s == pytest.approx(0.05 * 10)
    assert step(base, NETWORK, Setting(0), 2).computing_s == pytest.approx(3.4)
    assert step(dataclasses.replace(base, feed=20.0), NETWORK, Setting(1), 2).data_s == 0


def test_gpu_waits_for_a_slow_host() -> None:
    for host_s, waited_s in ((1.0, 0.0), (5.0, 1.6)):  # beside 3.4 s of computing
        slow = step(pieces(host_s=host_s), NETWORK, Setting(0), 1)
        assert slow.host_s == pytest.approx(waited_s)
        assert slow.total_s == pytest.approx(max(host_s, 3.4))
    # What the host takes is there for the feed as well.
    assert step(pieces(host_s=5.0, batch=100, feed=20.0), NETWORK, Setting(0), 1).data_s == 0
    assert step(pieces(host_s=5.0, batch=120, feed=20.0), NETWORK, Setting(0), 1).data_s == pytest.approx(1.0)


def test_model_constants_match_deepspeed_config() -> None:
    for stage in (1, 2, 3):
        setting = SETTINGS[f"ZeRO-{stage}"]
        # As a configuration that says no more than the stage.
        engine = EngineConfig.model_validate({"zero_stage": setting.stage})
        config = SMALL.config().model_copy(update={"engine": engine})
        given = deepspeed_config(config, World(), 1, 10**9)["zero_optimization"]
        assert given["reduce_bucket_size"] == BUCKET_ELEMENTS
        zero = DeepSpeedZeroConfig.model_validate(given)
        assert zero.overlap_comm == setting.overlap_comm
        assert zero.prefetch_bucket_size == BUCKET_ELEMENTS
        if stage == 3:
            assert zero.param_persistence_threshold == setting.persistent_elements


def test_network_description_matches_the_model() -> None:
    found = scaling.network_of(SMALL.config(), 10)
    model = network.build(ClassificationConfig(), ModelConfig(name="pvt_pico"), 32, 10)
    sizes = sorted(weight.numel() for weight in model.parameters())
    assert sorted(weight.num_elements for weight in found.weights) == sizes
    assert sum(found.groups) == sum(sizes)
    begins = [weight.begins for weight in found.weights]
    assert begins[0] == 0
    assert begins == sorted(begins)
    assert 0.99 < begins[-1] < 1  # the classifier


def test_modelled_calls_and_copies_match_deepspeed() -> None:
    [found] = run_ranks(2, "scaling")
    model = scaling.network_of(SMALL.config(), 10)
    for name, counted in found.items():
        modelled, called = sorted(traffic(model, SETTINGS[name], 2).calls), sorted(counted["calls"])
        assert [kind for kind, _ in called] == [call.kind for call in modelled], name
        num_bytes = [call.num_bytes for call in modelled]
        assert [of for _, of in called] == pytest.approx(num_bytes, abs=16), name  # padding
        assert counted["copied"] / model.num_bytes == pytest.approx(passes(model, SETTINGS[name], 2), abs=0.1), name


def test_links_and_jitter_are_fitted_from_measurements() -> None:
    links = {"all_reduce": Link(1e-4, 2e9), "all_gather": Link(3e-4, 1e9), "reduce_scatter": Link(2e-4, 5e8)}
    gloo = Hardware(links, links, 2, 0.0)
    exact = {
        f"{kind} {size}": [collective_s(Call(kind, size), 2, gloo)] * 3 for kind in links for size in COLLECTIVE_BYTES
    }
    ranks = [{**exact, "burst": [BURST * 3e-4]}] * 2
    for kind, link in scaling.links_of(ranks).items():
        assert tuple(link) == pytest.approx(links[kind], rel=1e-3)

    random = np.random.default_rng(0)
    together = random.normal(0, 0.5, 4000)  # a disturbance of both ranks is none of one beside the other
    drawn = [{part: (2.0 + together + random.normal(0, 0.04, 4000)).tolist() for part in scaling.PARTS} for _ in "12"]
    assert scaling.jitter_of(drawn) == pytest.approx(0.02, rel=0.1)
    assert scaling.jitter_of(drawn[:1]) == 0


def test_check_reports_no_error_for_steps_as_modelled(monkeypatch: pytest.MonkeyPatch) -> None:
    links = {kind: Link(1e-3, 1e9) for kind in RING_PASSES}
    model, small = (scaling.network_of(case.config(), 10) for case in (CHECKED, SMALL))
    copy_s_per_byte, hook_s = 1e-9, 2e-4

    def measured(ranks: int) -> list[dict[str, Any]]:
        gloo = Hardware(links, links, 2, copy_s_per_byte, overlaps=False)
        given = Pieces(gloo, 8, forward_s=0.2, backward_s=0.4, optimizer_s=0.01, hook_s=hook_s)
        found = {"forward": 0.2, "backward": 0.4, "optimizer": 0.01, "small": 0.005, "burst": BURST * 1e-3}
        found["copy"] = copy_s_per_byte * model.num_bytes
        for kind, size in itertools.product(links, COLLECTIVE_BYTES):
            found[f"{kind} {size}"] = collective_s(Call(kind, size), 2, gloo)
        for name in scaling.CHECKED_SETTINGS:
            found[f"step {name}"] = step(given, model, SETTINGS[name], ranks).total_s
            copies_s = passes(small, SETTINGS[name], 1) * small.num_bytes * copy_s_per_byte
            found[f"small {name}"] = 0.005 + copies_s + hook_s * len(small.weights)
        readings = {name: [seconds] * 3 for name, seconds in found.items()}
        sent = {name: traffic(model, SETTINGS[name], 2).calls for name in scaling.CHECKED_SETTINGS}
        calls = {name: [(call.kind, call.num_bytes) for call in of] for name, of in sent.items()}
        return [{"torch": readings, "deepspeed": readings, "traffic": calls}] * ranks

    monkeypatch.setattr(scaling, "_measured", measured)
    checked = scaling.check()
    assert checked["worst_error"] == pytest.approx(0, abs=1e-3)
    assert set(checked["hook_us"].values()) == {200.0}
    assert len(checked["steps"]) == 2 * len(scaling.CHECKED_SETTINGS)
    assert all(of["modelled"] == of["counted"] for of in checked["traffic"].values())


def test_scaling_command_writes_table_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--feed", "1e6", "--host-ms", "0", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["scaling", "--no-check", *given])
    result = scaling.main()
    assert result["worst_error"] is None
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
    assert capsys.readouterr().err.count("ZeRO-3, DeepSpeed's threshold | ") == len(GPUS)
    for name, of in result["efficiency"].items():
        values = list(of.values())
        assert values == sorted(values, reverse=True), name
        assert 0 < values[-1] < values[0] < 1, name


def test_small_batch_step_time_is_host_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {}
    for batch in (16, 128):
        monkeypatch.setattr("sys.argv", ["scaling", "--no-check", "--batch", str(batch), "--out", str(tmp_path)])
        steps[batch] = scaling.main()["step_ms"]["ZeRO-0"]["8"]
    # 60 ms are PVT-Large's, whatever the batch; saves come on top.
    assert steps == pytest.approx(dict.fromkeys(steps, 60.0), rel=1e-3)


def test_unsupported_configuration_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "odd.yaml"
    odd.write_text(scaling.CONFIG.read_text().replace("size: 1024", "size: 1020").replace("lanes: 64", "lanes: 2"))
    for path, told in ((odd, "not a multiple of a node's 8"), ("configs/finetune/detr_tiny.yaml", "only steps of")):
        monkeypatch.setattr("sys.argv", ["scaling", "--no-check", "--config", str(path)])
        with pytest.raises(InputError, match=told):
            scaling.main()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--mfu", "1.5"], "--mfu is a number above 0 and up to 1, found 1.5"),
        (["--jitter", "-1"], "--jitter is a number of at least 0, found -1"),
        (["--save-every-s", "0"], "--save-every-s is a number above 0, found 0"),
        (["--host-ms", "-1"], "--host-ms is a number of at least 0, found -1"),
        (["--batch", "0"], "--batch is a number of at least 1, found 0"),
        (["--feed", "nan"], "--feed is a number above 0, found nan"),
    ],
)
def test_invalid_arguments_are_rejected(
    wrong: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["scaling", "--no-check", *wrong])
    with pytest.raises(SystemExit, match="2"):
        scaling.main()
    assert told in capsys.readouterr().err
