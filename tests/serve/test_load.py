"""scripts/faults/serve_load.py for a few seconds: clients of all kinds at once, wrong requests, random bodies, a kill."""

import json
import subprocess
import sys

from tests.demo.running import ROOT


def test_the_server_under_load():
    args = ["--clients", "16", "--seconds", "4", "--bad", "60", "--random", "100", "--kills", "1"]
    command = [sys.executable, "scripts/faults/serve_load.py", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["load"]["answers"] > 20
    assert report["kills"]["snapshots"] > 0
    assert report["bad"]["statuses"].get("400", 0) > 20
