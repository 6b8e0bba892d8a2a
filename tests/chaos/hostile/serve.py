"""Loads a version as serving does, from its checked copy, and asks it about one image. One argument: the URI."""

import os
import sys
from typing import Any

from pipeline import cli


def main() -> dict[str, Any]:
    import mlflow.pyfunc
    import pandas

    from pipeline.track import tracking_server
    from pipeline.track.registry import model_files, registry

    tracking_server.connect(os.environ["MLFLOW_TRACKING_URI"])
    version = registry.resolve(sys.argv[1])
    model = mlflow.pyfunc.load_model(str(version.folder.parent))
    answer = model.predict(pandas.DataFrame({"image": [model_files.example(32)]}))
    return {"answers": len(answer)}


if __name__ == "__main__":
    cli.run(main)
