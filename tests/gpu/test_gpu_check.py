"""The check of what only a GPU can show, on this host's GPU. `make test-gpu` runs it and leaves its report."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.gpu_check import BUDGET, RESULTS, ROOT

REPORT = RESULTS / "gpu_check.json"
IMPORTS = 60
"""Seconds beyond the budget, for a slow disk."""


@pytest.mark.gpu
def test_every_part_passes():
    REPORT.unlink(missing_ok=True)
    # all cores: the suite's one thread is for tests that run beside one another
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=BUDGET + IMPORTS)
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    left = {
        name: part.get("reason", part["status"]) for name, part in report["parts"].items() if part["status"] != "passed"
    }
    assert not left, left
    assert done.returncode == 0 and report["ok"] and report["complete"]
    assert report["form"] == "gpu" and report["machine"]["gpu"] and report["seconds"] < 480
