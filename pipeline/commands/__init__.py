"""The commands. Each file of launch/ runs the one of its name."""

import sys
from pathlib import Path

# Python puts a script's folder first on sys.path. In launch/, evaluate.py and report.py would shadow packages that
# MLflow and Transformers import by those names.
_scripts = Path(sys.argv[0]).resolve().parent
if _scripts.name == "launch":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _scripts]
