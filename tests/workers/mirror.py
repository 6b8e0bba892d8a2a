"""Send a run's folder to its server once; see test_mirror.py, which kills this.

python -m tests.workers.mirror FOLDER
"""

import sys
from pathlib import Path

from pipeline.track.sync.mirror import Mirror

if __name__ == "__main__":
    Mirror(Path(sys.argv[1])).sync()
