"""How `recipes/train.slurm` handles the end of a step, with a fake launcher; `test_nodes.py` uses a real one."""

import signal
import subprocess
import time

import pytest

from tests import slurm_for_tests
from tests.launching import ROOT

pytestmark = pytest.mark.slow

LAUNCHER = """#!/bin/sh
# accelerate launch: 1 when it is told to end, and 1 when a rank fails
trap 'exit 1' TERM
touch "$SLURM_FOR_TESTS/launched-$SLURM_NODEID"
while [ ! -e "$SLURM_FOR_TESTS/ended-$SLURM_NODEID" ]; do sleep 0.05; done
exit "$(cat "$SLURM_FOR_TESTS/ended-$SLURM_NODEID")"
"""


@pytest.fixture
def job(tmp_path):
    """The script, with both of its launchers running."""
    folder = tmp_path / "bin"
    environ = slurm_for_tests.install(folder)
    (folder / "accelerate").write_text(LAUNCHER)
    (folder / "accelerate").chmod(0o755)
    shell = subprocess.Popen(["bash", str(ROOT / "recipes/train.slurm")], cwd=ROOT, env=environ)
    until = time.monotonic() + 30
    while len(list(folder.glob("launched-*"))) < 2 or not (folder / "step").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    yield shell, folder, environ
    if shell.poll() is None:
        slurm_for_tests.tell([shell.pid], signal.SIGKILL)


@pytest.mark.parametrize("preempted", [True, False], ids=["preempted", "its time over"])
def test_told_to_end_it_is_queued_again(job, preempted):
    shell, folder, _ = job
    if preempted:
        slurm_for_tests.preempt(folder)
    else:
        shell.send_signal(signal.SIGUSR1)
    assert shell.wait(30) == 75
    assert (folder / "requeued").exists()


def test_one_that_somebody_cancels_is_not(job):
    shell, folder, environ = job
    subprocess.run(["scancel", environ["SLURM_JOB_ID"]], env=environ, check=True)
    assert shell.wait(30) == 75
    assert not (folder / "requeued").exists()


@pytest.mark.parametrize(("node", "status"), [(0, 1), (1, 2)])
def test_one_that_fails_is_not_though_the_other_launcher_is_told_to_end(job, node, status):
    shell, folder, _ = job
    (folder / f"ended-{node}.new").write_text(str(status))
    (folder / f"ended-{node}.new").rename(folder / f"ended-{node}")
    assert shell.wait(30) == status
    assert not (folder / "requeued").exists()


def test_one_that_is_done_is_not(job):
    shell, folder, _ = job
    for node in (0, 1):
        (folder / f"ended-{node}").write_text("0")
    assert shell.wait(30) == 0
    assert not (folder / "requeued").exists()
