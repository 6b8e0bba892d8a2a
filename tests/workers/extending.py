"""One rank that adds the toys of tests/toys.py, trains, evaluates, serves and exports; see test_extending.py.

python -m tests.workers.extending CONFIG OUT
"""

import json
import sys
from pathlib import Path

import mlflow.pyfunc
import pandas

from pipeline import network
from pipeline.commands import evaluate, predict, train
from pipeline.config import load_config
from pipeline.config.task import TASKS
from pipeline.feed import task_transforms
from pipeline.shards import public_datasets
from pipeline.tasks import build
from pipeline.track import export
from pipeline.track.export import graphs
from pipeline.track.registry import promote, registry
from pipeline.track.serve import served_model
from tests import toys


def add_task() -> None:
    """Does what the checklist of tasks says."""
    TASKS["ordinal"] = toys.OrdinalConfig
    network.NETWORKS["ordinal"] = toys.build_ordinal
    task_transforms.TRANSFORMS["ordinal"] = toys.OrdinalTransform
    build.TASK_CLASSES["ordinal"] = toys.OrdinalTask
    served_model.SERVED["ordinal"] = toys.ServedOrdinal
    graphs.GRAPHS["ordinal"] = graphs.ClassGraph


def main() -> None:
    path, out = sys.argv[1:]
    add_task()
    public_datasets.LAYOUTS.insert(0, toys.NAMED)
    export.MODULES["npz"] = "to_npz"
    sys.modules["pipeline.track.export.to_npz"] = toys.TO_NPZ  # pyright: ignore[reportArgumentType]
    sys.argv = ["train", "--config", path]
    trained = train.start("train", "Train.", fine_tuning=False)
    assert trained
    config = load_config(path)
    where = ["--tracking-uri", f"sqlite:///{config.run.root}/mlflow.db", "--cache", str(config.data.cache)]
    sys.argv = ["evaluate", "--model", trained["model"], "--data", str(config.data.val), *where]
    evaluated = evaluate.main()
    predictions = Path(f"{out}.jsonl")
    sys.argv = ["predict", "--model", trained["model"], str(config.data.val), "--out", str(predictions), *where]
    predict.main()
    version = registry.resolve(trained["model"])
    images = [file.read_bytes() for file in sorted(Path(str(config.data.val)).iterdir())[:4]]
    served = mlflow.pyfunc.load_model(str(version.folder.parent))
    report = {
        "trained": trained,
        "evaluated": evaluated,
        "answers": served.predict(pandas.DataFrame({"image": images})).to_dict("records"),
        "predictions": [json.loads(line) for line in predictions.read_text().splitlines()],
        "columns": served.metadata.signature.outputs.input_names(),
        "loads": promote._answer_example(version),
        "export": export.export(trained["model"], "npz", Path(out)),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
