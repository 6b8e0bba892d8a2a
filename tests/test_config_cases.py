"""What people write in YAML and with --set: each case is read as it was meant, or refused in one line that says why."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import json_text, yaml_text
from pipeline.config import Config, dump_config, load_config, setting_names, validated
from pipeline.errors import InputError
from pipeline.shards.image_listing import number_classes
from pipeline.shards.labels import are_several, is_number

BASE = """\
run: {name: mine}
model: {name: pvt_tiny}
data: {train: data/train}
optim: {lr: 1e-3}
train: {length: 90 epochs, global_batch_size: 480}
"""

FOREIGN = ("Input should", "Field required", "String should", "pydantic", "errors.pydantic", "\\d", "[A-Za-z", "[\\w")
"""Text of pydantic's, and of regular expressions."""

READ: list[tuple[str, str, Any]] = [
    # numbers
    ("train.global_batch_size=48e1", "train.global_batch_size", 480),
    ("data.shuffle_window=5e7", "data.shuffle_window", 50_000_000),
    ("data.shuffle_window=4096.0", "data.shuffle_window", 4096),
    ("data.shuffle_window=1_000", "data.shuffle_window", 1000),
    ("data.shuffle_window=0x10", "data.shuffle_window", 16),
    ("optim.lr=5e-4", "optim.lr", 5e-4),
    ("optim.lr=1.5e0", "optim.lr", 1.5),
    ("optim.lr=.5", "optim.lr", 0.5),
    ("run.seed=0", "run.seed", 0),
    ("engine.deepspeed.zero_optimization.reduce_bucket_size=5e7", "engine.deepspeed", 5e7),
    # on and off
    ("engine.compile=on", "engine.compile", True),
    ("engine.optimised_kernels=off", "engine.optimised_kernels", False),
    ("engine.optimised_kernels=No", "engine.optimised_kernels", False),
    ("train.deterministic=yes", "train.deterministic", True),
    ("engine.deepspeed.zero_optimization.overlap_comm=off", "engine.deepspeed", False),
    ("engine.deepspeed.zero_optimization.offload_optimizer={device: none}", "engine.deepspeed", {"device": "none"}),
    # not set
    ("train.ema_decay=off", "train.ema_decay", None),
    ("train.ema_decay=none", "train.ema_decay", None),
    ("train.ema_decay=null", "train.ema_decay", None),
    ("train.ema_decay=~", "train.ema_decay", None),
    ("train.ema_decay=", "train.ema_decay", None),
    ("train.save_every=Off", "train.save_every", None),
    ("data.val=None", "data.val", None),
    ("augment.rand_augment=off", "augment.rand_augment", None),
    ("engine.zero_stage=off", "engine.zero_stage", None),
    ("init=none", "init", None),
    ("cluster.partition=none", "cluster.partition", None),
    # text
    ("run.name=2026-13-45", "run.name", "2026-13-45"),
    ("run.name=2026-01-01", "run.name", "2026-01-01"),
    ("run.name='007'", "run.name", "007"),
    ("run.name='5e7'", "run.name", "5e7"),
    ("run.name=no", "run.name", "no"),
    ("cluster.time=24:00:00", "cluster.time", "24:00:00"),
    ("cluster.time=90", "cluster.time", "90"),
]

REFUSED = [
    # booleans are no numbers, and numbers no booleans
    ("train.ema_decay=false", "train.ema_decay: true and false are not numbers; where a setting may be unset, null"),
    ("train.ema_decay=True", "(found true)"),
    ("optim.lr=true", "optim.lr: true and false are not numbers"),
    ("data.lanes=true", "data.lanes: true and false are not numbers"),
    ("engine.zero_stage=true", "engine.zero_stage: true and false are not numbers"),
    ("optim.betas=[true, 0.9]", "optim.betas: true and false are not numbers"),
    ("augment.size_schedule={0 steps: true}", "augment.size_schedule: true and false are not numbers"),
    ("engine.compile=2", "engine.compile: expected true or false (found 2)"),
    ("run.name=true", "run.name: expected text; put a number into quotes"),
    # words for "not set" where there has to be a value
    ("optim.lr=off", "optim.lr: off means not set, and this setting needs a value"),
    ("optim.lr=none", "optim.lr: none means not set"),
    ("optim.lr=null", "optim.lr: null means not set"),
    ("optim.lr=", "optim.lr: null means not set"),
    ("engine.compile=none", "engine.compile: none means not set"),
    ("augment=null", "augment: null means not set"),
    ("task=off", "task: off means not set"),
    ("run.root=none", "run.root: none means not set"),
    ("engine.precision=off", "engine.precision: off means not set"),
    # numbers
    ("run.seed=007", "007 has leading zeros: write 7 for a number"),
    ("run.seed=08", '08 has leading zeros: write 8 for a number, "08" for text'),
    ("optim.min_lr=-010", "-010 has leading zeros: write -10"),
    ("data.lanes=1e-3", "data.lanes: expected a whole number (found 0.001)"),
    ("data.lanes=5e400", "data.lanes: has to be a finite number"),
    ("optim.lr=1e400", "optim.lr: has to be a finite number"),
    ("run.seed=" + "9" * 5000, "a number of 5000 digits; 100 at most"),
    ("run.seed=0x" + "f" * 5000, "a number of 5002 digits; 100 at most"),
    ("run.seed=" + "9" * 99, "run.seed: has to be less than 4294967296"),
    ("optim.lr=2026-13-45", "optim.lr: expected a number (found '2026-13-45')"),
    ("optim.lr=1e-3x", "optim.lr: expected a number (found '1e-3x')"),
    ("run.name=5e7", "run.name: expected text; put a number into quotes"),
    ("optim.betas=0.9", "optim.betas: expected a list (found 0.9)"),
    ("optim.betas=[0.9, 0.9, 0.9]", "optim.betas: expected at most 2 values"),
    ("optim.betas=[0.9]", "optim.betas.1: a value is missing here"),
    # rules in words
    (
        "run.name=a b",
        "run.name: a name has letters, digits, . _ and -, and begins with a letter or digit (found 'a b')",
    ),
    ("run.name='a\n'", "run.name: a name has letters"),
    ("cluster.time=soon", "cluster.time: expected MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS"),
    ("cluster.partition=a b", "cluster.partition: expected letters, digits and"),
    ("cluster.options=[x]", "cluster.options.0: an option of sbatch begins with --"),
    ("resume=''", "resume.source: expected text that is not empty"),
    ("data.train=[]", "data.train: expected at least 1 value"),
    ("image.interpolation=lanczos", "expected 'bicubic', 'bilinear' or 'nearest' (found 'lanczos')"),
    ("task=segment", "task: expected one of 'classification', 'semantic_fpn', 'retinanet', 'mask_rcnn', 'detr'"),
    ("task={channels: 64}", "task: its name is missing"),
    ("optim=[1]", "optim: expected a mapping of settings"),
    ("engine.deepspeed=[1]", "engine.deepspeed: expected a mapping"),
    # keys
    ("optim.learning_rate=1", "optim.learning_rate: no such setting; did you mean optim.lr?"),
    ("lr=1", "lr: no such setting; did you mean optim.lr?"),
    ("train.lr=1", "train.lr: no such setting; did you mean optim.lr?"),
    ("batch_size=1", "batch_size: no such setting; did you mean train.global_batch_size or evaluate.batch_size?"),
    ("train.epochs=1", "train.epochs: no such setting; did you mean train.length?"),
    ("augment.size=1", "augment.size: no such setting; did you mean image.size?"),
    ("precision=1", "precision: no such setting; did you mean engine.precision?"),
    ("data.lane=1", "data.lane: no such setting; did you mean data.lanes?"),
    ("task={name: detr, with: 1}", "task.with: no such setting; did you mean task.width?"),
    ("handoff=[{config: x, gat: 1}]", "handoff.0.gat: no such setting; did you mean handoff.0.gate?"),
    ("1=2", "1: no such setting"),
    # YAML
    ("optim={lr: 1, lr: 2}", "line 1, column 9: 'lr' is set here and in line 1: remove one of them"),
    ("optim=[1", "cannot be read as YAML: line 1, column 3"),
    ("optim={[1]: 2}", "a key has to be a word, not a list or a mapping"),
    ("optim=" + "[" * 400, "values are nested too deeply"),
    ("optim=&a [*a]", "contain themselves"),
    ("optim.lr=!!bool maybe", "tags are not used here"),
    ("optim.lr=!!timestamp x", "tags are not used here"),
    ("optim.lr=\x00", "special characters are not allowed"),
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def _short(value: Any) -> str:
    return str(value)[:50]


@pytest.mark.parametrize(("override", "key", "value"), READ, ids=_short)
def test_valid_override_is_parsed(base: Path, override: str, key: str, value: Any) -> None:
    config = load_config(base, [override])
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    while isinstance(found, dict) and found != value:
        (found,) = found.values()
    assert found == value
    assert type(found) is type(value) or not isinstance(value, bool)
    again = base.with_name("again.yaml")
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(("override", "message"), REFUSED, ids=_short)
def test_invalid_override_is_rejected(base: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(base, [override])
    text = str(error.value)
    assert message in text
    assert not [words for words in FOREIGN if words in text]
    # The first line names the file, and each mistake is one more.
    assert len(text.splitlines()) <= (2 if "configuration refused" in text else 1) + repr(override).count("\\\\n")
    assert len(text) < 400 + len(override)


FILES = {
    "twice.yaml": (
        BASE + "image: {size: 224}\noptim: {lr: 2}\n",
        "line 7, column 1: 'optim' is set here and in line 4",
    ),
    "inside.yaml": ("run:\n  name: a\n  seed: 1\n  name: b\n", "line 4, column 3: 'name' is set here and in line 2"),
    "key.yaml": ("? [a, b]\n: c\n", "line 1, column 3: a key has to be a word"),
    "deep.yaml": ("a: " + "[" * 400, "nested too deeply"),
    "two.yaml": ("a: 1\n---\nb: 2\n", "expected a single document in the stream, but found another document"),
    "empty.yaml": ("", "expected a mapping of sections, found null"),
    "list.yaml": ("- a\n", "expected a mapping of sections, found ['a']"),
    "tab.yaml": ("a:\n\tb: 1\n", "cannot start any token"),
    "object.yaml": ("a: !!python/object/apply:os.getcwd []\n", "tags are not used here"),
    "bomb.yaml": (
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(
            f"{name}: &{name} [{','.join([f'*{below}'] * 10)}]\n"
            for below, name in zip("abcdefg", "bcdefgh", strict=True)
        ),
        "more than 100,000 values with its aliases written out",
    ),
    "merges.yaml": (
        "a: &a {x: 1}\n"
        + "".join(
            f"{name}: &{name} {{<<: [{','.join([f'*{below}'] * 10)}]}}\n"
            for below, name in zip("abcdef", "bcdefg", strict=True)
        ),
        "more than 100,000 values with its aliases written out",
    ),
    "itself.yaml": ("extends: itself.yaml\n", "extends itself.yaml, which extends it in turn"),
    "nothing.yaml": ("extends: nowhere.yaml\n", "nowhere.yaml: cannot read the configuration: No such file"),
    "folder.yaml": ("extends: .\n", "cannot read the configuration: Is a directory"),
    "odd.yaml": ('extends: "a\\0b"\n', "cannot be read"),
}


@pytest.mark.parametrize("name", FILES)
def test_invalid_configuration_file_is_rejected(tmp_path: Path, name: str) -> None:
    text, message = FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        load_config(tmp_path / name)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_non_utf8_configuration_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(InputError, match=r"bytes\.yaml: cannot be read as YAML"):
        load_config(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: os.mkfifo(path), "cannot read the configuration: not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot read the configuration: not a regular file"),
        (lambda path: path.write_bytes(b" " * 2_000_000), "cannot read the configuration: more than 1,048,576 bytes"),
        (lambda path: path.write_bytes(b"[" + b"[]," * 3_000 + b"]"), "more than 2,000 values"),
    ],
)
def test_endless_or_oversized_configuration_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Any], message: str
) -> None:
    monkeypatch.setattr(yaml_text, "MAX_NODES", 2000)
    make(tmp_path / "endless.yaml")
    with pytest.raises(InputError) as error:
        load_config(tmp_path / "endless.yaml")
    assert message in str(error.value)


TEXT = st.text(alphabet="ab01 \n:-[]{},#&*!|>'\"%@`?~<.e\t\x00é", max_size=60)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=4), parts, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXT, TREES, st.binary(max_size=30), st.integers(0, 99))
def test_arbitrary_text_is_parsed_or_rejected_in_one_line(text: str, tree: Any, junk: bytes, place: int) -> None:
    document = json.dumps(tree).encode()
    assert json_text.read(document, "x") == tree
    reads = [
        lambda: yaml_text.read(text, "x"),
        lambda: json_text.read(document[:place] + junk + document[place:], "x"),
        lambda: validated(Config, tree, "x"),
    ]
    for read in reads:
        try:
            read()
        except InputError as error:
            told = str(error)
            assert told.startswith("x: ") and "\n" not in told and "pydantic" not in told  # noqa: PT018


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=12) | st.integers(-5, 2**31).map(str), min_size=1, max_size=6))
def test_arbitrary_labels_are_numbered_or_rejected_in_one_line(labels: list[str]) -> None:
    try:
        classes, positions = number_classes(set(labels), None, "x")
        assert all(classes[positions[label]] == label for label in labels)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017
    assert [are_several(label) and is_number(label) for label in labels] == [False] * len(labels)


def test_too_long_extends_chain_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "0.yaml").write_text(BASE)
    for number in range(1, 100):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number - 1}.yaml\n")
    assert load_config(tmp_path / "19.yaml") == load_config(tmp_path / "0.yaml")
    with pytest.raises(InputError) as error:
        load_config(tmp_path / "99.yaml")
    assert "files that extend one another" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_yaml_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    (tmp_path / "anchors.yaml").write_text(BASE.replace("1e-3", "&rate 1e-3") + "image: &i {size: 64}\n")
    assert load_config(tmp_path / "anchors.yaml", ["optim.min_lr=1e-6"]).optim.lr == 1e-3
    (tmp_path / "merge.yaml").write_text(
        BASE + "debug: &a {trace_samples: true}\nprofile: {<<: {steps: 5}, steps: 7}\n"
    )
    assert load_config(tmp_path / "merge.yaml").profile.steps == 7


def test_setting_without_its_section_is_suggested(base: Path) -> None:
    """Without its section it is unknown, and the message names the right one unless several share the word."""
    keys = list(setting_names(Config))
    for key in keys:
        last = key.rpartition(".")[2]
        if last in Config.model_fields:
            continue
        with pytest.raises(InputError) as error:
            load_config(base, [f"{last}=1"])
        named = str(error.value).rpartition("did you mean ")[2].rstrip("?").split(" or ")
        assert key in named or len(named) == 3


def test_duplicate_json_key_is_found_among_many() -> None:
    names = [f'"{number}": 0' for number in range(200_000)]
    with pytest.raises(InputError, match="'199999' is set twice"):
        json_text.read(f"{{{', '.join([*names, names[-1]])}}}".encode(), "x")
