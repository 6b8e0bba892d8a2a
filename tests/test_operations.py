"""docs/operations.md against the code: what it lists is what there is."""

import ast
import contextlib
import functools
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks import sizing
from pipeline.config import ClusterConfig, EnvironmentConfig
from tests.ranks import ROOT

DOCUMENT = (ROOT / "docs" / "operations.md").read_text()
SOURCES = sorted(path for folder in ("launch", "pipeline", "pvt") for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))

_IN_SHELL = re.compile(r"(?<![\\$])\$\{?([A-Z][A-Z0-9_]+)")


class Reads(ast.NodeVisitor):
    """Names of the environment variables that a module reads: `environ["X"]`, `environ.get("X")`, `"X" in environ` and
    the like on os.environ or a mapping that is called environ, os.getenv, and $X in text that a shell is to see.

    A name that is not written there itself is followed to the module's constants, to what a loop goes through, and to
    what callers in the same module pass.
    """

    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self._prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        self.names: set[str] = set()
        self.unresolved: list[int] = []
        self.visit(tree)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        # An assignment only gives a variable to others.
        if _is_environ(node.value) and isinstance(node.ctx, ast.Load):
            self._note(node.slice)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if isinstance(node.ops[0], ast.In | ast.NotIn) and _is_environ(node.comparators[0]):
            self._note(node.left)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        if isinstance(function, ast.Attribute):
            reads = function.attr in ("get", "setdefault") and _is_environ(function.value)
            if reads or function.attr == "getenv":
                self._note(node.args[0])
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and id(node) not in self._prose:
            self.names.update(_IN_SHELL.findall(node.value))

    def _note(self, name: ast.expr) -> None:
        found = set(self._values(name))
        if not found:
            self.unresolved.append(name.lineno)
        self.names |= found

    def _values(self, node: ast.expr) -> Iterator[str]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Tuple | ast.List | ast.Set):
            for element in node.elts:
                yield from self._values(element)
        elif isinstance(node, ast.Name):
            for source in self._sources(node.id):
                yield from self._values(source)

    def _sources(self, name: str) -> Iterator[ast.expr]:
        """Expressions that a name stands for, anywhere in the module."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                        yield from (v for t, v in zip(target.elts, node.value.elts, strict=False) if _is(t, name))
                    elif _is(target, name):
                        yield node.value
            elif isinstance(node, ast.For | ast.comprehension) and _is(node.target, name):
                yield node.iter
            elif isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in node.args.args]
                if name in names:
                    yield from self._arguments(node.name, names.index(name))

    def _arguments(self, function: str, place: int) -> Iterator[ast.expr]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call) and _is(node.func, function) and len(node.args) > place:
                yield node.args[place]


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _is_environ(node: ast.expr) -> bool:
    return _is(node, "environ") or (isinstance(node, ast.Attribute) and node.attr == "environ")


@functools.cache
def reads_of_sources() -> dict[Path, Reads]:
    return {path: Reads(ast.parse(path.read_text())) for path in SOURCES}


def variables_read() -> dict[str, set[str]]:
    """By name, the files that read it."""
    found: dict[str, set[str]] = {}
    for path, reads in reads_of_sources().items():
        for name in reads.names:
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    for path in SCRIPTS:
        for name in _IN_SHELL.findall(re.sub(r"(?m)^#.*", "", path.read_text())):
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def variables_listed() -> set[str]:
    section = DOCUMENT.split("\n### Read by us\n")[1].split("\n#")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def test_documented_environment_variables_match_those_read():
    read, listed = variables_read(), variables_listed()
    assert {name: files for name, files in read.items() if name not in listed} == {}
    assert listed - read.keys() == set()


def test_all_environment_variable_reads_are_resolved():
    unresolved = {
        f"{path.relative_to(ROOT)}:{line}" for path, reads in reads_of_sources().items() for line in reads.unresolved
    }
    assert unresolved == set(), "write the variable's name there, or in a constant of that module"


@pytest.mark.parametrize(
    "source",
    [
        'import os\nos.environ["A_B"]',
        'import os\nos.environ.get("A_B", "1")',
        'import os\nos.getenv("A_B")',
        'import os\nif "A_B" not in os.environ: pass',
        'import os\nos.environ.setdefault("A_B", "1")',
        'import os\n_NAME = "A_B"\nos.environ[_NAME]',
        'import os\none, _NAME = "x", "A_B"\nos.environ.get(_NAME)',
        'def f(environ):\n    names = ("A_B",)\n    return {name: environ[name] for name in names}',
        'import os\ndef f(name, n): return os.environ.get(name, n)\nf("A_B", 1)',
        'line = "export PATH=$A_B/bin"',
        'line = f"gpus=${{A_B:-0}} {1}"',
    ],
)
def test_finder_detects_environment_variable_reads(source: str):
    assert "A_B" in Reads(ast.parse(source)).names


def test_finder_reports_unresolved_reads_and_ignores_prose():
    reads = Reads(ast.parse("import os\nos.environ[f()]"))
    assert (reads.names, reads.unresolved) == (set(), [2])
    assert Reads(ast.parse('import os\n"""$HOME in prose"""\nos.environ["A_B"] = "set for others"')).names == set()


def test_documented_cluster_settings_match_the_configuration():
    section = DOCUMENT.split("\n## The `cluster:` section\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    config = {name for name in ClusterConfig.model_fields if name != "environment"}
    assert named == config | {f"environment.{name}" for name in EnvironmentConfig.model_fields}


@pytest.fixture(scope="module")
def sized() -> tuple[dict[str, Any], str]:
    """The result of benchmarks.sizing, and its table."""
    table = io.StringIO()
    with mock.patch.object(sys, "argv", ["sizing"]), contextlib.chdir(ROOT), contextlib.redirect_stderr(table):
        return sizing.main(), table.getvalue()


def test_documented_sizing_table_matches_benchmark_output(sized: tuple[dict[str, Any], str]):
    assert sized[1].strip() in DOCUMENT


def test_config_header_estimates_match_the_sizing_benchmark(sized: tuple[dict[str, Any], str]):
    for model, found in sized[0]["computed"].items():
        head = (ROOT / "configs" / "pretrain" / f"{model}_in1k.yaml").read_text().replace("\n#", "")
        (flops,) = re.findall(r"([\d.]+) GFLOP a training image", head)
        a100, h100 = re.findall(r"([\d.]+) hours on 8 A100.*?([\d.]+)(?: hours)? on 8 H100", head)[0]
        alone = found["cases"][0]
        assert found["gflop_per_image"] == pytest.approx(float(flops), abs=0.15)
        assert alone["A100"]["hours"] == pytest.approx(float(a100), abs=0.06)
        assert alone["H100, H200"]["hours"] == pytest.approx(float(h100), abs=0.06)


def test_relative_links_in_operations_doc_exist():
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", DOCUMENT):
        assert (ROOT / "docs" / target).exists(), target


def test_scripts_named_in_operations_doc_exist():
    for script in re.findall(r"\b((?:launch|tests)/[\w/]+\.py)\b", DOCUMENT):
        assert Path(ROOT, script).exists(), script
