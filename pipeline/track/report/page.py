"""The page of one run, from its head to where it comes from."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipeline.config import Length
from pipeline.track.metric_names import CHARTS, is_detail, is_fraction, name_of
from pipeline.track.report import average_precision, confusion_matrix, network_view, timeline
from pipeline.track.report.charts import Line, Mark, chart, time_unit
from pipeline.track.report.confusion_matrix import Examination
from pipeline.track.report.html import (
    Child,
    Html,
    absent,
    count,
    duration,
    facts,
    join,
    moment,
    number,
    picture,
    section,
    short,
    size,
    slug,
    table,
    tag,
)
from pipeline.track.report.run_files import Document, RunFiles, as_number, mapping
from pipeline.track.report.stylesheet import CSS
from pipeline.track.report.time_shares import shares, step

STATUS = {
    "FINISHED": "finished",
    "RUNNING": "running",
    "FAILED": "failed",
    "KILLED": "stopped by a signal",
    "SILENT": "not heard of",
    "UNKNOWN": "not known",
}
_CATEGORIES = {  # of goodput.json, each with its colour
    "compute": "--s2",
    "start_up": "--s5",
    "data_wait": "--s4",
    "checkpoint_stall": "--s0",
    "evaluation": "--s7",
    "checks": "--s3",
    "rollback": "--s1",
    "replayed": "--bad",
    "down": "--s6",
}
_LOAD = {  # by what a system line's key ends in, without the number of a GPU
    "cpu_utilization_percentage": ("CPU use", "%"),
    "system_memory_usage_percentage": ("memory", "%"),
    "gpu_utilization_percentage": ("GPU use, mean of a node", "%"),
    "gpu_memory_usage_percentage": ("GPU memory, mean of a node", "%"),
    "gpu_power_usage_watts": ("GPU power, mean of a node", "W"),
    "disk_usage_percentage": ("disk used", "%"),
    "network_receive_megabytes": ("network received", "MB/s"),
    "network_transmit_megabytes": ("network sent", "MB/s"),
}
_TOLD_PACKAGES = ("torch", "deepspeed", "timm", "nvidia-dali", "mlflow", "numpy", "safetensors", "webdataset")
_TOLD_TAGS = {
    *("mlflow.source.git.commit", "code.dirty", "parent.version"),
    *("seed", "data.digest", "data.path", "main_metric"),
}
_ABOUT_PRECISION = (
    "As COCO counts: AP is the mean over thresholds of intersection over union from 0.5 to 0.95, AP50 and AP75 are at "
    "one; small is up to 32² pixels, medium up to 96²; AR of n looks at the n best of an image."
)
_MOST_NODES, _MOST_LOADS = 100, 6000  # of the latter, over all nodes
_MOST_QUARANTINED = 50
_MOST_SHEET_BYTES = 1_000_000


def page(run: RunFiles, examined: Examination | str, *, samples: bool = False) -> str:
    """A run as HTML. `examined`: what its network does, or why that is not known. `samples`: show training images."""
    found = timeline.events(run)
    sections = [
        section("Model versions", *_versions(run)),
        section("Curves", _curves(run), about="Training over steps. Dashed: rollbacks and restarts."),
        section("Time", *_goodput(run)),
        *filter(None, [step(run)]),
        section("Timeline", timeline.timeline(run, found), timeline.listed(run, found)),
        section("Quarantine", *_quarantine(run)),
        *_examination(examined),
        *([section("Training images", *_sheet(run))] if samples else []),
        section("System load", _system(run)),
        section("Provenance", *_provenance(run)),
    ]
    return document(run.name, join(_head(run, sections), *sections), made=run.read_at)


def document(title: str, body: Html, *, made: float) -> str:
    """A whole page around `body`."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    foot = tag("footer", f"Made {moment(made)} from the run's folder.")
    return "<!doctype html>\n" + tag("html", head, tag("body", body, foot), lang="en") + "\n"


def _head(run: RunFiles, sections: Sequence[Html]) -> Html:
    names = ["Model versions", "Curves", "Time", "Where a step's time goes", "Timeline", "Quarantine", "Classes"]
    names += ["Inside the network", "Training images", "System load", "Provenance"]
    there = [name for name in names if any(f'id="{slug(name)}"' in each[:4000] for each in sections)]
    faults = [tag("li", fault) for fault in run.faults]
    return tag(
        "header",
        tag("div", tag("h1", run.name), _pill(run), class_="title"),
        tag("p", _sentence(run)),
        tag("div", _tiles(run), class_="tiles"),
        tag("div", "Some of the run's files could not be read:", tag("ul", faults), class_="faults")
        if faults
        else None,
        tag("nav", [tag("a", name, href=f"#{slug(name)}") for name in there]),
    )


def _pill(run: RunFiles) -> Html:
    return tag("span", STATUS.get(run.status, run.status), class_=f"status {slug(run.status)}")


def _sentence(run: RunFiles) -> str:
    began, sign = run.began, run.last_sign
    task = run.get("task", "name")
    named = [run.get("model", "name") or "Model not known", None if task == "classification" else task]
    parts = [*(str(each) for each in named if each), f"from {moment(began)}"]
    if began is not None and sign is not None:
        parts.append(
            f"{duration(sign - began)} until {'its end' if run.record.get('ended_ms') else 'its last sign of life'}"
        )
    if run.status in ("RUNNING", "SILENT") and sign is not None:
        parts.append(f"{duration(max(0.0, run.read_at - sign))} before this page was made")
    told = ", ".join(parts) + "."
    if run.status == "SILENT":
        told += " Nothing says that it has ended, so it may have been killed: the same command goes on with it."
    if run.status == "KILLED":
        told += " The same command goes on with it."
    if run.status == "FAILED":
        told += " What it said last is in its log; once that is mended, the same command goes on with it."
    return told


def _tiles(run: RunFiles) -> list[Html]:
    def tile(name: str, value: Child, about: Child = None) -> Html:
        return tag(
            "div", tag("span", name), tag("strong", value), tag("small", about) if about else None, class_="tile"
        )

    tiles = [tile("steps", number(run.steps_done), _left(run))]
    metric = run.main_metric
    if curve := run.validation.get(metric):
        percent = is_fraction(metric)
        best = curve.best(lowest=metric.endswith("loss"))
        if best:
            tiles.append(tile(f"best {name_of(metric)}", number(best[0], percent=percent), f"at step {best[1]:,.0f}"))
        last = curve.finite
        at = f"at step {last.steps[-1]:,.0f}" if len(last.steps) else None
        tiles.append(tile(f"last {name_of(metric)}", number(curve.last, percent=percent), at))
    for name, title in (("loss", "training loss"), ("grad_norm", "gradient norm")):
        if curve := run.training.get(name):
            tiles.append(tile(title, number(curve.last), "last reading"))
    if curve := run.validation.get("val_loss"):
        tiles.append(tile("validation loss", number(curve.last), "last evaluation"))
    if curve := run.training.get("images_per_second"):
        rate = as_number(run.result.get("images_per_second"))
        told = rate if np.isfinite(rate) else curve.last
        tiles.append(tile("images a second", number(told), "while training" if np.isfinite(rate) else "last reading"))
    if (ettr := ettr_of(run)) is not None:
        tiles.append(tile("effective time", number(ettr, percent=True), "compute that counts, of all time"))
    tiles.append(tile("restarts", number(known_count(run.goodput.get("restarts"))), None))
    left_out = run.training["skipped"].last if "skipped" in run.training else None
    tiles.append(
        tile("steps left out", number(left_out), count(len(run.rollbacks), "rollback") if run.rollbacks else None)
    )
    tiles.append(tile("quarantined", number(len(run.quarantine)), "samples"))
    return tiles


def _left(run: RunFiles) -> str | None:
    total = total_steps(run)
    if not total or run.steps_done is None:
        return None
    left = total - run.steps_done
    if left <= 0 or run.status != "RUNNING":
        return f"of {total:,}"
    step_s = run.training["step_s"].last if "step_s" in run.training else None
    return f"of {total:,}, about {duration(left * step_s)} left" if step_s else f"of {total:,}"


def total_steps(run: RunFiles) -> int | None:
    """The run's length; None where its configuration or its data's size is not known."""
    batch = as_number(run.get("train", "global_batch_size"))
    samples = sum(as_number(each.get("samples")) for each in run.inputs if each.get("context") == "training")
    try:
        length = Length.parse(run.get("train", "length"))
        if length.unit == "epochs" and not samples >= batch:
            return None
        per_epoch = int(samples // batch) if samples >= batch else 1
        return length.steps(steps_per_epoch=per_epoch, global_batch_size=int(batch))
    except (ValueError, ZeroDivisionError):
        return None


def _versions(run: RunFiles) -> list[Html]:
    if not run.versions:
        return [absent("None yet. Each new best checkpoint and the last one are offered to the registry.")]
    names = list(dict.fromkeys(name for version in run.versions for name in version.metrics))
    names = [name for name in names if name != "bad_samples" and not is_detail(name)]
    rows = []
    for version in run.versions[::-1]:
        scores = [number(version.metrics.get(name), percent=is_fraction(name)) for name in names]
        rows.append(
            [version.uri or "waits to be registered", number(version.step), *scores, tag("code", version.sha256[:12])]
        )
    return [table(["version", "step", *map(name_of, names), "SHA-256"], rows), *_commands(run)]


def _commands(run: RunFiles) -> list[Html]:
    metric = run.main_metric
    sign = -1.0 if metric.endswith("loss") else 1.0

    def rank(uri_and_score: tuple[str, float]) -> float:
        return uri_and_score[1]

    good = [each for each in run.versions if all(np.isfinite(as_number(value)) for value in each.metrics.values())]
    scored = [(each.uri, sign * as_number(each.metrics.get(metric))) for each in good if each.uri]
    known = [(uri, score if np.isfinite(score) else -np.inf) for uri, score in scored]
    if not known:
        told = f"python launch/registry.py sync {run.folder}"
        return [tag("p", "Once the tracking server can be reached, this registers what waits:"), tag("pre", told)]
    uri = max(known, key=rank)[0]
    data = run.get("data", "val") or "DIR"
    commands = [
        f"python launch/evaluate.py --model {uri} --data {data}",
        f"deepspeed launch/finetune.py --config FILE --set init.model={uri}",
        f"python launch/registry.py lineage {uri}",
    ]
    return [tag("p", "Score it again, fine-tune from it, see what came of it:"), tag("pre", "\n".join(commands))]


def _curves(run: RunFiles) -> Html:
    training, validation, marks = run.training, run.validation, timeline.marks(run)
    if not training and not validation:
        return absent("No reading yet: the first comes after train.log_every.")
    charts = [
        _chart("Loss", run, [("loss", "training"), ("val_loss", "validation")], marks=marks),
        *_metric_charts(run, marks),
        _chart("Learning rate", run, [("lr", "learning rate")], marks=marks, from_zero=True),
        _chart("Gradient norm", run, [("grad_norm", "gradient norm")], marks=marks, from_zero=True, about=_clip(run)),
        _chart(
            "Throughput",
            run,
            [("images_per_second", "images a second")],
            unit="images a second",
            marks=marks,
            from_zero=True,
        ),
        _data_wait(run, marks),
        _chart("Effective training time", run, [("ettr", "ETTR")], percent=True, marks=marks, from_zero=True),
    ]
    if "slowest_speed" in training:
        about = "Its own work, beside the median rank's."
        charts.append(
            _chart("Slowest rank's speed", run, [("slowest_speed", "speed")], percent=True, marks=marks, about=about)
        )
    return tag("div", charts, class_="charts")


def _chart(title: str, run: RunFiles, names: list[tuple[str, str]], **options: Any) -> Html:
    lines = []
    for name, label in names:
        curve = run.training.get(name) or run.validation.get(name)
        if curve is not None:
            lines.append(
                Line(curve.steps, curve.values, label, dots=name in run.validation and name not in run.training)
            )
    return chart(title, lines, x_range=(0.0, float(run.steps_done or 0)), **options)


def _metric_charts(run: RunFiles, marks: list[Mark]) -> list[Html]:
    """Metrics that belong together in one chart, any other in one of its own."""
    names = [name for name in run.validation if name not in ("val_loss", "bad_samples")]
    charts = []
    for title, together in CHARTS.items():
        shown = [(name, name_of(name)) for name in together if name in names]
        if shown:
            charts.append(_chart(title, run, shown, percent=True, marks=marks))
        elif not names and run.training and run.main_metric in together:
            charts.append(chart(title, []))
    return [*charts, *(_chart(name, run, [(name, name)], marks=marks) for name in names if not is_fraction(name))]


def _clip(run: RunFiles) -> str | None:
    clip = as_number(run.get("optim", "clip_grad"))
    return f"Before clipping at {short(clip)}." if np.isfinite(clip) else None


def _data_wait(run: RunFiles, marks: list[Mark]) -> Html:
    wait, step = run.training.get("data_wait_s"), run.training.get("step_s")
    lines = []
    if wait is not None and step is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            lines = [Line(wait.steps, wait.values / step.values, "of a step")]
    about = f"A step takes {duration(step.last)} at last." if step is not None and step.last is not None else None
    return chart(
        "Waiting for data", lines, unit="share of a step", percent=True, from_zero=True, marks=marks, about=about
    )


def _goodput(run: RunFiles) -> list[Html]:
    seconds = mapping(run.goodput.get("seconds"))
    known = {name: as_number(value) for name, value in seconds.items() if as_number(value) > 0}
    wall_s = as_number(run.goodput.get("last")) - as_number(run.goodput.get("began"))
    if not known or not wall_s > 0:
        return [absent("No account of the time yet: goodput.json is written with the first reading.")]
    wall_s = max(wall_s, sum(known.values()))
    known["other"] = wall_s - sum(known.values())
    longest = sorted(known.items(), key=lambda item: -item[1])
    about = (
        f"{duration(wall_s)} of wall time since the first start, restarts and down time included. Compute is that of "
        "steps that were not taken back."
    )
    colours = {_plain(name): colour for name, colour in _CATEGORIES.items()}
    return [
        tag("p", about, class_="about"),
        shares({_plain(name): value for name, value in longest}, colours),
    ]


def _quarantine(run: RunFiles) -> list[Html]:
    if not run.quarantine:
        return [tag("p", "No damaged sample was found.")]
    rows = [
        (str(line.get("key")), str(line.get("tar")), str(line.get("reason")), _data_named(run, line.get("data")))
        for line in run.quarantine[:_MOST_QUARANTINED]
    ]
    about = (
        f"{count(len(run.quarantine), 'damaged sample')}, replaced in training by the next good one of the lane, left "
        "out in evaluation."
    )
    left = len(run.quarantine) - len(rows)
    more = tag("p", f"And {left:,} more in quarantine.jsonl.", class_="note") if left else None
    return [tag("p", about), table(("sample", "shard", "reason", "data set"), rows), join(more)]


def _data_named(run: RunFiles, digest: Any) -> str:
    paths = [str(each.get("path")) for each in run.inputs if each.get("digest") == digest]
    return paths[0] if paths else str(digest)[:12]


def _examination(examined: Examination | str) -> list[Html]:
    if isinstance(examined, str):
        return [section("Classes", absent(examined)), section("Inside the network", absent(examined))]
    left_out = examined.total - examined.looked_at
    if not examined.is_whole:
        part = f"{examined.looked_at:,} of {examined.total:,} samples, spread over the set"
    else:
        part = f"all {examined.total:,} samples" + (f" but {left_out:,} damaged" if left_out else "")
    about = f"Computed for this page: {examined.source} on {part} of {examined.data}."
    return [
        section("Classes", _facts(examined), *_class_scores(examined), about=about),
        section(
            "Inside the network",
            network_view.network_view(examined.pictures, examined.classes),
            _note("The pictures' source: ", examined.attribution) if examined.attribution else None,
            about=_inside_about(examined),
        ),
    ]


def _facts(examined: Examination) -> Html:
    pixels = number(int(examined.confusion.sum())) if examined.counted == "pixels" else None
    scores = [] if examined.counted == "objects" else examined.scores.items()  # which have a table of their own
    return facts(
        [
            ("weights", examined.source),
            ("samples", number(examined.looked_at)),
            ("labelled pixels", pixels),
            *((name_of(name), number(value, percent=is_fraction(name))) for name, value in scores),
        ]
    )


def _class_scores(examined: Examination) -> list[Html]:
    if examined.counted == "objects":
        return [
            tag("h3", "Average precision and recall"),
            average_precision.summary(examined.scores),
            tag("p", _ABOUT_PRECISION, class_="note"),
            average_precision.class_table(examined.precisions),
        ]
    cells = "Per cent of the true class's pixels." if examined.counted == "pixels" else None
    return [
        tag(
            "div",
            tag("div", tag("h3", "Confusion matrix"), confusion_matrix.confusion(examined), _note(cells)),
            tag("div", tag("h3", "Most confused"), confusion_matrix.confused_pairs(examined)),
            class_="two",
        ),
        confusion_matrix.class_tables(examined),
    ]


def _inside_about(examined: Examination) -> str:
    told = "The length of each place's feature vector after each stage"
    hidden = {
        "samples": "The input is shown with --samples.",
        "pixels": "Image, truth and prediction are shown with --samples.",
        "objects": "The images, with what is on them and what was found, are shown with --samples.",
    }[examined.counted]
    if examined.counted == "samples":
        told += ", and where the class token of the last block looks, mean of its heads"
    more = "" if examined.attribution else f" {hidden}"
    return f"{told}. Yellow is most, each picture by itself.{more}"


def _note(*children: Child) -> Html | None:
    return tag("p", *children, class_="note") if any(children) else None


def _sheet(run: RunFiles) -> list[Html]:
    path = run.folder / "samples.png"
    try:
        if path.stat().st_size > _MOST_SHEET_BYTES:
            return [absent(f"samples.png has {size(path.stat().st_size)}, too many for this page.")]
        with Image.open(path) as image:
            image.load()
            shown = picture(image, "augmented training images", "sheet")
    except OSError:
        return [absent("There is no samples.png: tracking.log_samples makes one when the run begins.")]
    return [shown, tag("p", "Source: ", str(run.tags.get("data.path") or "not noted"), class_="note")]


def _system(run: RunFiles) -> Html:
    began = run.began
    if not any(run.system.values()) or began is None:
        return absent("No readings; tracking.system_metrics takes them.")
    nodes = list(run.system.items())
    shown = nodes[:: -(-len(nodes) // _MOST_NODES)]
    every = {node: -(-len(lines) * len(shown) // _MOST_LOADS) for node, lines in shown}
    x_label, unit_s = time_unit((run.last_sign or began) - began)
    charts = []
    for key, (title, unit) in _LOAD.items():
        lines = [Line(*_load(lines[:: every[node] or 1], key, began, unit_s), node) for node, lines in shown]
        if any(np.isfinite(line.y).any() for line in lines):
            many = len(lines) > 8
            styles = [0] * len(lines) if many else None
            about = f"{len(shown)} of {len(nodes)} nodes." if many else None
            options = {"styles": styles, "about": about, "legend": not many}
            charts.append(
                chart(title, lines, unit=unit, x_label=f"{x_label} since the start", from_zero=True, **options)
            )
    return tag("div", charts, class_="charts small") if charts else absent("No readings that are known here.")


def _load(lines: list[Document], key: str, began: float, unit_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Time since the start, in units of `unit_s` seconds, and values: counts of bytes become rates, GPUs their mean."""
    times = np.array([as_number(line.get("time")) for line in lines])
    kind = key.removeprefix("gpu_")
    values = []
    for line in lines:
        if key.startswith("gpu_"):
            each = [
                as_number(value)
                for name, value in line.items()
                if name.startswith("gpu_") and name.endswith(f"_{kind}")
            ]
            values.append(sum(each) / len(each) if each else np.nan)
        else:
            values.append(as_number(line.get(key)))
    column = np.array(values, np.float64)
    if key.startswith("network_") and len(column):
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.diff(column, prepend=np.nan) / np.diff(times, prepend=np.nan)
        going_up = rate >= 0  # a restart counts from nought
        times, column = times[going_up], rate[going_up]
    return (times - began) / unit_s, column


def _provenance(run: RunFiles) -> list[Html]:
    tags = run.tags
    revision = tags.get("mlflow.source.git.commit")
    dirty = {"true": " with uncommitted changes", "false": ""}.get(str(tags.get("code.dirty")), "")
    rows: list[tuple[Child, Child]] = [
        ("run", join(tag("code", str(run.record.get("uuid", "not noted"))))),
        ("code", join(tag("code", str(revision)), dirty) if revision else "revision not noted"),
        ("seed", str(tags["seed"]) if "seed" in tags else None),
        ("starts from", str(tags["parent.version"]) if "parent.version" in tags else "freshly initialised weights"),
        ("hardware", _hardware(run)),
        *((name, str(value)) for name, value in tags.items() if name not in _TOLD_TAGS),
    ]
    data = [
        (
            str(each.get("context")),
            str(each.get("path")),
            number(known_count(each.get("samples"))),
            number(known_count(each.get("classes"))),
            tag("code", str(each.get("digest"))),
        )
        for each in run.inputs
    ]
    return [
        facts(rows),
        tag("h3", "Data"),
        table(("used for", "path", "samples", "classes", "SHA-256"), data) if data else absent("Not noted."),
        tag("h3", "Handed off to"),
        _children(run),
        tag("h3", "Settings and software"),
        _fold("config.yaml", yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) if run.config else ""),
        _fold("deepspeed.json", yaml.safe_dump(run.deepspeed, sort_keys=False) if run.deepspeed else ""),
        _packages(run),
    ]


def _hardware(run: RunFiles) -> str | None:
    """As far as the load of its nodes tells."""
    first = [lines[0] for lines in run.system.values() if lines]
    gpus = {name.split("_")[1] for line in first for name in line if name.startswith("gpu_")}
    if not first:
        return None
    return f"{count(len(first), 'node')}, " + (f"{count(len(gpus), 'GPU')} on each" if gpus else "no GPU")


def _children(run: RunFiles) -> Html:
    if not run.children:
        return absent("Nothing.")
    rows = []
    for child in run.children:
        score = as_number(child.result.get(run.main_metric))
        told = "–"
        if np.isfinite(score):
            told = join(f"{name_of(run.main_metric)} ", number(score, percent=is_fraction(run.main_metric)))
        version = child.result.get("model")
        rows.append(
            (
                str(child.claim.get("name")),
                STATUS.get(child.status, child.status),
                str(child.claim.get("model")),
                str(version) if version else "–",
                told,
            )
        )
    return table(("run", "state", "from", "made", "result"), rows)


def _packages(run: RunFiles) -> Html:
    if not run.packages:
        return absent("Packages were not noted.")
    told = [line for line in run.packages if line.startswith(_TOLD_PACKAGES)]
    return tag(
        "details",
        tag("summary", f"{len(run.packages)} packages: {', '.join(told[:10])}"),
        tag("div", [join(line, tag("br")) for line in run.packages], class_="columns"),
    )


def _fold(name: str, text: str) -> Html:
    if not text:
        return absent(f"{name} is not there.")
    return tag("details", tag("summary", name), tag("pre", text))


def ettr_of(run: RunFiles) -> float | None:
    ettr = as_number(run.result.get("ettr"))
    if np.isfinite(ettr):
        return ettr
    return run.training["ettr"].last if "ettr" in run.training else None


def known_count(value: Any) -> float | None:
    found = as_number(value)
    return found if np.isfinite(found) else None


def _plain(name: str) -> str:
    return name.replace("_", " ")
