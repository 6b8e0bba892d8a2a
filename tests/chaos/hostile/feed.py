"""Feeds some epochs of a data set as training does.

python -m tests.chaos.hostile.feed DATA [rule]

With "rule" each place is compared with the sample that the rule of damaged views puts there.
"""

import sys
from pathlib import Path
from typing import Any

from pipeline import cli
from tests.chaos import damaged_feed

SMALL = ("train.global_batch_size=4", "data.lanes=2", "data.shuffle_window=4")


def main() -> dict[str, Any]:
    data = sys.argv[1] if "://" in sys.argv[1] else Path(sys.argv[1]).absolute()
    config = damaged_feed.make_config(Path("data"), Path.cwd(), *SMALL, f"data.train={data}")
    found = damaged_feed.fed(config, 1)
    if "rule" not in sys.argv[2:]:
        return {"fed": len(found)}
    expected = damaged_feed.Rule(config).ids()
    wrong = [where for where, (sample, _) in found.items() if sample != expected[where]]
    return {"fed": len(found), "ok": not wrong, "wrong": wrong[:5]}


if __name__ == "__main__":
    cli.run(main)
