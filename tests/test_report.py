"""The page of a run: its numbers are the files', its matrix scikit-learn's, and nothing in a folder is in its way."""

import base64
import io
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score

from pipeline import files
from pipeline.commands import report as report_command
from pipeline.config import dump_config, load_config
from pipeline.errors import InputError
from pipeline.feed.loader import EvalFeed
from pipeline.job import examine_model, report_page
from pipeline.pictures.palette import colourise
from pipeline.scenes import write_dataset
from pipeline.shards import ade20k
from pipeline.shards.images import decode, decode_map
from pipeline.shards.index import ShardSet
from pipeline.shards.pack import pack
from pipeline.shards.picture_credits import ATTRIBUTION
from pipeline.tasks.classify import build_model
from pipeline.tasks.segment import predict
from pipeline.track.model_card import WEIGHTS, ModelCard
from pipeline.track.report import Examination, Picture, RunFiles, examination, page, plots
from pipeline.track.sync.outbox import Outbox
from pipeline.world import World
from pvt.semantic_fpn import SemanticFpn, backbone
from tests import in_process
from tests.conftest import run_ranks, write_config
from tests.ranks import ROOT

HOSTILE = """<script>alert(1)</script> &amp; "'水母"""
NAMED = {
    "top1": "top1",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "majority": "majority class",
    "top5": "top5",
    "val_loss": "val_loss",
}
"""What the page calls the metrics of a classifier, in its order."""
SECTIONS = ["model-versions", "curves", "time", "events", "quarantine", "classes", "inside-the-network", "provenance"]


class Node:
    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Node | str] = []

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def walk(self) -> "Iterator[Node]":
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str, class_: str | None = None) -> "list[Node]":
        found = [node for node in self.walk() if node.tag == tag]
        return [node for node in found if class_ is None or class_ in (node.attributes.get("class") or "").split()]

    def section(self, id_: str) -> "Node":
        (found,) = [node for node in self.all("section") if node.attributes.get("id") == id_]
        return found

    def table(self, number: int = 0) -> list[list[str]]:
        rows = self.all("table")[number].all("tr")
        return [[cell.text for cell in row.children if isinstance(cell, Node)] for row in rows]

    @property
    def value(self) -> float:
        """Of the number inside, with all of its digits."""
        (number,) = self.all("data")
        return float(number.attributes["value"] or "nan")


class Tree(HTMLParser):
    """Elements as they are nested. Fails where one is closed that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Node("", {})
        self._open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self._open[-1].children.append(node)
        if tag not in ("meta", "br", "img"):
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def parse(path: Path) -> Node:
    """Also checks what holds of every page: closed elements, no script, nothing from elsewhere, all sections."""
    tree = Tree()
    text = path.read_text()
    tree.feed(text)
    tree.close()
    assert [node.tag for node in tree._open] == [""]
    ids = [node.attributes["id"] for node in tree.root.walk() if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in tree.root.walk():
        assert node.tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not [name for name in node.attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "xlink:href"):
            target = node.attributes.get(name)
            assert target is None or target.startswith(("data:image/png;base64,", "#"))
            assert target is None or not target.startswith("#") or target[1:] in ids
        assert "url(" not in (node.attributes.get("style") or "")
    (style,) = tree.root.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    return tree.root


def tiles(page: Node) -> dict[str, float]:
    return {tile.all("span")[0].text: tile.value for tile in page.all("div", "tile")}


def counts_of(row: Node) -> list[int]:
    """The samples of a row of the confusion matrix, from its cells' titles."""
    titles = [cell.attributes["title"] or "" for cell in row.all("td")]
    return [int(title.rpartition(": ")[2].partition(" of ")[0].replace(",", "")) for title in titles]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def damage(data: Path, shard: str, row: int) -> str:
    """Flip a bit of an image; returns the sample's key."""
    shards = ShardSet(data)
    number = [each.name for each in shards.manifests[0].shards].index(shard)
    tar = bytearray((data / f"{shard}.tar").read_bytes())
    tar[int(shards.index(number)[row]["offset"]) + 60] ^= 1
    key = shards.key(number, row)
    (data / f"{shard}.tar").write_bytes(tar)
    shards.close()
    return key


class Runs:
    """A run that was rolled back, killed and finished, as it was after the kill and at its end."""

    def __init__(self, digits: Path, folder: Path) -> None:
        self.data = folder / "data"
        for part in ("train", "val"):
            shutil.copytree(digits / part, self.data / part)
        self.damaged = [damage(self.data / "train", "shard-000000", row) for row in range(30)]
        self.damaged += [damage(self.data / "val", "shard-000001", 3)]
        path = write_config(self.data, folder)
        tree = yaml.safe_load(path.read_text())
        tree["guard"] = {"window": 8, "rollback_after": 2}
        tree["data"]["max_bad_fraction"] = 0.5
        tree["train"] |= {"length": "24 steps", "save_every": "4 steps", "eval_every": "8 steps"}
        # Nobody is there, so versions wait; they are noted as registered below.
        tree["tracking"] |= {"uri": "http://127.0.0.1:9", "patience_s": 0.1}
        path.write_text(yaml.safe_dump(tree))
        faults = {10: "nan", 11: "nan"}
        run_ranks(1, "faulty", path, json.dumps({**faults, 19: "kill"}), "run.name=tiny")
        self.finished, self.killed = folder / "runs" / "tiny", folder / "runs" / "killed"
        shutil.copytree(self.finished, self.killed)
        run_ranks(1, "faulty", path, json.dumps(faults), "run.name=tiny")
        outbox = Outbox(self.finished)
        for number, entry in enumerate(outbox.waiting(), 1):
            outbox.note(entry, f"models:/tiny/{number}")
        self.page = parse(report_page.write_report(self.finished))
        self.page_with_samples = parse(report_page.write_report(self.finished, folder / "samples.html", samples=True))


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(digits, tmp_path_factory.mktemp("report"))


@pytest.fixture
def copy(runs: Runs, tmp_path: Path) -> Path:
    """The finished run's folder, to be spoilt."""
    return Path(shutil.copytree(runs.finished, tmp_path / "tiny"))


def test_report_header_matches_the_run_files(runs: Runs) -> None:
    told, folder = tiles(runs.page), runs.finished
    metrics = lines(folder / "metrics.jsonl")
    readings = [line for line in metrics if "loss" in line]
    scores = [line for line in metrics if "top1" in line]
    result = json.loads((folder / "result.json").read_text())
    assert told == {
        "steps": 24,
        "best top1": max(line["top1"] for line in scores),
        "last top1": scores[-1]["top1"],
        "balanced accuracy": scores[-1]["balanced_accuracy"],
        "macro F1": scores[-1]["macro_f1"],
        "majority class": scores[-1]["majority"],
        "training loss": readings[-1]["loss"],
        "gradient norm": readings[-1]["grad_norm"],
        "validation loss": scores[-1]["val_loss"],
        "images a second": result["images_per_second"],
        "effective time": result["ettr"],
        "restarts": 1,
        "skipped steps": 2,
        "quarantined": len(lines(folder / "quarantine.jsonl")),
    }
    assert runs.page.all("h1")[0].text == "tiny"
    assert runs.page.all("span", "status")[0].text == "finished"
    assert [section.attributes["id"] for section in runs.page.all("section")] == SECTIONS


def test_versions_are_listed_with_a_command_for_the_best(runs: Runs) -> None:
    section = runs.page.section("model-versions")
    header, *rows = section.table()
    # One validation sample is damaged.
    top1, *others = NAMED.values()
    assert header == ["version", "step", top1, "bad_samples", *others, "SHA-256"]
    entries = sorted((runs.finished / "versions").iterdir(), reverse=True)
    cards = [json.loads((entry / "model.json").read_text()) for entry in entries]
    uris = [json.loads((entry / "registered.json").read_text())["uri"] for entry in entries]
    assert [row[0] for row in rows] == uris
    assert [row[1] for row in rows] == [card["lineage"]["step"] for card in cards]
    assert [row[-1] for row in rows] == [card["sha256"]["model.safetensors"][:12] for card in cards]
    best = uris[max(range(len(cards)), key=lambda place: cards[place]["metrics"]["top1"])]
    assert f"--model {best} --data {runs.data / 'val'}" in section.all("pre")[0].text
    waiting = parse(report_page.write_report(runs.killed, model=False)).section("model-versions")
    assert {row[0] for row in waiting.table()[1:]} == {"waits to be registered"}
    assert f"registry.py sync {runs.killed}" in waiting.all("pre")[0].text


def test_time_section_matches_goodput(runs: Runs) -> None:
    account = json.loads((runs.finished / "goodput.json").read_text())
    rows = runs.page.section("time").all("tbody")[0].all("tr")
    told = {row.all("td")[0].text.strip().replace(" ", "_"): row.all("td")[1].value for row in rows}
    other = told.pop("other")
    assert list(told.values()) == sorted(told.values(), reverse=True)
    assert told == {name: value for name, value in account["seconds"].items() if value > 0}
    shares = [row.all("td")[2].value for row in rows]
    assert sum(shares) == pytest.approx(1)
    assert other == pytest.approx(max(0.0, account["last"] - account["began"] - sum(told.values())), abs=1e-6)


def test_events_are_sorted_by_step(runs: Runs) -> None:
    rows = runs.page.section("events").table()[1:]
    steps: dict[str, list[int]] = {}
    for step, kind, _, _ in rows:
        steps.setdefault(kind, []).append(int(step))
    kept = [int(path.name.removeprefix("step-")) for path in (runs.finished / "checkpoints").glob("step-*")]
    assert steps == {
        "start": [0],
        "skipped step": [11, 12],
        "rollback": [12],
        "evaluation": [8, 16, 24],
        "checkpoint": sorted(kept),
        "end": [24],
    }
    assert [int(row[0]) for row in rows] == sorted(int(row[0]) for row in rows)
    scores = [line["top1"] for line in lines(runs.finished / "metrics.jsonl") if "top1" in line]
    assert [row[2] for row in rows if row[1] == "evaluation"] == [f"top1 {100 * score:.2f} %" for score in scores]
    assert all((" UTC" in row[3]) == (row[1] in ("start", "evaluation", "end")) for row in rows)


def test_quarantined_samples_are_listed(runs: Runs) -> None:
    noted = lines(runs.finished / "quarantine.jsonl")
    rows = runs.page.section("quarantine").table()[1:]
    assert [row[:3] for row in rows] == [[line["key"], line["tar"], line["reason"]] for line in noted]
    assert {row[0] for row in rows} <= set(runs.damaged)
    assert {row[3] for row in rows} == {str(runs.data / "train"), str(runs.data / "val")}


def test_confusion_matrix_matches_scikit_learn_and_scores_the_run(runs: Runs) -> None:
    config = load_config(runs.finished / "config.yaml")
    shards = ShardSet(runs.data / "val")
    network = build_model(config.model, 32, 10).eval()
    network.load_state_dict(
        safetensors.torch.load_file(runs.finished / "checkpoints" / "step-00000024" / "model.safetensors")
    )
    truth, guesses = [], []
    with torch.inference_mode():
        for batch in EvalFeed(shards, World(), config.image, batch_size=100):
            kept = batch.weights > 0
            truth += batch.targets[kept].tolist()
            guesses += network(batch.images)[kept].argmax(dim=1).tolist()
    expected = confusion_matrix(truth, guesses, labels=range(10))
    section = runs.page.section("classes")
    rows = section.all("table", "matrix")[0].all("tbody")[0].all("tr")
    assert [counts_of(row) for row in rows] == expected.tolist()
    per_cent = 100 * expected / expected.sum(axis=1, keepdims=True)
    told = [[float(cell.text.replace("<1", "0.3")) for cell in row.all("td")] for row in rows]
    np.testing.assert_allclose(told, per_cent, atol=0.5)
    assert sum(map(sum, expected)) == len(shards) - 1  # one is damaged
    last = [line for line in lines(runs.finished / "metrics.jsonl") if "top1" in line][-1]
    scores = {row.all("dt")[0].text: row.all("dd")[0] for row in section.all("dl")[0].all("div")}
    assert {name: scores[label].value for name, label in NAMED.items()} == {name: last[name] for name in NAMED}
    assert scores["balanced accuracy"].value == pytest.approx(balanced_accuracy_score(truth, guesses))
    shares = expected.diagonal() / expected.sum(axis=1)
    worst_first = section.all("table", "classes")[0].all("tbody")[0].all("tr")
    assert [int(row.all("td")[0].text) for row in worst_first] == np.argsort(shares, kind="stable").tolist()
    wrong = expected - np.diag(expected.diagonal())
    pair = section.all("table", "pairs")[0].all("tbody")[0].all("tr")[0].all("td")
    assert int(pair[2].value) == wrong.max() == wrong[int(pair[0].text), int(pair[1].text)]


def images_of(section: Node) -> dict[str, Image.Image]:
    found = {}
    for node in section.all("img"):
        data = (node.attributes["src"] or "").partition(",")[2]
        found[node.attributes["alt"] or ""] = Image.open(io.BytesIO(base64.b64decode(data)))
    return found


def test_input_pictures_are_shown_only_with_samples(runs: Runs, digit_images: Path) -> None:
    maps = images_of(runs.page.section("inside-the-network"))
    keys = {alt.partition(" of ")[2] for alt in maps}
    assert {alt.partition(" of ")[0] for alt in maps} == {f"stage {number}" for number in (1, 2, 3, 4)}
    assert len(keys) == examine_model.NUM_PICTURES
    assert [maps[f"stage {number} of {min(keys)}"].width for number in (1, 2, 3, 4)] == [8, 4, 2, 1]
    section = runs.page_with_samples.section("inside-the-network")
    shown = images_of(section)
    assert shown.keys() == maps.keys() | {f"input of {key}" for key in keys}
    for key in keys:
        original = np.asarray(Image.open(digit_images / "val" / f"{key}.jpg").convert("RGB"), np.float32)
        assert np.abs(np.asarray(shown[f"input of {key}"], np.float32) - original).mean() < 2
    assert ATTRIBUTION in section.all("p", "note")[0].text


def test_attribution_is_shown_beside_sample_pictures(runs: Runs, tmp_path: Path) -> None:
    note = runs.data / "val" / ATTRIBUTION
    note.write_text(f"UCI digits {HOSTILE}, CC BY 4.0\n")
    try:
        with_samples = parse(report_page.write_report(runs.finished, tmp_path / "page.html", samples=True))
    finally:
        note.unlink()
    text = with_samples.section("inside-the-network").text
    assert f"UCI digits {HOSTILE}, CC BY 4.0" in text


def test_large_validation_set_is_sampled_evenly(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_model, "MOST_SAMPLES", 100)
    section = parse(report_page.write_report(runs.finished, tmp_path / "page.html")).section("classes")
    cells = [counts_of(row) for row in section.all("table", "matrix")[0].all("tr")[1:]]
    assert 64 <= sum(map(sum, cells)) <= 100
    assert "of 360 samples, spread over the set" in section.text


def test_report_of_a_killed_run_shows_it_as_running(runs: Runs) -> None:
    made = parse(report_page.write_report(runs.killed, model=False))
    assert made.all("span", "status")[0].text == "running"
    assert "before this page was made" in made.all("header")[0].text
    assert "the same command resumes it" in made.all("header")[0].text
    assert "end" not in [row[1] for row in made.section("events").table()[1:]]


def spoil_lines(folder: Path) -> None:
    for name in ("metrics.jsonl", "anomalies.jsonl", "quarantine.jsonl"):
        with (folder / name).open("a") as file:
            file.write('[1, 2]\nnull\n{"step": "x", "loss": {}}\n\x00\xff\n{"step": 7, "lo')


def spoil_values(folder: Path) -> None:
    metrics = lines(folder / "metrics.jsonl")
    for line, value in zip(
        metrics, [None, math.nan, "high", True, [1], 10**400, -math.inf, 1e308, -1e308], strict=False
    ):
        line["loss" if "loss" in line else "top1"] = value
        line["time"] = value
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in metrics))


def spoil_documents(folder: Path) -> None:
    for name in ("run.json", "goodput.json", "result.json", "deepspeed.json"):
        (folder / name).write_text('{"cut short": ')
    (folder / "config.yaml").write_text("a: [1")


def spoil_types(folder: Path) -> None:
    strange = {"tags": [1], "inputs": {"a": 1}, "began_ms": "soon", "ended_ms": 1e300, "name": 7, "status": ["x"]}
    (folder / "run.json").write_text(json.dumps(strange))
    strange = {"seconds": [1], "restarts": 1e9, "starts": ["x"], "began": {}, "last": -1e300, "step": None}
    (folder / "goodput.json").write_text(json.dumps(strange))
    (folder / "config.yaml").write_text("train: 7\nrun: [1]\ntracking: {log_samples: x}\n")
    for card in folder.glob("versions/*/model.json"):
        card.write_text('{"metrics": [1], "sha256": [2]}')
    (folder / "handoff").mkdir()
    (folder / "handoff" / "x.json").write_text('{"name": ["a"], "root": 7, "uuid": null}')


def spoil_all(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "metrics.jsonl").write_text("")


def spoil_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


def spoil_data(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("data/val", "data/elsewhere"))


@pytest.mark.parametrize(
    "spoil",
    [spoil_lines, spoil_values, spoil_documents, spoil_types, spoil_all, spoil_checkpoints, spoil_data],
)
def test_report_is_written_despite_damaged_run_files(copy: Path, spoil: Callable[[Path], None]) -> None:
    spoil(copy)
    made = parse(report_page.write_report(copy))
    assert [section.attributes["id"] for section in made.all("section")] == SECTIONS
    if spoil is spoil_lines:
        assert "metrics.jsonl: 3 lines cannot be read" in made.all("div", "faults")[0].text
        assert made.section("classes").all("table", "matrix")
    if spoil in (spoil_documents, spoil_types, spoil_all, spoil_checkpoints, spoil_data):
        assert "Not known" in made.section("classes").text
    if spoil is spoil_checkpoints:
        assert "no whole checkpoint" in made.section("inside-the-network").text
    if spoil is spoil_data:
        assert "data/elsewhere" in made.section("classes").text


PROFILE = {
    "headline": f"pvt_pico {HOSTILE}: 40.0 ms a step",
    "first_step": 52,
    "last_step": 54,
    "on_device": False,
    "phases": {"forward": 10.0, "backward": 25.0, "the rest": 5.0},
    "kinds": {"matrix products": 30.0, HOSTILE: 2.5, "Python and waiting": 7.5},
}


def write_profile(folder: Path, text: str) -> None:
    (folder / "profile").mkdir(exist_ok=True)
    (folder / "profile" / "profile.json").write_text(text)


def test_report_has_a_section_for_the_profile(copy: Path) -> None:
    write_profile(copy, json.dumps(PROFILE))
    made = parse(report_page.write_report(copy, model=False))
    section = made.section("where-a-step-s-time-goes")
    assert "steps 52 to 54" in section.text
    tables = {title.text: table for title, table in zip(section.all("h3"), section.all("table"), strict=False)}
    assert list(tables) == ["By phase, on the host's clock", "By kind of work, operators on the thread that trains"]
    for table, costs in zip(tables.values(), (PROFILE["phases"], PROFILE["kinds"]), strict=True):
        rows = [row.all("td") for row in table.all("tr")[1:]]
        assert {row[0].text: 1000 * row[1].value for row in rows} == pytest.approx(costs)
        assert [row[2].value for row in rows] == pytest.approx([cost / 40 for cost in costs.values()])
    widths = [segment.attributes["style"] or "" for segment in section.all("div", "shares")[0].all("i")]
    assert [style.partition("width:")[2] for style in widths] == ["25.000%", "62.500%", "12.500%"]
    assert HOSTILE in [row[0] for row in section.table(1)]


@pytest.mark.parametrize(
    ("text", "is_object", "is_shown"),
    [
        (json.dumps(PROFILE)[:-40], False, False),
        ("[1]", False, False),
        ('{"phases": [1], "kinds": {"a": "b", "c": null, "d": -1, "e": 1e400}}', True, False),
        ('{"phases": {"forward": 3}, "kinds": 7}', True, True),
    ],
)
def test_report_is_written_despite_an_invalid_profile(copy: Path, text: str, is_object: bool, is_shown: bool) -> None:
    write_profile(copy, text)
    made = parse(report_page.write_report(copy, model=False))
    sections = [section.attributes["id"] for section in made.all("section")]
    assert ("where-a-step-s-time-goes" in sections) == is_shown
    assert set(SECTIONS) <= set(sections)
    assert ("profile/profile.json: is not a JSON object" in made.text) != is_object


def test_changed_validation_data_is_not_scored(runs: Runs, copy: Path) -> None:
    record = json.loads((copy / "run.json").read_text())
    record["inputs"][1]["digest"] = "0" * 64
    (copy / "run.json").write_text(json.dumps(record))
    assert "is another data set now" in parse(report_page.write_report(copy)).section("classes").text


def test_names_are_escaped_in_html(copy: Path, tmp_path: Path) -> None:
    record = json.loads((copy / "run.json").read_text())
    record["name"], record["tags"]["note"], record["tags"]["mlflow.source.git.commit"] = HOSTILE, HOSTILE, HOSTILE
    (copy / "run.json").write_text(json.dumps(record))
    first = lines(copy / "metrics.jsonl")[0]
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 25, "time": first["time"], HOSTILE: 0.5}) + "\n")
    with (copy / "quarantine.jsonl").open("a") as file:
        file.write(json.dumps({"key": HOSTILE, "tar": HOSTILE, "reason": HOSTILE, "data": HOSTILE}) + "\n")
    with (copy / "anomalies.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "kind": HOSTILE, "message": HOSTILE, "samples": []}) + "\n")
    examined = Examination(
        source=HOSTILE,
        data=HOSTILE,
        num_samples=3,
        num_examined=2,
        is_whole=True,
        classes=[HOSTILE, "b"],
        counted="samples",
        confusion=np.eye(2, dtype=int),
        class_scores={HOSTILE: [1, 1], "right": [1.0, 1.0]},
        scores={HOSTILE: 1.0},
        pictures=[Picture(HOSTILE, HOSTILE, HOSTILE, {}, {HOSTILE: np.ones((2, 2), np.float32)})],
        attribution=HOSTILE,
        legend=[(HOSTILE, "#000000")],
    )
    (tmp_path / "page.html").write_text(page(RunFiles(copy), examined))
    made = parse(tmp_path / "page.html")
    assert made.all("h1")[0].text == made.all("title")[0].text == HOSTILE
    assert HOSTILE in [cell.text for cell in made.section("classes").all("td")]
    assert HOSTILE in [cell.text for cell in made.section("quarantine").all("td")]
    assert HOSTILE in made.section("provenance").text
    assert any(HOSTILE in (node.attributes.get("title") or "") for node in made.walk())
    assert HOSTILE in [figure.all("strong")[0].text for figure in made.section("curves").all("figure")]
    assert HOSTILE in made.section("events").text
    assert HOSTILE in (made.section("inside-the-network").all("img")[0].attributes["alt"] or "")


def test_report_masks_secrets(copy: Path) -> None:
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    tree["engine"]["deepspeed"] = {"api_key": "hush-1"}
    tree["handoff"] = [{"config": "a.yaml", "set": ["x.token=hush-2"], "gate": {}}]
    tree["data"]["train"] = [{"path": "https://me:hush-3@host/data?X-Signature=hush-4", "weight": 1.0}]
    (copy / "config.yaml").write_text(yaml.safe_dump(tree))
    record = json.loads((copy / "run.json").read_text())
    record["tags"]["data.path"] = record["inputs"][0]["path"] = "s3://me:hush-5@host/data"
    (copy / "run.json").write_text(json.dumps(record))
    with (copy / "quarantine.jsonl").open("a") as file:
        file.write(json.dumps({"key": "k", "tar": "https://me:hush-6@host/a.tar", "reason": "r", "data": "d"}) + "\n")
    with (copy / "packages.txt").open("a") as file:
        file.write("thing @ git+https://me:hush-7@host/thing\n")
    text = report_page.write_report(copy, model=False).read_text()
    assert "***" in text
    assert "hush" not in text


def test_report_of_100000_steps_is_fast_and_small(copy: Path) -> None:
    rng = np.random.default_rng(0)
    loss, began = rng.normal(2, 0.3, 100_000), time.time() - 300_000
    with (copy / "metrics.jsonl").open("w") as file:
        for step in range(100_000):
            line = {"step": step + 1, "time": began + 3 * step, "loss": float(loss[step]), "step_s": 2.9, "lr": 1e-3}
            line |= {"grad_norm": 1.0, "images_per_second": 400.0, "data_wait_s": 0.1, "ettr": 0.9, "skipped": 0}
            file.write(json.dumps(line) + "\n")
    with (copy / "anomalies.jsonl").open("w") as file:
        for step in range(0, 100_000, 20):
            file.write(json.dumps({"step": step, "kind": "loss spike", "message": "m", "samples": ["key"] * 64}) + "\n")
    start = time.perf_counter()
    made = report_page.write_report(copy, model=False)
    assert time.perf_counter() - start < 10
    assert made.stat().st_size < 3e6
    assert tiles(parse(made))["training loss"] == loss[-1]


def test_thinned_curves_keep_their_extremes() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[7, 500]] = np.nan
    steps, means, lows, highs = plots.thin(plots.Line(np.arange(100_000.0), values, "", False))
    assert len(steps) == len(means) == plots.MOST_POINTS
    assert (lows.min(), highs.max()) == (np.nanmin(values), np.nanmax(values))
    assert ((lows <= means) & (means <= highs)).all()
    assert (np.diff(steps) > 0).all()


def test_chart_outlier_is_clipped_and_noted() -> None:
    values = np.array([*np.linspace(2, 1, 40), 500.0])
    chart = plots.draw_chart("Loss", [plots.Line(np.arange(41.0), values, "", False)])
    assert chart.notes == ["Beyond the axis: up to 500."]
    assert chart.svg is not None
    assert ">400<" not in chart.svg
    assert ">2<" in chart.svg
    assert "#0072b2" not in chart.svg
    assert "var(--s0)" in chart.svg


def test_report_of_1000_classes_omits_the_confusion_matrix(runs: Runs, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = np.diag(rng.integers(1, 40, 1000))
    matrix[7, 900] = 50
    examined = Examination(
        source="weights",
        data="data",
        num_samples=50_000,
        num_examined=20_000,
        is_whole=False,
        classes=[f"class {number}" for number in range(1000)],
        counted="samples",
        confusion=matrix,
        class_scores=examination.scores_of_classes(matrix, "samples"),
        scores={"top1": 0.5},
        pictures=[],
    )
    out = tmp_path / "page.html"
    out.write_text(page(RunFiles(runs.finished), examined))
    section = parse(out).section("classes")
    assert out.stat().st_size < 1e6
    assert not section.all("table", "matrix")
    assert section.all("table", "pairs")[0].all("tr")[1].text.startswith("class 7class 900")
    (table,) = section.all("table", "classes")
    assert len(table.all("tr")) == 1001
    assert table.all("tr")[1].all("td")[0].text == "class 7"


class SegmentationRun:
    """A folder with a version that waits, of a network that tells brightness apart, and validation data."""

    def __init__(self, folder: Path) -> None:
        write_dataset.write_dataset(folder / "scenes", {"val": 9}, seed=0, side_px=(128, 160))
        self.folder, self.data = folder / "runs" / "scenes", folder / "data"
        pack(ade20k.find(folder / "scenes/ade20k/annotations/validation"), self.data)
        path = folder / "scenes.yaml"
        tree: dict[str, Any] = {
            "run": {"name": "scenes", "root": str(folder / "runs")},
            "task": {"name": "semantic_fpn", "channels": 32, "short_side": 96},
            "model": {"name": "pvt_pico"},
            "image": {"size": 64, "interpolation": "bilinear"},
            "data": {"train": str(self.data), "val": str(self.data), "lanes": 1},
            "optim": {"lr": 1e-3},
            "train": {"length": "8 steps", "global_batch_size": 4},
            "evaluate": {"batch_size": 2},
        }
        path.write_text(yaml.safe_dump(tree))
        (self.data / ATTRIBUTION).write_text("photographs by somebody\n")
        self.config = load_config(path)
        self.shards = ShardSet(self.data)
        self.network = self._network()
        safetensors.torch.save_file(self.network.state_dict(), folder / WEIGHTS)
        card = ModelCard(
            task=self.config.task,
            model=self.config.model,
            image=self.config.image,
            eval_batch_size=2,
            classes=self.shards.classes,
            metrics={"miou": 0.1234, "macc": 0.2, "aacc": 0.3, "val_loss": 1.0},
            sha256={WEIGHTS: files.sha256(folder / WEIGHTS)},
            lineage={"run": "a" * 32, "step": "8"},
        )
        Outbox(self.folder).put({WEIGHTS: folder / WEIGHTS}, card)
        (self.folder / "config.yaml").write_text(dump_config(self.config))
        scores = {"step": 4, "time": 1.7e9, "miou": 0.1, "macc": 0.2, "aacc": 0.3, "val_loss": 2.0}
        readings = [{"step": 2, "time": 1.7e9, "loss": 3.0}, scores, {**scores, "step": 8, "miou": 0.1234}]
        (self.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in readings))

    def _network(self) -> SemanticFpn:
        """With random weights, and biases by which each class is the best one somewhere."""
        torch.manual_seed(0)
        network = SemanticFpn(backbone("pvt_pico", 64), len(self.shards.classes), 32).eval().requires_grad_(False)
        network.classifier.weight *= 100
        (batch, *_) = self.batches()
        bias = -network(batch.images).mean(dim=(0, 2, 3))
        network.classifier.bias = torch.nn.Parameter(bias, requires_grad=False)
        return network

    def batches(self) -> EvalFeed:
        return EvalFeed(self.shards, World(), self.config.image, task=self.config.task, batch_size=2)

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """True and predicted class of every labelled pixel."""
        truth, guesses = [], []
        for batch in self.batches():
            for logits, target, weight in zip(self.network(batch.images), batch.targets, batch.weights, strict=True):
                if weight:
                    labelled = target.labels != 255
                    truth.append(target.labels[labelled].numpy())
                    guesses.append(predict(logits, target)[labelled].numpy())
        return np.concatenate(truth), np.concatenate(guesses)


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> SegmentationRun:
    return SegmentationRun(tmp_path_factory.mktemp("segmentation"))


def test_iou_and_pixel_confusion_match_scikit_learn(segmentation: SegmentationRun) -> None:
    made = parse(report_page.write_report(segmentation.folder))
    section, names = made.section("classes"), segmentation.shards.classes
    truth, guesses = segmentation.pixels()
    expected = confusion_matrix(truth, guesses, labels=range(len(names)))
    average: Any = None  # which it takes, but is not annotated to
    iou: Any = jaccard_score(truth, guesses, labels=range(len(names)), average=average)
    assert len(np.unique(guesses)) > 5
    rows = section.all("table", "classes")[0].all("tbody")[0].all("tr")
    found = {row.all("td")[0].text: [cell.value for cell in row.all("td")[1:4]] for row in rows}
    pixels = expected.sum(axis=1)
    assert pixels.min() == 0  # of a class that is not there, and yet seen by the network
    for label, name in enumerate(names):
        right = expected[label, label] / pixels[label] if pixels[label] else math.nan
        assert found[name] == pytest.approx([pixels[label], iou[label], right], nan_ok=True)
    assert [values[1] for values in found.values()] == sorted(iou)
    scores = {row.all("dt")[0].text: row.all("dd")[0] for row in section.all("dl")[0].all("div")}
    assert scores["mIoU"].value == pytest.approx(iou.mean())
    assert scores["labelled pixels"].value == len(truth)
    assert scores["samples"].value == 9
    cells = section.all("table", "matrix")[0].all("tbody")[0].all("tr")
    shares = 100 * expected / np.maximum(1, pixels)[:, None]
    told = [[float(cell.text.replace("<1", "0.3")) for cell in row.all("td")] for row in cells]
    np.testing.assert_allclose(told, shares, atol=0.51)
    pair = section.all("table", "pairs")[0].all("tbody")[0].all("tr")[0].all("td")
    wrong = expected - np.diag(expected.diagonal())
    assert pair[2].value == wrong.max() == wrong[names.index(pair[0].text), names.index(pair[1].text)]


def test_segmentation_report_shows_miou_as_percentages(segmentation: SegmentationRun) -> None:
    made = parse(report_page.write_report(segmentation.folder, model=False))
    assert (tiles(made)["best mIoU"], tiles(made)["last mIoU"]) == (0.1234, 0.1234)
    assert "12.34 %" in made.all("div", "tiles")[0].text
    assert "pvt_pico, semantic_fpn, from" in made.all("header")[0].text
    titles = [figure.all("strong")[0].text for figure in made.section("curves").all("figure")]
    assert "Overlap and accuracy" in titles
    assert "Accuracy" not in titles
    header, row = made.section("model-versions").table()
    assert dict(zip(header, row, strict=True))["mIoU"] == "12.34 %"
    assert "top1" not in "".join(node.text for node in made.all("section"))


def test_segmentation_maps_are_shown_only_with_samples(segmentation: SegmentationRun, tmp_path: Path) -> None:
    section = parse(report_page.write_report(segmentation.folder)).section("inside-the-network")
    assert {alt.partition(" of ")[0] for alt in images_of(section)} == {f"stage {number}" for number in (1, 2, 3, 4)}
    assert not section.all("ul", "legend")
    assert "shown with --samples" in section.text
    section = parse(report_page.write_report(segmentation.folder, tmp_path / "page.html", samples=True)).section(
        "inside-the-network"
    )
    shown = images_of(section)
    keys = {alt.partition(" of ")[2] for alt in shown}
    assert len(keys) == examine_model.NUM_PICTURES
    key, shards = min(keys), segmentation.shards
    row = [shards.key(0, row) for row in range(len(shards))].index(key)
    stored = decode_map(shards.read_annotation(0, row))
    truth = shown[f"truth of {key}"]
    assert truth.size == stored.shape[::-1]
    assert truth.tobytes() == colourise(stored - np.uint8(1), len(shards.classes)).tobytes()
    assert shown[f"prediction of {key}"].size == truth.size
    image = shown[f"input of {key}"]
    original = decode(shards.read(0, row)).resize(image.size, Image.Resampling.BILINEAR)
    assert np.abs(np.asarray(image, float) - np.asarray(original, float)).mean() < 3
    named = [item.text for item in section.all("ul", "legend")[0].all("li")]
    assert named[-1] == "no label"
    assert set(named[:-1]) <= set(shards.classes)
    assert "background" in named
    assert "photographs by somebody" in section.all("p", "note")[0].text


def test_comparison_shows_differing_settings_results_and_curves(runs: Runs, copy: Path, tmp_path: Path) -> None:
    text = (
        (copy / "config.yaml").read_text().replace("name: tiny", "name: other", 1).replace("lr: 0.001", "lr: 0.002", 1)
    )
    (copy / "config.yaml").write_text(text)
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**record, "name": HOSTILE}))
    metrics = lines(copy / "metrics.jsonl")
    for line in metrics:
        if "top1" in line:
            line["top1"] = 0.999
    (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in metrics))
    made = parse(report_page.write_comparison([runs.finished, copy], tmp_path / "compare.html"))
    assert made.section("settings-that-differ").table() == [
        ["setting", "tiny", HOSTILE],
        ["optim.lr", "0.001", "0.002"],
    ]
    rows = {row.all("td")[0].text: row.all("td")[1:] for row in made.section("results").all("tbody")[0].all("tr")}
    scores = [line["top1"] for line in lines(runs.finished / "metrics.jsonl") if "top1" in line]
    assert [cell.value for cell in rows["best top1"]] == [max(scores), 0.999]
    loss = made.section("curves").all("figure")[0]
    assert [item.text for item in loss.all("li")] == ["tiny", HOSTILE]
    strokes = [node.attributes.get("style") or "" for node in loss.all("path")]
    drawn = [any(f"stroke: var(--s{number})" in style for style in strokes) for number in range(3)]
    assert drawn == [True, True, False]


def test_concurrent_reports_write_only_the_output_file(runs: Runs, tmp_path: Path) -> None:
    def snapshot() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in runs.finished.rglob("*")}

    before, out = snapshot(), tmp_path / "page.html"
    errors: list[BaseException] = []

    def draw() -> None:
        try:
            for _ in range(2):
                report_page.write_report(runs.finished, out, model=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=draw) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(tmp_path.iterdir()) == [out]
    parse(out)
    report_page.write_report(runs.finished, out)
    assert snapshot() == before


def test_report_command_writes_the_page(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = in_process.run(report_command.main, runs.finished, "--out", out, "--no-model")
    result = json.loads(done.stdout)
    assert result["report"] == str(out)
    assert result["bytes"] == out.stat().st_size
    assert "--no-model" in parse(out).section("classes").text


def test_report_rejects_missing_run_or_unwritable_output(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder: give the folder of a run"):
        report_page.write_report(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds none of run\.json"):
        report_page.write_report(tmp_path)
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match=r"taken: cannot be written: .*; name another file"):
        report_page.write_report(runs.finished, tmp_path / "taken", model=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_report_command_does_not_import_heavy_packages() -> None:
    code = "import sys, pipeline.commands.report; print({'torch', 'mlflow', 'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
