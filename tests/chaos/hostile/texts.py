"""Hostile configurations and names."""

from collections.abc import Sequence
from pathlib import Path

import yaml

from tests import damage
from tests.chaos.hostile import mutate
from tests.chaos.hostile.data import PACK, SHOW, VERIFY
from tests.chaos.hostile.mutate import WEIRD_TEXT, WEIRD_VALUES, Rng, pick
from tests.chaos.hostile.trial import Case, Ran, Sandbox
from tests.ranks import ROOT

READ = "tests.chaos.hostile.read_configs"
_MANY = 100
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
_SPECIAL = (
    _BOMB,
    "run: &r {name: x, root: *r}\n",
    "extends: itself.yaml\n",
    "extends: /dev/zero\n",
    "extends: [a, b]\n",
    "!!python/object/apply:os.system ['touch evil']\n",
    "? [a, b]\n: c\n",
    "--- a\n--- b\n",
    "%YAML 9.9\n---\nrun: {}\n",
    "run: !!binary aGVsbG8=\n",
    "run: {<<: [1, 2]}\n",
    "{" * 5000,
    "- " * 5000,
    "a: " + "9" * 100_000,
    "train: {length: 1e999 epochs}\n",
    "optim: {lr: .nan}\n",
    "optim: {lr: 0x1p-1074}\n",
    "\ufeffrun: {name: x}\n",
    "run:\t{name: x}\n",
    "run: {name: \ud7ff}\n",
)


def configurations(rng: Rng, sandbox: Sandbox) -> Case:
    """Shipped configurations with values, keys or bytes changed, and YAML that parsers stumble over."""
    shipped = sorted((ROOT / "configs").rglob("*.yaml"))
    for number in range(_MANY):
        path = sandbox.work / f"{number}.yaml"
        chance = int(rng.integers(6))
        source = pick(rng, shipped)
        if chance == 0:
            path.write_text(pick(rng, _SPECIAL).replace("itself", str(number)))
        elif chance < 3:
            path.write_bytes(mutate.some_bytes(rng, source.read_bytes()))
        else:
            document = yaml.safe_load(source.read_text())
            if "extends" in document:
                document["extends"] = str(source.parent / document["extends"])
            path.write_text(yaml.safe_dump(mutate.tree(rng, document)))

    def judge(ran: Sequence[Ran]) -> str:
        return "; ".join(ran[0].result["crashed"][:3])

    return Case("configurations", [(READ, ".")], judge, inputs=_MANY)


def settings(rng: Rng, sandbox: Sandbox) -> Case:
    """--set with any text."""
    keys = (
        "run.name",
        "run.root",
        "data.train",
        "model.name",
        "tracking.uri",
        "train.length",
        "optim.lr",
        "init.model",
    )
    (sandbox.work / "tiny.yaml").write_text((ROOT / "configs/pretrain/demo.yaml").read_text())
    values = [pick(rng, (*WEIRD_TEXT, *map(str, WEIRD_VALUES), *_SPECIAL)).replace("\0", "") for _ in range(3)]
    words = [word for value in values for word in ("--set", f"{pick(rng, keys)}={value}"[:100_000])]
    return Case("settings", [("launch/submit.py", "--config", "tiny.yaml", "--dry-run", *words)], inputs=3)


_NAMES = (
    b"a" * 240,
    b"\x1b[2J\x1b]0;title\x07",
    b"line\nline",
    b"return\rback",
    "\u202egnp.exe".encode(),
    b"\xff\xfe\xfd",
    b"-rf",
    b"--help",
    b"$(touch evil)",
    b"%s%n",
    b" ",
    b"a b",
    b"{0..9}",
    b"*",
    b"~",
    b"#x",
    b"con.png.exe",
    "é猫🙂".encode(),
    b"e\xcc\x81",
    b"a\tb",
    b"\x7f\x85",
)


def names(rng: Rng, sandbox: Sandbox) -> Case:
    """Class folders and files of any name that a file system takes."""
    root = bytes(sandbox.work / "images")
    for label in range(2):
        folder = root + b"/" + pick(rng, _NAMES) + b"%d" % label
        Path(folder.decode(errors="surrogateescape")).mkdir(parents=True)
        for number in range(2):
            name = folder + b"/" + pick(rng, _NAMES)[:200] + b"%d.jpg" % number
            path = Path(name.decode(errors="surrogateescape"))
            path.write_bytes(damage.picture(rng, label) if rng.integers(3) else b"no image")
    commands = [
        (*PACK, "--images", "images", "--out", "out", "--skip-bad", "--workers", "1"),
        (*VERIFY, "out", "--deep", "--workers", "1"),
        (*SHOW, "out"),
    ]
    return Case("names of files and classes", commands, inputs=6)
