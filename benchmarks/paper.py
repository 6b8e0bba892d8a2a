"""The PVT paper's tables beside what has been run: Wang et al., "Pyramid Vision Transformer", ICCV 2021, tables 2 to 6.

python -m benchmarks.paper [--tracking-uri URI]

Each row is a configuration of this repository. Its parameters are counted; its score is that of the best version that
is registered under the configuration's tracking.model_name and was trained for this task, with this backbone, on as
many classes as the paper's data has. Where there is none the table says "not run": nothing is filled in. So it does
where no registry is named and runs/mlflow.db does not exist.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from pipeline import cli, network
from pipeline.config import Config, load_config
from pipeline.track import tracking_server
from pipeline.track.registry import registry


class Row(NamedTuple):
    name: str
    """Of the file, without .yaml."""
    parameters: float
    """In millions, as published."""
    scores: tuple[float, ...]
    """As published, in percent, of the table's metrics."""


class Table(NamedTuple):
    title: str
    folder: str
    metrics: tuple[str, ...]
    num_classes: int
    rows: tuple[Row, ...]


def _rows(name: str, *values: tuple[str, float, tuple[float, ...]]) -> tuple[Row, ...]:
    return tuple(Row(name.format(backbone), parameters, scores) for backbone, parameters, scores in values)


TABLES = (
    Table(
        "ImageNet-1K classification",
        "configs/pretrain",
        ("top1",),
        1000,
        _rows(
            "{}_in1k",
            ("pvt_tiny", 13.2, (75.1,)),
            ("pvt_small", 24.5, (79.8,)),
            ("pvt_medium", 44.2, (81.2,)),
            ("pvt_large", 61.4, (81.7,)),
        ),
    ),
    Table(
        "COCO, RetinaNet, 12 epochs",
        "configs/finetune",
        ("box_ap",),
        80,
        _rows(
            "retinanet_{}",
            ("resnet50", 37.7, (36.3,)),
            ("tiny", 23.0, (36.7,)),
            ("small", 34.2, (40.4,)),
            ("medium", 53.9, (41.9,)),
            ("large", 71.1, (42.6,)),
        ),
    ),
    Table(
        "COCO, Mask R-CNN, 12 epochs",
        "configs/finetune",
        ("box_ap", "mask_ap"),
        80,
        _rows(
            "mask_rcnn_{}",
            ("resnet50", 44.2, (38.0, 34.4)),
            ("tiny", 32.9, (36.7, 35.1)),
            ("small", 44.1, (40.4, 37.8)),
            ("medium", 63.9, (42.0, 39.0)),
            ("large", 81.0, (42.9, 39.5)),
        ),
    ),
    Table(
        "ADE20K, Semantic FPN",
        "configs/finetune",
        ("miou",),
        150,
        _rows(
            "semantic_fpn_{}",
            ("resnet50", 28.5, (36.7,)),
            ("tiny", 17.0, (35.7,)),
            ("small", 28.2, (39.8,)),
            ("medium", 48.0, (41.6,)),
            ("large", 65.1, (42.1,)),
        ),
    ),
    Table(
        "COCO, DETR, 50 epochs",
        "configs/finetune",
        ("box_ap",),
        80,
        _rows("detr_{}", ("resnet50", 41.0, (32.3,)), ("small", 40.0, (34.7,))),
    ),
)


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tracking-uri", default=os.environ.get("MLFLOW_TRACKING_URI"), metavar="URI")
    client = _registry(parser.parse_args().tracking_uri)
    return {table.title: [_compare(client, table, row) for row in table.rows] for table in map(_announced, TABLES)}


def _registry(uri: str | None) -> MlflowClient | None:
    """Returns a client of the registry that was named, or else of the one in runs/; None if there is neither."""
    if uri is None and not Path("runs/mlflow.db").exists():
        print("runs/mlflow.db does not exist, and --tracking-uri names no other registry", file=sys.stderr)
        return None
    return tracking_server.connect(tracking_server.tracking_uri(uri))


def _announced(table: Table) -> Table:
    columns = " | ".join(f"{metric}: paper | here" for metric in table.metrics)
    rule = "|---" * (4 + 2 * len(table.metrics)) + "|"
    print(f"\n{table.title}\n\n| | parameters: paper | here | {columns} | version |\n{rule}", file=sys.stderr)
    return table


def _compare(client: MlflowClient | None, table: Table, row: Row) -> dict[str, Any]:
    config = load_config(Path(table.folder) / f"{row.name}.yaml")
    parameters = _millions(config, table.num_classes)
    version = _best(client, config, table) if client else None
    scores = {metric: registry.metric_of(version, metric) if version else None for metric in table.metrics}
    cells = [row.name, f"{row.parameters} M", f"{parameters:.1f} M"]
    for published, score in zip(row.scores, scores.values(), strict=True):
        cells += [f"{published}", "not run" if score is None else f"{100 * score:.1f}"]
    where = f"{registry.uri_of(version)}, step {version.tags['step']}" if version else ""
    print(f"| {' | '.join([*cells, where])} |", file=sys.stderr, flush=True)
    return {
        "config": row.name,
        "paper": {"parameters_m": row.parameters, **dict(zip(table.metrics, row.scores, strict=True))},
        "here": {"parameters_m": round(parameters, 2), **scores},
        "version": registry.uri_of(version) if version else None,
    }


def _millions(config: Config, num_classes: int) -> float:
    with torch.device("meta"):
        built = network.build(config.task, config.model, config.image.size, num_classes)
    return sum(parameter.numel() for parameter in built.parameters()) / 1e6


def _best(client: MlflowClient, config: Config, table: Table) -> ModelVersion | None:
    metric = table.metrics[0]
    tags = {"task": config.task.name, "model": config.model.name, "num_classes": str(table.num_classes)}
    name = config.tracking.model_name or config.run.name
    scored = [
        each for each in registry.list_versions(client, name, **tags) if registry.score_of(each, metric) is not None
    ]
    return max(scored, key=lambda each: registry.worth(metric, registry.score_of(each, metric)), default=None)


if __name__ == "__main__":
    cli.run(main)
