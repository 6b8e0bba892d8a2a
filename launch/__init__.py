"""Commands. Each file is run as `python launch/NAME.py` or through a launcher."""

import sys
from pathlib import Path

# Python puts a script's folder first on sys.path. There, evaluate.py and report.py would shadow packages that
# MLflow and Transformers import by those names.
_here = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _here]
