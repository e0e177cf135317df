"""The rank of a process in its job: torchrun's variables, or SLURM's converted to them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_rm.launchers import PORTS, first_host, port_of_job, tasks_per_node, torchrun_variables

TASK = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu-a[1-4]", "SLURM_NTASKS": "16", "SLURM_NODEID": "1", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "gpu-a[2-3]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}  # fmt: skip
"""The ninth of the tasks that `srun` starts on two of a job's four nodes."""

BATCH_SHELL = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu-a[1-4]", "SLURM_NTASKS": "4", "SLURM_NODEID": "0", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_TASKS_PER_NODE": "1(x4)",
}  # fmt: skip


def test_a_task_of_srun_is_a_rank():
    assert torchrun_variables(TASK) == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1", "MASTER_ADDR": "gpu-a2",
        "MASTER_PORT": "14711",
    }  # fmt: skip


def test_a_rendezvous_that_is_given_is_kept():
    given_ones = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
    assert given_ones.items() <= torchrun_variables(TASK | given_ones).items()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH_SHELL,
        BATCH_SHELL | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},
        TASK | {"RANK": "3", "WORLD_SIZE": "32", "LOCAL_RANK": "3", "MASTER_ADDR": "gpu-a1"},
    ],
    ids=["no job", "batch shell", "torchrun in a batch shell", "one task", "a launcher's process in a task"],
)
def test_what_is_no_rank_of_sruns_is_left_alone(environ):
    assert torchrun_variables(environ) == {}


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node7", "node7"),
        ("node[01-03,07]", "node01"),
        ("gpu-a[1-2],gpu-b3", "gpu-a1"),
        ("gpu-b3,gpu-a[1-2]", "gpu-b3"),
        ("node[7,9-12].cluster.org,login", "node7.cluster.org"),
        ("rack[2-3]node[4-5]", "rack2node4"),
        ("a,b,c", "a"),
    ],
)
def test_first_host(nodelist, first):
    assert first_host(nodelist) == first


@given(
    prefix=st.from_regex(r"[a-z][a-z-]{0,8}", fullmatch=True),
    numbers=st.lists(st.integers(0, 9999), min_size=1, max_size=6, unique=True).map(sorted),
    width=st.integers(1, 5),
    others=st.lists(st.from_regex(r"[a-z]{1,5}(\[0-3,7\])?", fullmatch=True), max_size=3),
)
def test_the_first_host_of_folded_numbers(prefix, numbers, width, others):
    """SLURM's notation: consecutive numbers as ranges, zero-padded, followed by other groups."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    folded = ",".join(f"{run[0]:0{width}}" + (f"-{run[-1]:0{width}}" if len(run) > 1 else "") for run in runs)
    nodelist = ",".join([f"{prefix}[{folded}]", *others])
    assert first_host(nodelist) == f"{prefix}{numbers[0]:0{width}}"


@given(st.lists(st.integers(1, 16), min_size=1, max_size=12))
def test_tasks_per_node_unfold(counts):
    folded: list[list[int]] = []
    for count in counts:
        if folded and folded[-1][0] == count:
            folded[-1][1] += 1
        else:
            folded.append([count, 1])
    assert tasks_per_node(",".join(f"{n}(x{times})" if times > 1 else str(n) for n, times in folded)) == counts


@given(st.integers(1, 10**9), st.integers(0, 20))
def test_neighbouring_jobs_and_steps_have_ports_of_their_own(job, step):
    here = port_of_job(str(job), str(step))
    assert here in PORTS
    assert len({here, port_of_job(str(job + 1), str(step)), port_of_job(str(job), str(step + 1))}) == 3
