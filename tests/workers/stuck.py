"""A command that starts a process in its group, prints a result with its id, and does not end; see test_accept.py."""

import json
import subprocess
import time

if __name__ == "__main__":
    print(json.dumps({"child": subprocess.Popen(["sleep", "1000"]).pid}))
    time.sleep(1000)
