"""launch/doctor.py --tune: what the search tries and keeps, how trials end, the fragment, the command as a whole."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from pipeline.commands import doctor
from pipeline.config import Config, load_config
from pipeline.errors import ExternalError, InputError
from pipeline.job import local_ranks, tune
from pipeline.job.tune import CHECKPOINTING, COMPILE, MICRO_BATCH, Overrides, Search, Trial
from tests.conftest import write_config
from tests.ranks import PATIENCE_S, ROOT, start

Settings = Callable[..., Config]

# The search, on machines that are made up


class Machine:
    """Measures by a formula, and by a clock that only trials move."""

    def __init__(
        self,
        speed: Callable[[Overrides], float] = lambda overrides: 100.0,
        memory: Callable[[int], float] = lambda size: 1.0,
        fits: Callable[[Overrides], bool] = lambda overrides: True,
        memory_gb: float = 100.0,
        trial_s: float = 10.0,
    ) -> None:
        self.speed, self.memory, self.fits, self.memory_gb, self.trial_s = speed, memory, fits, memory_gb, trial_s
        self.now = 0.0
        self.tried: list[Overrides] = []
        self.limits: list[float] = []

    def measure(self, overrides: Overrides, limit_s: float) -> Trial:
        self.now += self.trial_s
        self.tried.append(overrides)
        self.limits.append(limit_s)
        if not self.fits(overrides):
            return Trial(overrides, "out of memory")
        return Trial(
            overrides,
            images_per_second=self.speed(overrides),
            peak_memory_gb=self.memory(overrides[MICRO_BATCH]),
            memory_gb=self.memory_gb,
        )

    def search(self, config: Config, configured: int = 128, minutes: float = 60.0) -> Search:
        sizes = [2, 4, 8, 16, 32, 64, 128]
        return Search(config, sizes, configured, self.measure, 60 * minutes, clock=lambda: self.now)

    @property
    def sizes(self) -> list[int]:
        """Micro-batches that were tried, in order, for their own sake."""
        return [overrides[MICRO_BATCH] for overrides in self.tried if overrides.keys() == {MICRO_BATCH}]


def by_size(**speeds: float) -> Callable[[Overrides], float]:
    return lambda overrides: speeds[f"of_{overrides[MICRO_BATCH]}"]


def linear(overrides: Overrides) -> float:
    return float(overrides[MICRO_BATCH])


def test_micro_batch_expected_to_exceed_memory_is_not_tried(make_config: Settings, capsys: pytest.CaptureFixture[str]):
    # 80 % of 20 GB are 16; 32 take 17, as 8 and 16 let expect.
    machine = Machine(speed=linear, memory=lambda size: 1 + size / 2, memory_gb=20)
    search = machine.search(make_config())
    assert search.run().overrides == search.chosen == {MICRO_BATCH: 16}
    assert machine.sizes == [8, 16]
    assert "train.micro_batch_size=32" in (told := capsys.readouterr().err)
    assert "not tried: 17.0 of 20.0 GB, more than 80%" in told


def test_trial_above_the_memory_share_counts_as_failed(make_config: Settings):
    machine = Machine(speed=linear, memory=lambda size: 1 + size, memory_gb=20)
    search = machine.search(make_config())
    assert search.run().overrides == {MICRO_BATCH: 8}
    assert "more than 80%" in search.trials[1].failed


@pytest.mark.parametrize(
    ("limit", "tried"), [(40, [8, 16, 32, 64]), (5, [8, 4]), (2, [8, 4, 2]), (1000, [8, 16, 32, 64, 128])]
)
def test_micro_batch_doubles_until_it_fails_or_halves_until_it_fits(
    make_config: Settings, limit: int, tried: list[int]
):
    machine = Machine(speed=linear, fits=lambda overrides: overrides[MICRO_BATCH] <= limit)
    best = machine.search(make_config()).run()
    assert machine.sizes == tried
    assert best.overrides == {MICRO_BATCH: max(size for size in tried if size <= limit)}


def test_search_ends_after_two_doublings_without_gain(make_config: Settings):
    machine = Machine(speed=by_size(of_8=100, of_16=150, of_32=152, of_64=152.5, of_128=100))
    search = machine.search(make_config(), configured=128)
    assert search.run().overrides == search.chosen == {MICRO_BATCH: 16}
    assert machine.sizes == [8, 16, 32, 64, 128, 128]  # the last one again: it may have had a slow moment
    machine = Machine(speed=by_size(of_8=100, of_16=150, of_32=152, of_64=153.1, of_128=100))
    # 64 is 2 % over 16, the best before, but not over what is configured.
    assert machine.search(make_config(), configured=32).run().overrides == {MICRO_BATCH: 32}
    assert machine.sizes == [8, 16, 32, 64, 128, 32]


def test_configured_micro_batch_is_kept_unless_another_is_faster(make_config: Settings):
    machine = Machine(speed=by_size(of_8=100, of_16=150, of_32=152, of_64=152))
    search = machine.search(make_config(), configured=64)
    assert search.run() is search.as_configured
    assert search.chosen == {}


def test_search_starts_at_a_small_configured_micro_batch(make_config: Settings):
    machine = Machine(speed=lambda _: 1.0)
    assert machine.search(make_config(), configured=4).run().overrides == {MICRO_BATCH: 4}
    assert machine.sizes[:3] == [4, 8, 16]


@pytest.mark.parametrize(("gain", "chosen"), [(0.019, {}), (0.021, {COMPILE: True})])
def test_setting_is_changed_only_for_a_gain_of_two_percent(make_config: Settings, gain: float, chosen: Overrides):
    machine = Machine(speed=lambda overrides: 100 * (1 + gain * overrides.get(COMPILE, False)))
    search = machine.search(make_config("train.micro_batch_size=8"), configured=8)
    best = search.run()
    assert search.chosen == chosen
    assert best.images_per_second == pytest.approx(100 * (1 + gain * bool(chosen)))
    assert search.complete


def test_enabled_settings_are_tried_disabled(make_config: Settings):
    def speed(overrides: Overrides) -> float:
        return 100.0 - 50 * overrides.get(COMPILE, True) - 20 * overrides.get(CHECKPOINTING, True)

    machine = Machine(speed)
    search = machine.search(make_config("engine.compile=true", "model.grad_checkpointing=true"), configured=8)
    search.run()
    assert search.chosen == {COMPILE: False, CHECKPOINTING: False}
    machine = Machine()
    machine.search(make_config()).run()
    assert not any(CHECKPOINTING in overrides for overrides in machine.tried)  # it is off


def test_best_trial_is_remeasured_before_it_is_replaced(make_config: Settings):
    machine = Machine()
    # The machine is busy with something else until the trial with COMPILE.
    machine.speed = lambda _: 50.0 if machine.now < 40 else 100.0
    search = machine.search(make_config(), configured=8)
    best = search.run()
    assert [trial.images_per_second for trial in search.trials] == [50, 50, 50, 100, 100]
    assert search.chosen == {}
    assert best.images_per_second == 100


def test_time_limit_keeps_the_best_trial_so_far(make_config: Settings):
    machine = Machine(speed=linear, trial_s=10)
    search = machine.search(make_config(), minutes=0.5)
    assert search.run().overrides == {MICRO_BATCH: 16}  # a third trial, with 10 s left, would not end in time
    assert not search.complete
    assert machine.limits == [30, 20]
    with pytest.raises(ExternalError, match="--minutes: no trial has ended"):
        Machine(fits=lambda _: False, trial_s=10).search(make_config(), minutes=0.1).run()


def test_search_fails_when_no_micro_batch_fits(make_config: Settings):
    machine = Machine(fits=lambda _: False)
    with pytest.raises(ExternalError, match=r"micro-batch of 2 fits: out of memory. Set model.grad_checkpointing=true"):
        machine.search(make_config()).run()
    assert machine.sizes == [8, 4, 2]


def test_rejected_configuration_raises_and_rejected_change_is_skipped(make_config: Settings):
    machine = Machine()
    measure = machine.measure
    machine.measure = lambda overrides, limit_s: Trial(overrides, "engine.deepspeed.x: no", refused=True)
    with pytest.raises(InputError, match=r"engine\.deepspeed\.x: no"):
        machine.search(make_config()).run()
    machine.measure = lambda overrides, limit_s: measure(overrides, limit_s)._replace(
        **({"failed": "not with this", "refused": True} if COMPILE in overrides else {})
    )
    search = machine.search(make_config(), configured=8)
    search.run()
    assert search.chosen == {}
    assert search.complete


@pytest.mark.parametrize(
    ("ranks", "overrides", "expected"),
    [
        (1, [], ([2, 4, 8, 16, 24, 48], 48)),
        (2, [], ([2, 4, 8, 12, 24], 24)),
        (2, ["train.micro_batch_size=16"], ([2, 4, 8, 12, 24], 12)),  # 24 are cut in two
        (1, ["train.micro_batch_size=6"], ([2, 4, 6, 8, 16, 24, 48], 6)),
        # A rank has one of three lanes: 15 samples, of which pairs are only to be kept where they are mixed.
        (3, ["data.lanes=3", "train.global_batch_size=45", "mix={}"], ([1, 2, 4, 8, 15], 15)),
    ],
)
def test_micro_batch_sizes_match_the_partition_of_a_batch(
    make_config: Settings, ranks: int, overrides: list[str], expected: tuple[list[int], int]
):
    assert tune.micro_batch_sizes(make_config(*overrides), ranks) == expected


# Trials


def ranks(code: str, count: int = 1, limit_s: float = 20.0) -> local_ranks.Ended:
    return local_ranks.run_ranks([sys.executable, "-c", f"import os, signal, sys, time\n{code}"], count, limit_s)


def test_local_ranks_get_launcher_variables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "64")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "SLURM_CPUS_PER_TASK")
    ended = ranks(f"print(*(os.environ.get(name) for name in {names}))", 2)
    assert ended == local_ranks.Ended("0 0 2 2 127.0.0.1 None\n")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise ValueError('no such thing')", local_ranks.Ended(failed="ValueError: no such thing")),
        ("sys.exit(1)", local_ranks.Ended(failed="without an error message")),
        ("os.kill(os.getpid(), signal.SIGSEGV)", local_ranks.Ended(failed="ended by SIGSEGV")),
        (
            "print('a warning\\nerror: a: no\\n  b: no', file=sys.stderr); sys.exit(2)",
            local_ranks.Ended(failed="a: no\n  b: no", refused=True),
        ),
    ],
)
def test_failed_rank_reports_its_reason(code: str, expected: local_ranks.Ended):
    assert ranks(code) == expected


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit('error: out of memory')"])
def test_out_of_memory_rank_takes_precedence_over_peer_errors(end: str, tmp_path: Path):
    code = f"""
from pathlib import Path
pid = Path("{tmp_path}/pid")
if os.environ["RANK"] == "1":
    pid.with_suffix(".partial").write_text(str(os.getpid()))
    pid.with_suffix(".partial").rename(pid)
    {end}
while not pid.exists():
    time.sleep(0.001)
try:
    while " Z " not in Path("/proc", pid.read_text(), "stat").read_text():
        time.sleep(0.001)
except OSError:
    pass
sys.exit("lost a peer")"""
    assert "memory" in ranks(code, 2).failed


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_timed_out_ranks_and_their_children_are_killed(tmp_path: Path):
    # A child of a rank's, such as one that compiles, belongs to it.
    code = f"""
import subprocess
child = subprocess.Popen(["sleep", "600"])
open(f"{tmp_path}/{{os.environ['RANK']}}", "w").write(f"{{os.getpid()}} {{child.pid}}")
time.sleep(600)"""
    assert ranks(code, 2, limit_s=6.0).failed == "not done within 6 s"
    pids = [int(pid) for rank in range(2) for pid in (tmp_path / str(rank)).read_text().split()]
    assert len(pids) == 4
    assert all(_is_gone(pid) for pid in pids)


def _is_gone(pid: int) -> bool:
    """Before long: a grandchild's end is its new parent's to see."""
    for _ in range(1500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_trial_measures_throughput_of_two_ranks(digits: Path, tmp_path: Path):
    path = write_config(digits, tmp_path)
    # 20 samples a rank in micro-batches of 8 are three of them: 24, of which 20 count.
    words = ["train.global_batch_size=40", "data.lanes=2", "train.micro_batch_size=8", "data.copies=3"]
    arguments = ["--config", path, *(part for word in words for part in ("--set", word)), "--seconds", 0.1]
    processes = start(2, "pipeline/job/tune_trial.py", arguments, [tmp_path / "0", tmp_path / "1"])
    assert [process.wait(PATIENCE_S) for process in processes] == [0, 0], (tmp_path / "0.err").read_text()
    (line,) = (tmp_path / "0.out").read_text().splitlines()
    assert not (tmp_path / "1.out").read_text()
    trial = Trial({}, **json.loads(line))
    assert trial.images_per_second == pytest.approx(2 * 2 * 8 * (20 / 24) / trial.step_s, rel=0.02)
    assert 0 < trial.peak_memory_gb < trial.memory_gb
    assert trial.device == "CPU"
    assert not (tmp_path / "runs").exists()


# The fragment


def test_tuned_fragment_extends_the_configuration(digits: Path, tmp_path: Path):
    path, out = write_config(digits, tmp_path), tmp_path / "some" / "where" / "tuned.yaml"
    out.parent.mkdir(parents=True)
    given = ["cluster.time=24:00:00", "resume=never", f"data.train={digits / 'val'}", "optim.lr=2e-3", "mix={}"]
    chosen = tune.format_overrides({MICRO_BATCH: 8, COMPILE: True})
    tuned = load_config(path, [*given, *chosen])
    out.write_text(tune.fragment(out, path, [*given, *chosen], tuned, ["found: so and so", ""]))
    assert load_config(out) == tuned
    assert load_config(out).identity() == load_config(path, given).identity()
    assert out.read_text().startswith("# found: so and so\n#\n\nextends: ../../tiny.yaml\n")
    out.write_text(tune.fragment(out, path, chosen, tuned))
    tree = yaml.safe_load(out.read_text())
    assert tree == {
        "extends": "../../tiny.yaml",
        "train": {"micro_batch_size": 8},
        "engine": {"compile": True},
    }


def test_override_that_replaces_a_section_is_rejected(make_config: Settings, tmp_path: Path):
    make_config()
    path, given = tmp_path / "scheduled.yaml", ["augment.size_schedule={0 steps: 48}"]
    path.write_text("extends: tiny.yaml\naugment: {size_schedule: {0 steps: 32, 50 %: 64}}\n")
    with pytest.raises(InputError, match="--set replaces a whole section"):
        tune.require_new(tmp_path / "out.yaml", path, given, load_config(path, given))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scheduled.yaml", "tiny.yaml"]


# The command


def command(*arguments: object) -> list[str]:
    return [sys.executable, "launch/doctor.py", "--tune", *map(str, arguments)]


def called(*arguments: object) -> dict[str, Any] | None:
    """The command's result, in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with mock.patch.object(sys, "argv", command(*arguments)[1:]):
            return doctor.main()
    finally:
        signal.signal(signal.SIGTERM, handler)


def test_tune_command_writes_a_loadable_configuration(digits: Path, tmp_path: Path):
    path = write_config(digits, tmp_path)
    # One trial and a refusal: twelve samples at once, and at ZeRO-3 nothing is compiled.
    given = ["train.global_batch_size=12", "data.lanes=6", "train.micro_batch_size=12", "engine.zero_stage=3"]
    arguments = command("--config", path, *(part for word in given for part in ("--set", word)), "--ranks", 1)
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    out = tmp_path / "runs" / "tuned" / "tiny.yaml"
    assert (result["ok"], result["complete"], result["settings"], result["config"]) == (True, True, {}, str(out))
    tried, refused = result["trials"]
    assert tried["overrides"] == {MICRO_BATCH: 12}
    assert result["images_per_second"] == tried["images_per_second"] > 0
    assert tried["peak_memory_gb"] > 0
    assert "compile true with zero_stage 3" in refused["failed"]
    trials = [line.split()[3] for line in done.stderr.splitlines()[1:3]]  # behind date, time and level
    assert trials == [f"{MICRO_BATCH}=12", f"{COMPILE}=true"]
    assert load_config(out) == load_config(path, given)
    assert f"--config {path}" in out.read_text()
    assert f"as it was: {result['images_per_second']:,.1f} images/s" in out.read_text()
    with pytest.raises(InputError, match=f"{out}: is there already; remove it, or name another file with --out"):
        called("--config", path, "--ranks", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "data.train={folder}/gone"], "{folder}/gone/manifest.json"),
        (["--ranks", 13], "13 ranks, but data.lanes is 12"),
        (["--ranks", 0], "--ranks 0"),
        (["--ranks", 1, "--out", "{config}"], "is there already"),
        (["--ranks", 1, "--out", "{config}/x.yaml"], "cannot be written"),
    ],
)
def test_tune_rejects_invalid_values(digits: Path, tmp_path: Path, arguments: list[Any], message: str):
    names = {"config": str(write_config(digits, tmp_path)), "folder": str(tmp_path)}
    with pytest.raises(InputError, match=re.escape(message.format(**names))):
        called("--config", names["config"], *(str(argument).format(**names) for argument in arguments))


def test_tune_needs_a_configuration(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        called()
    assert "--tune needs --config" in capsys.readouterr().err


def test_tune_without_time_for_a_trial_fails(digits: Path, tmp_path: Path):
    with pytest.raises(ExternalError, match="--minutes: no trial has ended"):
        called("--config", write_config(digits, tmp_path), "--ranks", 1, "--minutes", 1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_search_kills_its_trial(digits: Path, tmp_path: Path, number: int):
    path = write_config(digits, tmp_path)
    arguments = command("--config", path, "--ranks", 1)
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := children(process.pid)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.0005)  # so as to come while it is being started
        process.send_signal(number)
        _, told = process.communicate(timeout=PATIENCE_S)
    assert found
    assert process.returncode == 130
    assert told.endswith("interrupted\n")
    assert all(_is_gone(pid) for pid in found)
    assert not (tmp_path / "runs" / "tuned" / "tiny.yaml").exists()
