"""Draw a run as one HTML page that needs no network, or several runs side by side.

python launch/report.py RUN [--out FILE] [--no-model] [--samples]     RUN/report.html
python launch/report.py RUN RUN … --out FILE                          their curves, settings and results side by side

RUN is a run's folder, runs/NAME. It may be at work, have failed or been killed: the page shows what there is. The
newest whole checkpoint is run on the validation data, where both are there; --no-model leaves that out. --samples shows
images of the data set, which their licence has to allow; ATTRIBUTION.txt beside its manifest.json is quoted with them.
"""

import argparse
import contextlib
import hashlib
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import command
from pipeline.errors import ExternalError, InputError

if TYPE_CHECKING:  # torch takes seconds to import, which pages without pictures do without
    import torch
    from torch import Tensor, nn

    from pipeline.config import Config
    from pipeline.feed.loader import EvalFeed
    from pipeline.shards.index import ShardSet
    from pipeline.track.report import Examination, Picture
    from pipeline.track.report.classes import Map

REPORT = "report.html"
MOST_SAMPLES = 20_000
BUDGET_S = 30.0
"""What running the network may take, about, going by how long it takes for some images."""
NUM_PICTURES = 6
ATTRIBUTION = "ATTRIBUTION.txt"


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="launch/report.py", description="Draw a run, or several, as an HTML page.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as runs/NAME")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default RUN/{REPORT})")
    parser.add_argument("--no-model", action="store_true", help="do not run the network on the validation data")
    parser.add_argument("--samples", action="store_true", help="show images of the data set")
    arguments = parser.parse_args()
    began = time.perf_counter()
    if len(arguments.runs) == 1:
        out = write(arguments.runs[0], arguments.out, model=not arguments.no_model, samples=arguments.samples)
    else:
        if arguments.out is None:
            raise InputError("--out is missing: a comparison belongs to no run's folder, so name its file")
        out = write_comparison(arguments.runs, arguments.out)
    seconds = round(time.perf_counter() - began, 1)
    return {"report": str(out), "bytes": out.stat().st_size, "seconds": seconds}


def write(folder: Path, out: Path | None = None, *, model: bool = True, samples: bool = False) -> Path:
    """Draw the run in `folder` into `out`, by default its report.html; returns the page's path.

    `model`: run the newest whole checkpoint on the validation data. `samples`: show images of the data sets, also done
    where the run's tracking.log_samples says so. Writes nothing else. Raises InputError for a folder that holds no run,
    and where the page cannot be written.
    """
    from pipeline.track.report import RunFiles, page

    run = RunFiles(folder)
    samples = samples or run.get("tracking", "log_samples") is True
    examined = examine(folder, samples=samples) if model else "Left out: the page was made with --no-model."
    return _write(out or folder / REPORT, page(run, examined, samples=samples))


def write_comparison(folders: list[Path], out: Path) -> Path:
    """Draw several runs side by side into `out`. Raises InputError as `write` does."""
    from pipeline.track.report import RunFiles, compare

    return _write(out, compare([RunFiles(folder) for folder in folders]))


def _write(out: Path, text: str) -> Path:
    # Whole or not at all, and under a name of its own until then: two may draw the same page at once.
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(f"{out}: cannot be written: {error.strerror}; name another file with --out") from error
    return out


def examine(folder: Path, *, samples: bool) -> "Examination | str":
    """What the run's network does with its validation data, or why that cannot be told. `samples`: with the images."""
    try:
        return _examine(folder, samples)
    except (InputError, ExternalError, OSError) as error:
        return f"Not known: {error}"
    except Exception as error:  # the rest of the page is worth more than a traceback
        print(f"{folder}: its network could not be examined: {error!r}", file=sys.stderr, flush=True)
        return f"Not known: {type(error).__name__}: {error}"


def _examine(folder: Path, samples: bool) -> "Examination":
    from pipeline import config
    from pipeline.shards.index import ShardSet

    settings = config.load(folder / "config.yaml")
    if settings.data.val is None:
        raise InputError("the run has no validation data: data.val is not set")
    source, step, weights = _newest_weights(folder)
    shards = ShardSet(settings.data.val)
    try:
        _require_same_data(folder, shards, settings.data.val)
        return _run_network(settings, shards, source, step, weights, samples)
    finally:
        shards.close()


def _newest_weights(folder: Path) -> tuple[str, int, Path]:
    """What it is, its step and its file: that of the newest checkpoint, or of a version that waits to be registered,
    whose bytes are those that were written. The moving average, where one is kept."""
    from pipeline.train.commit import EMA, MODEL, Commit, commit_fault, step_of

    for checkpoint in sorted((folder / "checkpoints").glob("step-*"), reverse=True):
        with contextlib.suppress(OSError, InputError):  # removed this instant, or of a newer format
            if commit_fault(checkpoint) is None:
                files = Commit.read(checkpoint).files
                name = EMA if EMA in files else MODEL
                if _digest(checkpoint / name) == files[name].sha256:
                    average = ", moving average" if name == EMA else ""
                    return f"checkpoint {checkpoint.name}{average}", step_of(checkpoint), checkpoint / name
                print(f"{checkpoint / name} is damaged and passed over", file=sys.stderr, flush=True)
    return _waiting_weights(folder)


def _waiting_weights(folder: Path) -> tuple[str, int, Path]:
    from pydantic import ValidationError

    from pipeline.track.card import WEIGHTS, Card

    for entry in sorted((folder / "versions").glob("step-*"), reverse=True):
        with contextlib.suppress(OSError, ValidationError):
            card = Card.read(entry)
            if _digest(entry / WEIGHTS) == card.sha256[WEIGHTS]:
                return f"version {entry.name}", int(card.lineage["step"]), entry / WEIGHTS
    raise InputError(f"{folder}: no whole checkpoint is in checkpoints/, nor weights in versions/")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_same_data(folder: Path, shards: "ShardSet", path: str) -> None:
    from pipeline.track.record import Record

    with contextlib.suppress(InputError):  # without a record there is nothing to compare with
        known = [each.digest for each in Record.read(folder).inputs if each.context == "validation"]
        if known and shards.digest not in known:
            raise _OtherDataError(
                f"{path} is another data set now ({shards.digest[:12]}) than in the run ({known[0][:12]})"
            )


class _OtherDataError(ExternalError):
    """The validation data has changed since."""


def _run_network(
    settings: "Config", shards: "ShardSet", source: str, step: int, weights: Path, samples: bool
) -> "Examination":
    import numpy as np
    import safetensors.torch
    import torch

    from pipeline.tasks.classify import ClassificationMetric, build_model
    from pipeline.track.report import Examination
    from pipeline.world import World

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    network = build_model(settings.model, settings.image.size, len(shards.classes))
    network.load_state_dict(safetensors.torch.load_file(weights))
    network = network.to(device).eval()
    count, metric = len(shards.classes), ClassificationMetric()
    confusion = np.zeros((count, count), np.int64)
    with torch.inference_mode():
        pictures = _look_inside(network, settings, shards, device, samples)
        most = min(MOST_SAMPLES, max(32, int(BUDGET_S / _seconds_each(network, settings.image.size, device))))
        for batch in _spread(settings, shards, most, device):
            logits = network(batch.images).float()
            metric.update(logits, batch.targets, batch.weights)
            kept = batch.weights > 0
            cells = batch.targets[kept] * count + logits.argmax(dim=1)[kept]
            confusion += np.bincount(cells.cpu().numpy(), minlength=count * count).reshape(count, count)
    return Examination(
        source=source,
        step=step,
        data=str(settings.data.val),
        total=len(shards),
        is_whole=most >= len(shards),
        classes=shards.classes,
        confusion=confusion,
        scores=metric.result(World()),
        pictures=pictures,
        attribution=_attribution(str(settings.data.val)) if samples else None,
    )


def _spread(settings: "Config", shards: "ShardSet", most: int, device: "torch.device") -> "EvalFeed":
    """All samples as the run evaluates them; or, where those are too many, small batches from all over the data set, as
    the first of so many ranks would take them."""
    from pipeline.feed.loader import EvalFeed
    from pipeline.world import World

    every = -(-len(shards) // most)
    size = settings.evaluate.batch_size if every == 1 else min(32, most)
    return EvalFeed(shards, World(size=every, device=device), settings.image, batch_size=size)


def _look_inside(
    network: "nn.Module", settings: "Config", shards: "ShardSet", device: "torch.device", samples: bool
) -> "list[Picture]":
    """Some images from all over the data set."""
    import torch

    from pipeline.feed.loader import EvalFeed
    from pipeline.track.report import Picture
    from pipeline.world import World

    stride = World(size=max(1, len(shards) // NUM_PICTURES), device=device)
    batches = EvalFeed(shards, stride, settings.image, batch_size=1)
    mean, std = (torch.tensor(value)[:, None, None] for value in (settings.image.mean, settings.image.std))
    pictures: list[Picture] = []
    for batch in batches:
        if not batch.weights[0] or len(pictures) == NUM_PICTURES:
            continue
        probabilities = network(batch.images).float().softmax(dim=1)[0].cpu()
        image = 255 * (batch.images[0].float().cpu() * std + mean)
        pictures.append(
            Picture(
                key=shards.key(int(batch.samples.shard[0]), int(batch.samples.row[0])),
                label=int(batch.targets[0]),
                prediction=int(probabilities.argmax()),
                probability=float(probabilities.max()),
                image=image.clamp(0, 255).byte().permute(1, 2, 0).numpy() if samples else None,
                maps=_stage_maps(network, batch.images),
                attention=_class_attention(network, batch.images),
            )
        )
    return pictures


def _seconds_each(network: "nn.Module", size: int, device: "torch.device") -> float:
    """What the network takes for an image, in a batch if it is quick."""
    import torch

    each_s = BUDGET_S
    for count in (1, 1, 32):  # the first time is slower
        began = time.perf_counter()
        network(torch.zeros(count, 3, size, size, device=device)).cpu()
        each_s = (time.perf_counter() - began) / count
        if each_s > 0.1:
            break
    return each_s


def _stage_maps(network: "nn.Module", images: "Tensor") -> "list[Map]":
    """[H, W] of each of four stages, or of four layers as far apart as can be: the length of each place's features."""
    if not hasattr(network, "forward_intermediates"):
        return []
    maps: Any = network.forward_intermediates(images, intermediates_only=True)  # pyright: ignore[reportCallIssue]
    chosen = [maps[round(place * (len(maps) - 1) / 3)] for place in range(4)] if len(maps) > 4 else maps
    return [stage[0].float().norm(dim=0).cpu().numpy() for stage in chosen]


def _class_attention(network: "nn.Module", images: "Tensor") -> "Map | None":
    """[H, W]: how the class token of PVT's last block weighs the places of the last stage, mean over heads. None
    where there is but one place."""
    from pvt import PyramidVisionTransformer

    if not isinstance(network, PyramidVisionTransformer):
        return None
    attention: Any = network.stages[-1].blocks[-1].attn  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    seen: list[tuple[Tensor, tuple[int, int]]] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    try:
        network(images)
    finally:
        hook.remove()
    ((tokens, grid),) = seen
    if max(grid) == 1:  # a single place gets all
        return None
    q = attention.q(tokens[:, :1]).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)  # [1, heads, 1, D]
    k = attention.kv(tokens).unflatten(-1, (2, attention.num_heads, -1))[:, :, 0].transpose(1, 2)  # [1, heads, N, D]
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)[0, :, 0, 1:]  # [heads, H*W]
    return weights.float().mean(dim=0).unflatten(0, grid).cpu().numpy()


def _attribution(data: str) -> str:
    path = Path(data) / ATTRIBUTION
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return f"{data}. No {ATTRIBUTION} is beside its manifest.json: look up its licence before passing this page on."


if __name__ == "__main__":
    command.run(main)
