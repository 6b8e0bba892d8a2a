"""Says what a registered model sees in pictures, which need no labels.

python launch/predict.py --model models:/NAME@ALIAS PATHS… --out FILE.csv [--sheet FILE.png] [--features FILE.npy]

PATHS are folders, patterns, image files, tars and packed data sets. Several ranks share the work: deepspeed
launch/predict.py …
"""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import cli
from pipeline.config import ClassificationConfig, DetectionConfig
from pipeline.errors import InputError
from pipeline.track.serve.defaults import MIN_SCORE, TOP_K

# These take seconds to import, which --help and wrong usage do without.
if TYPE_CHECKING:
    import torch

    from pipeline.predict.predict import Predictor

_SUFFIXES = {
    "out": (".csv", ".jsonl", ".parquet"),
    "features": (".npy", ".parquet"),
    "sheet": (".png",),
}


def main() -> dict[str, Any] | None:
    arguments = _parse()
    _check_usage(arguments)
    # Threads of torch that wait for each other sleep, so that decoding gets the core. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Imported late, after all checks that need no torch.
    from pipeline import world

    here = world.start()
    predictor = here.first_then_all(lambda: _open(arguments, here.device))
    result = predictor.run(here)
    world.stop()
    return result


def _parse() -> argparse.Namespace:
    parser = cli.make_parser("launch/predict.py", "Say what a registered model sees in pictures.")
    parser.add_argument("--model", required=True, metavar="URI", help="models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument(
        "paths", nargs="+", metavar="PATHS", help="folders, patterns, image files, tars and packed data sets"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="table of answers: .csv, .jsonl or .parquet")
    parser.add_argument("--features", type=Path, metavar="FILE", help="a classifier's features: .npy or .parquet")
    parser.add_argument(
        "--feature-kind",
        choices=("pooled", "map"),
        help="what the last layer takes, or the last stage's map (default pooled)",
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="page of pictures with what was found")
    parser.add_argument("--top-k", type=int, metavar="K", help=f"labels of an image, of classifiers (default {TOP_K})")
    parser.add_argument(
        "--min-score", type=float, metavar="S", help=f"lowest score of a box, of detectors (default {MIN_SCORE})"
    )
    parser.add_argument("--tracking-uri", metavar="URI")
    cli.add_cache(parser)
    # The deepspeed launcher adds this option.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser.parse_args()


def _check_usage(arguments: argparse.Namespace) -> None:
    files = {name: getattr(arguments, name) for name in _SUFFIXES if getattr(arguments, name)}
    if not files:
        raise InputError("nothing to write: give --out FILE.csv, --features FILE.npy or --sheet FILE.png")
    for name, path in files.items():
        if path.suffix not in _SUFFIXES[name]:
            raise InputError(f"--{name} {path}: its name must end in {' or '.join(_SUFFIXES[name])}")
        if not path.parent.is_dir():
            raise InputError(f"--{name} {path}: there is no folder {path.parent}: create it")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise InputError(f"--{name} {path}: cannot be written: name another file")
    if len({path.absolute() for path in files.values()}) < len(files):
        raise InputError("--out and --features name one file: give each its own")
    if arguments.feature_kind and not arguments.features:
        raise InputError("--feature-kind says what --features FILE.npy gets: give both, or neither")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise InputError(f"--top-k {arguments.top_k}: a number of at least 1 was expected")
    if arguments.min_score is not None and not 0 <= arguments.min_score <= 1:
        raise InputError(f"--min-score {arguments.min_score:g}: 0 to 1 was expected")
    cli.cache_of(arguments)


def _open(arguments: argparse.Namespace, device: "torch.device") -> "Predictor":
    """Opens the model and the images. Raises InputError for a model of another task than an option asks."""
    from pipeline.answers import AnswerOptions
    from pipeline.predict.predict import Outputs, Predictor
    from pipeline.shards.loose_images import open_images
    from pipeline.tasks.load_model import open_model

    images = open_images(arguments.paths, cli.cache_of(arguments))
    version, task = open_model(arguments.model, arguments.tracking_uri)
    for option, kind, what in (
        ("top_k", ClassificationConfig, "classifier"),
        ("features", ClassificationConfig, "classifier"),
        ("min_score", DetectionConfig, "detector"),
    ):
        if getattr(arguments, option) is not None and not isinstance(version.card.task, kind):
            name = option.replace("_", "-")
            raise InputError(
                f"--{name} is for a {what}, and {version.uri} is of task {version.card.task.name}: remove it"
            )
    outputs = Outputs(arguments.out, arguments.features, arguments.sheet, arguments.feature_kind or "pooled")
    if outputs.has_answers:
        version.card.require_head(version.uri)
    task.model.to(device)
    min_score = MIN_SCORE if arguments.min_score is None else arguments.min_score
    options = AnswerOptions(arguments.top_k or TOP_K, min_score)
    return Predictor(
        version.uri,
        version.card,
        task,
        images,
        outputs,
        options,
    )
