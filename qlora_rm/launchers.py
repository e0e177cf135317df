"""The rank of this process in its job, from the launcher's environment variables.

torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which torch reads.
`srun` with one task per rank sets SLURM's own variables; this module derives torch's from them.
"""

import re
from collections.abc import Mapping

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PORTS = range(10_000, 30_000)
"""Ports below Linux's ephemeral ones (from 32768) and above those of known services."""


def torchrun_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables torchrun would have set, if `srun` started this process as one of several ranks; else none.

    A launcher's own variables win: under `srun accelerate launch` SLURM counts the launchers, not the ranks. The shell of
    a batch script is not a rank: it has a SLURM_PROCID and the job's SLURM_NTASKS, but no SLURM_STEP_NUM_TASKS.

    Arguments:
        environ: `os.environ`; a MASTER_ADDR or MASTER_PORT in it is kept.

    Source: "OUTPUT ENVIRONMENT VARIABLES" of srun(1) and sbatch(1).
    """
    if any(name in environ for name in TORCHRUN) or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return {}
    node = int(environ["SLURM_NODEID"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[node]),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": environ.get("MASTER_PORT")
        or str(port_of_job(environ["SLURM_JOB_ID"], environ["SLURM_STEP_ID"])),
    }


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: gpu-a01 in `gpu-a[01-03,07],gpu-b3`. Several brackets are allowed."""
    match = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0]) if match else ""


def tasks_per_node(counts: str) -> list[int]:
    """Return the number of tasks on each node, in order: [8, 8, 4] for SLURM's `8(x2),4`."""
    return [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]


def port_of_job(job: str, step: str = "0") -> int:
    """Return a port for rank 0, the same on all nodes.

    Jobs with adjacent ids on one host, and steps of one job, get different ports.
    """
    return PORTS[(int(job) + 1000 * int(step)) % len(PORTS)]
