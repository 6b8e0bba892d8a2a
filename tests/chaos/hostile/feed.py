"""Feeds some epochs of a data set as training does.

python -m tests.chaos.hostile.feed DATA [rule]

With "rule" each place is compared with the sample that the rule of damaged views puts there.
"""

import sys
from pathlib import Path
from typing import Any

from launch import command
from tests.chaos import damaged_feed

SMALL = ("train.global_batch_size=4", "data.lanes=2", "data.shuffle_window=4")


def main() -> dict[str, Any]:
    data = sys.argv[1] if "://" in sys.argv[1] else Path(sys.argv[1]).absolute()
    settings = damaged_feed.settings(Path("data"), Path.cwd(), *SMALL, f"data.train={data}")
    found = damaged_feed.fed(settings, 1)
    if "rule" not in sys.argv[2:]:
        return {"fed": len(found)}
    expected = damaged_feed.Rule(settings).ids()
    wrong = [where for where, (sample, _) in found.items() if sample != expected[where]]
    return {"fed": len(found), "ok": not wrong, "wrong": wrong[:5]}


if __name__ == "__main__":
    command.run(main)
