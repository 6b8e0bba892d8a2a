"""Settings: every mistake is one clear error, and what is read is what was meant."""

import json
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cli
from pipeline.config import (
    Config,
    Gates,
    HandoffConfig,
    Length,
    dump_config,
    fingerprint,
    load_config,
    load_section,
    read_json,
    section,
)
from pipeline.config.reference import reference
from pipeline.errors import InputError
from pipeline.job.handoff import Claim
from pipeline.track.model_card import ModelCard
from pipeline.track.sync.record import Record, Sweep
from pipeline.train.checkpoint_files import Commit
from tests.conftest import write_config
from tests.ranks import ROOT

Make = Callable[..., Config]
EXAMPLES = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    if path.parent.name == "gates":
        assert load_section(Gates, path).metrics
        return
    # Whose images these are is for the command line to say.
    overrides = ["data.train=photos"] if path.stem == "own" else []
    assert load_config(path, overrides).run.name == path.stem


def test_dumped_configuration_round_trips(make_config: Make, tmp_path: Path) -> None:
    original = make_config(
        "engine.deepspeed.zero_optimization.reduce_bucket_size=1000",
        "train.length=1281167 images",
        "train.save_every=2.5e8 images",
        "train.eval_every=0.1 epochs",
    )
    (tmp_path / "dumped.yaml").write_text(dump_config(original))
    assert load_config(tmp_path / "dumped.yaml") == original


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: no such setting; did you mean optim.lr?"),
        ("trian.length=1 epoch", "trian: no such setting; did you mean train?"),
        ("zzz=1", "zzz: no such setting; valid here: run, task, model,"),
        ("optim.lr=fast", "optim.lr: expected a number (found 'fast')"),
        ("optim.lr=-1", "optim.lr: has to be more than 0.0 (found -1)"),
        ("data.lanes=1.5", "data.lanes: expected a whole number (found 1.5)"),
        ("engine.zero_stage=4", "engine.zero_stage: expected 0, 1, 2 or 3 (found 4)"),
        ("train.length=3 fortnights", 'train.length: a length is a number and a unit: "300 epochs"'),
        ("data.lanes=11", "train.global_batch_size 48 is not a multiple of data.lanes 11"),
        ("data.lanes=48", "so that global_batch_size / lanes is even"),
        ("train.micro_batch_size=3", "train.micro_batch_size 3 is odd, but mix pairs samples"),
        ("augment.crop_scale=[0.5, 0.1]", "augment: crop_scale is [low, high] with 0 < low <= high"),
        ("train.length=5 %", "train.length is what percentages are of"),
        ("train.length=1e999 steps", "a length is a number and a unit"),
        ("optim.lr=.inf", "optim.lr: has to be a finite number"),
        ("optim.betas=[2, 0.5]", "optim.betas.0: has to be less than 1"),
        ("image.std=[0, 1, 1]", "image.std.0: has to be more than 0"),
        ("image.mean=[1, 2]", "image.mean.2: a value is missing here"),
        ("tracking.uri=http://me:secret@host", "MLFLOW_TRACKING_PASSWORD"),
        ("tracking.model_name=a/b", "tracking.model_name: a model's name is not empty and has none of / : @"),
        ("run.name=../up", "run.name: a name has letters, digits, . _ and -"),
        ("optim.lr", "expected KEY=VALUE"),
        ("optim.lr=[1", "cannot be read as YAML: line 1, column 3"),
        ("run.name.x=1", "run"),
        ("task=segment", "task: expected one of 'classification', 'semantic_fpn'"),
        ("task={name: semantic_fpn, chanels: 64}", "task.chanels: no such setting; did you mean task.channels?"),
        ("task={name: semantic_fpn, channels: 70}", "task.channels: has to be a multiple of 32 (found 70)"),
        ("task={name: semantic_fpn, scale: [2, 1]}", "task.scale: scale is [low, high] with low <= high"),
        ("task=semantic_fpn", "augment.crop_scale has no effect with task semantic_fpn"),
        ("model.image_size=64", "a classifier has image.size"),
        ("model.frozen_stages=2", "model.frozen_stages 2 would freeze randomly initialised weights"),
    ],
)
def test_invalid_setting_is_reported(make_config: Make, override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        make_config(override)
    assert message in str(error.value)


def test_all_invalid_settings_are_reported_at_once(make_config: Make) -> None:
    with pytest.raises(InputError) as error:
        make_config("optim.lrr=1", "data.lane=2")
    assert "optim.lrr" in str(error.value)
    assert "data.lane:" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", r"expected a mapping of sections, found \['a', 'b'\]"),
        ("a: [", "cannot be read as YAML: line 1"),
        ("", "expected a mapping of sections, found null"),
    ],
)
def test_non_configuration_file_is_rejected(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(tmp_path / "bad.yaml")


def test_missing_setting_and_missing_file_are_reported(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text(yaml.safe_dump({"run": {"name": "x"}}))
    with pytest.raises(InputError, match="optim: this setting has no default"):
        load_config(tmp_path / "empty.yaml")
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot read the configuration: No such file"):
        load_config(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("text", "steps"), [("7 steps", 7), ("1 step", 1), ("2.5 epochs", 25), ("1e3 images", 100), ("5 %", 50)]
)
def test_length_in_any_unit_is_converted_to_steps(text: str, steps: int) -> None:
    length = Length.parse(text)
    assert length.steps(steps_per_epoch=10, global_batch_size=10, total=1000) == steps
    assert Length.parse(str(length)) == length


def test_resume_setting_has_short_form(make_config: Make) -> None:
    assert make_config("resume=never").resume.source == "never"
    assert make_config("resume.allow=[data]").resume.allow == ["data"]


RENAMED = [
    ("engine", "fast", "optimised_kernels", False),
    ("augment", "image_size", "size_schedule", {"0 epochs": 16, "50 %": 24}),
]


@pytest.fixture
def warnings_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has warned of no former name yet, on the first rank."""
    monkeypatch.setattr(section, "_reported", set())
    for variable in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.usefixtures("warnings_so_far")
@pytest.mark.parametrize(("name", "former", "present", "value"), RENAMED)
def test_former_setting_names_are_accepted_with_one_warning(
    make_config: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    former: str,
    present: str,
    value: Any,
) -> None:
    expected = make_config(f"{name}.{present}={json.dumps(value)}")
    assert make_config(f"{name}.{former}={json.dumps(value)}") == expected
    (tmp_path / "former.yaml").write_text(yaml.safe_dump({"extends": "tiny.yaml", name: {former: value}}))
    config = load_config(tmp_path / "former.yaml")
    assert config == expected
    assert capsys.readouterr().err == (
        f"{name}.{former} is now called {name}.{present}: rename it in the configuration\n"
    )
    # The dump has the present name alone, and a resumed run is the same run.
    dumped = yaml.safe_load(dump_config(config))[name]
    assert dumped[present] == value
    assert former not in dumped
    assert config.identity() == expected.identity()
    assert fingerprint(config.model_dump(mode="json")) == fingerprint(expected.model_dump(mode="json"))


@pytest.mark.usefixtures("warnings_so_far")
def test_present_name_overrides_former_name_in_extended_file(make_config: Make, tmp_path: Path) -> None:
    make_config()
    (tmp_path / "below.yaml").write_text("extends: tiny.yaml\nengine: {fast: false}\n")
    (tmp_path / "above.yaml").write_text("extends: below.yaml\nengine: {optimised_kernels: true}\n")
    assert load_config(tmp_path / "above.yaml").engine.optimised_kernels
    assert load_config(tmp_path / "below.yaml", ["engine.optimised_kernels=true"]).engine.optimised_kernels
    assert not load_config(tmp_path / "above.yaml", ["engine={fast: false}"]).engine.optimised_kernels
    assert load_config(tmp_path / "below.yaml", ["augment.image_size.9 steps=24"]).augment.size_schedule == {
        Length(9, "steps"): 24
    }


@pytest.mark.usefixtures("warnings_so_far")
def test_former_and_present_name_together_are_rejected(make_config: Make) -> None:
    with pytest.raises(InputError, match="engine: fast is the former name of optimised_kernels, and both are set: rem"):
        make_config("engine={fast: true, optimised_kernels: true}")
    with pytest.raises(InputError, match=r"engine\.optimised_kernels: expected true or false \(found 3\)"):
        make_config("engine.fast=3")
    with pytest.raises(InputError, match=r"did you mean engine\.optimised_kernels\?"):
        make_config("engine.optimized_kernels=true")


@pytest.mark.usefixtures("warnings_so_far")
def test_only_rank_0_warns_of_former_names(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not make_config("engine.fast=false").engine.optimised_kernels
    assert not capsys.readouterr().err


def test_former_name_in_list_section_is_accepted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sections in lists, and those of several kinds, are renamed when they are validated."""
    monkeypatch.setattr(section, "_reported", set())
    monkeypatch.setattr(HandoffConfig, "renamed", {"overrides": "set"})
    assert HandoffConfig.model_validate({"config": "x", "overrides": ["a=1"]}).set == ["a=1"]
    assert "overrides is now called set" in capsys.readouterr().err


def test_cluster_time_is_read_without_quotes(make_config: Make) -> None:
    """In YAML 1.1 24:00:00 is the number 86400, which SLURM would take for minutes."""
    assert make_config("cluster.time=24:00:00").cluster.time == "24:00:00"
    assert make_config("cluster.time=90").cluster.time == "90"


def test_extends_merges_over_extended_file(digits: Path, tmp_path: Path) -> None:
    below = write_config(digits, tmp_path)
    above = tmp_path / "above.yaml"
    above.write_text(f"extends: {below.name}\nrun: {{name: above}}\nimage: {{mean: [0, 0, 0]}}\nmix: {{}}\n")
    expected = load_config(below, ["run.name=above", "image.mean=[0, 0, 0]"])
    assert load_config(above) == expected
    (tmp_path / "top.yaml").write_text("extends: above.yaml\nrun: {seed: 5}\n")
    assert load_config(tmp_path / "top.yaml") == load_config(
        below, ["run.name=above", "image.mean=[0, 0, 0]", "run.seed=5"]
    )


def test_invalid_or_circular_extends_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "seven.yaml").write_text("extends: 7\n")
    with pytest.raises(InputError, match="extends 7; expected the path of one other YAML file"):
        load_config(tmp_path / "seven.yaml")
    (tmp_path / "one.yaml").write_text("extends: two.yaml\n")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\n")
    with pytest.raises(InputError, match=r"two\.yaml: extends one\.yaml, which extends it in turn"):
        load_config(tmp_path / "one.yaml")


def test_dense_evaluation_batch_size_defaults_to_1(make_config: Make) -> None:
    dense = ["task=semantic_fpn", "augment={}", "mix={}"]
    assert make_config().evaluate.batch_size == 256
    assert make_config(*dense).evaluate.batch_size == 1
    assert make_config(*dense, "evaluate.batch_size=4").evaluate.batch_size == 4


@pytest.mark.parametrize(
    ("override", "num_parameters", "stage"),
    [
        ("engine.zero_stage=null", 61_000_000, 0),
        ("engine.zero_stage=null", 300_000_000, 1),
        ("engine.deepspeed.zero_optimization.offload_optimizer.device=cpu", 61_000_000, 1),
        ("engine.zero_stage=3", 61_000_000, 3),
        ("engine.zero_stage=0", 300_000_000, 0),
    ],
)
def test_default_zero_stage_depends_on_parameter_count(
    make_config: Make, override: str, num_parameters: int, stage: int
) -> None:
    assert make_config(override).engine.stage(num_parameters) == stage


@pytest.mark.parametrize("kind", [Record, Sweep, ModelCard, Claim, Commit, dict[str, Any]])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "not JSON: byte 0 is not UTF-8"),
        (b'{"a": 1, "a": 2}', "not JSON: 'a' is set twice"),
        (b"[" * 100_000, "not JSON: values are nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: a number of 5000 digits; 100 at most"),
        (b"[1]", "expected a mapping"),
    ],
)
def test_damaged_json_is_reported_in_one_line(tmp_path: Path, kind: Any, data: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(InputError) as error:
        read_json(kind, tmp_path / "x.json")
    assert str(error.value).startswith(f"{tmp_path}/x.json: {message}")
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)


def test_json_that_is_no_regular_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "run.json").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"run\.json: not a regular file: give the folder of a run"):
        Record.read(tmp_path)


def test_document_of_settings_is_current() -> None:
    document = ROOT / "docs/configuration.md"
    assert document.read_text() == reference(), f"python -m pipeline.config.reference > {document}"


def test_print_config_prints_a_configuration_that_loads(
    make_config: Make, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = ArgumentParser()
    cli.add_config(parser)
    path = write_config(digits, tmp_path)
    arguments = parser.parse_args(["--config", str(path), "--set", "optim.lr=0.5", "--print-config"])
    with pytest.raises(SystemExit) as ended:
        cli.read_config(arguments)
    assert ended.value.code == 0
    path.write_text(capsys.readouterr().out)
    assert load_config(path) == make_config("optim.lr=0.5")
