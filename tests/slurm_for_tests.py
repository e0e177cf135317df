"""Stand-ins for SLURM's commands: a step's nodes are processes of this machine. As a script: `slurm_for_tests.py srun ...`."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

COMMANDS = ("srun", "scontrol", "scancel", "squeue")
KILL_WAIT = 30.0


def install(folder: Path, *, nodes: int = 2, tasks_per_node: int = 1, job: int = 4711) -> dict[str, str]:
    """Write the commands to `folder`; return the environment of a batch shell that finds them there.

    `folder/requeued` exists once the job was requeued.
    """
    folder.mkdir(parents=True)
    for name in COMMANDS:
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n')
        path.chmod(0o755)
    return {
        "PATH": os.pathsep.join([str(folder), os.environ["PATH"]]),
        "SLURM_FOR_TESTS": str(folder),
        "SLURM_JOB_ID": str(job), "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "localhost,elsewhere",
        "SLURM_NTASKS_PER_NODE": str(tasks_per_node), "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_ON_NODE": "1",
        # variables of the batch shell itself
        "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": str(nodes * tasks_per_node),
    }  # fmt: skip


def srun(words: list[str]) -> int:
    """Run every task of a step; return the highest exit status, which is 128 plus its number for a signal.

    With --kill-on-bad-exit=1 the first failure ends the others.
    """
    options = [word for word in words if word.startswith("--")][: next(i for i, w in enumerate(words) if w[:2] != "--")]
    nodes, per_node = int(os.environ["SLURM_JOB_NUM_NODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks = []
    for rank in range(nodes * per_node):
        place = {
            "SLURM_PROCID": rank, "SLURM_NODEID": rank // per_node, "SLURM_LOCALID": rank % per_node, "SLURM_STEP_ID": 0,
            "SLURM_STEP_NUM_TASKS": nodes * per_node, "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"],
            "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})",
        }  # fmt: skip
        environ = os.environ | {name: str(value) for name, value in place.items()}
        tasks.append(subprocess.Popen(words[len(options) :], env=environ, start_new_session=True))
    step = Path(os.environ["SLURM_FOR_TESTS"]) / "step"
    step.write_text(json.dumps([task.pid for task in tasks]))
    end_by = None
    while any(task.poll() is None for task in tasks):
        time.sleep(0.1)
        if end_by is None and "--kill-on-bad-exit=1" in options and any(task.poll() for task in tasks):
            end_by = time.monotonic() + KILL_WAIT
            tell([task.pid for task in tasks if task.poll() is None], signal.SIGTERM)
        if end_by is not None and time.monotonic() > end_by:
            tell([task.pid for task in tasks if task.poll() is None], signal.SIGKILL)
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def tell(tasks: list[int], what: signal.Signals) -> None:
    """Signal every process of the tasks, as SLURM does for a step."""
    for pid in filter(psutil.pid_exists, tasks):
        task = psutil.Process(pid)
        for process in [task, *task.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(what)


def preempt(folder: Path) -> None:
    """Do what SLURM does at the beginning of a partition's GraceTime."""
    tell(json.loads((folder / "step").read_text()), signal.SIGTERM)


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(words[2].split(",")))
    elif words == ["requeue", os.environ["SLURM_JOB_ID"]]:
        (Path(os.environ["SLURM_FOR_TESTS"]) / "requeued").touch()
    else:
        return 1
    return 0


def scancel(words: list[str]) -> int:
    """Signal the steps, or end the job. Unlike SLURM, do not signal the batch shell, which mostly dies of it."""
    folder = Path(os.environ["SLURM_FOR_TESTS"])
    if words == [os.environ["SLURM_JOB_ID"]]:
        (folder / "cancelled").touch()
    elif words != ["--signal=TERM", os.environ["SLURM_JOB_ID"]]:
        return 1
    preempt(folder)
    return 0


def squeue(words: list[str]) -> int:
    if words != ["--noheader", "--format=%T", f"--jobs={os.environ['SLURM_JOB_ID']}"]:
        return 1
    print("COMPLETING" if (Path(os.environ["SLURM_FOR_TESTS"]) / "cancelled").exists() else "RUNNING")
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol, "scancel": scancel, "squeue": squeue}[sys.argv[1]](sys.argv[2:]))
