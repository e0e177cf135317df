"""Two "nodes" on one machine: two launchers that share a port train as one job, and end together when a rank dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from qlora_rm.training.run import main
from tests import slurm_for_tests
from tests.launching import ROOT, short_run

pytestmark = [pytest.mark.slow, pytest.mark.long]

BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "recipes" / "train.slurm")
BOUND = 30.0
"""Seconds from a rank's death to the last launcher's end: `LOOK_EVERY` 1, `COME_OUT` 5, `LINGER` 3, and load."""


def environment(**more: str) -> dict[str, str]:
    launched = {name for name in os.environ if name.startswith("SLURM_")}
    mine = {name: value for name, value in os.environ.items() if name not in launched}
    return mine | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """Processes of one job, each with its standard error in a separate file."""

    def __init__(self, folder: Path):
        self.folder, self.processes = folder, list[subprocess.Popen]()

    def start(self, command: list[str], cwd: Path = ROOT, **environ: str) -> None:
        with (self.folder / f"node-{len(self.processes)}.log").open("w") as log:
            self.processes.append(
                subprocess.Popen(
                    command, cwd=cwd, env=environment(**environ), stdout=log, stderr=log, start_new_session=True
                )
            )

    def said(self, node: int) -> str:
        return (self.folder / f"node-{node}.log").read_text(errors="replace")

    def wait(self, timeout: float = 240.0) -> list[int]:
        until = time.monotonic() + timeout
        return [process.wait(max(0.0, until - time.monotonic())) for process in self.processes]


@contextmanager
def job(folder: Path):
    started = Job(folder)
    try:
        yield started
    finally:
        for process in started.processes:
            for orphan in [*children(process), process] if process.poll() is None else []:
                orphan.kill()


def children(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def two_launchers(running: Job, flags: list[str], homes: tuple[Path, Path] = (ROOT, ROOT)) -> None:
    """Run `accelerate launch` twice, as DDP with one CPU rank each; `homes` are the nodes' working directories."""
    port = str(free_port())
    for node, home in enumerate(homes):
        running.start(
            [
                str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "accelerate_configs/cpu_ddp.yaml"),
                "--num_machines", "2", "--num_processes", "2", "--machine_rank", str(node), "--main_process_ip", "127.0.0.1",
                "--main_process_port", port, "--same_network", str(ROOT / "qlora_rm/train.py"), *flags,
            ],
            home,
        )  # fmt: skip


def until(condition, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, backbone_folder, rows_file):
    out = tmp_path_factory.mktemp("one") / "out"
    main(short_run(backbone_folder, rows_file, out, gradient_accumulation_steps=2, share_prefix="false"))
    return load_file(out / "adapter_model.safetensors")


def assert_close(folder: Path, adapter: dict[str, torch.Tensor]) -> None:
    other = load_file(folder / "adapter_model.safetensors")
    assert other.keys() == adapter.keys()
    for name, weight in other.items():
        torch.testing.assert_close(weight, adapter[name], rtol=0, atol=1e-4, msg=name)


def test_the_slurm_script_trains_over_two_nodes_what_one_process_trains(
    one_process, backbone_folder, rows_file, tmp_path
):
    slurm = slurm_for_tests.install(tmp_path / "bin", job=free_port())
    slurm |= {"LAUNCH_CONFIG": "accelerate_configs/cpu_two_nodes_zero3.yaml"}
    with job(tmp_path) as running:
        running.start(
            ["bash", SCRIPT, *short_run(backbone_folder, rows_file, tmp_path / "out", engine="zero3")], **slurm
        )
        assert running.wait() == [0], running.said(0)[-5000:]
    assert "engine: zero3, 2 processes on cpu, fp32" in running.said(0)
    assert len(re.findall("^held-out accuracy ", running.said(0), re.MULTILINE)) == 1
    assert_close(tmp_path / "out", one_process)
    assert not (tmp_path / "bin" / "requeued").exists()
    assert not list((tmp_path / "out").glob(".preflight-*"))


def test_a_second_copy_that_would_reach_over_machines_is_refused_before_weights_are_loaded(
    backbone_folder, rows_file, tmp_path
):
    """The same script and configuration on machines with fewer GPUs than it was written for."""
    engine, launch_config = tmp_path / "engine.json", tmp_path / "launch.yaml"
    settings = json.loads((ROOT / "ds_configs/cpu_two_nodes_zero3.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = 2
    engine.write_text(json.dumps(settings))
    written = (ROOT / "accelerate_configs/cpu_two_nodes_zero3.yaml").read_text()
    launch_config.write_text(written.replace("ds_configs/cpu_two_nodes_zero3.json", str(engine)))
    slurm = slurm_for_tests.install(tmp_path / "bin", job=free_port()) | {"LAUNCH_CONFIG": str(launch_config)}
    with job(tmp_path) as running:
        running.start(["bash", SCRIPT, *short_run(backbone_folder, rows_file, tmp_path / "out")], **slurm)
        assert running.wait(120) != [0]
    said = running.said(0).partition("elastic/multiprocessing")[0]
    assert said.count(f"error: The DeepSpeed configuration {engine} cannot train") == 1, running.said(0)[-5000:]
    assert "set it to 1" in said and "compute dtype" not in said and "Traceback" not in said


@pytest.mark.parametrize("why", ["its time is over", "it is preempted"])
def test_the_job_saves_and_is_queued_again(why, backbone_folder, rows_file, tmp_path):
    slurm = slurm_for_tests.install(tmp_path / "bin", job=free_port())
    slurm |= {"LAUNCH_CONFIG": "accelerate_configs/cpu_two_nodes_zero3.yaml", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"}
    out = tmp_path / "out"
    flags = short_run(backbone_folder, rows_file, out, max_steps=100_000, save_steps=2, eval_steps=50_000)
    with job(tmp_path) as running:
        running.start(["bash", SCRIPT, *flags], **slurm)
        until(lambda: list(out.glob("checkpoint-*/COMPLETE")) or running.processes[0].poll() is not None)
        if why == "its time is over":
            running.processes[0].send_signal(signal.SIGUSR1)
        else:
            slurm_for_tests.preempt(tmp_path / "bin")
        assert running.wait(90) != [0], running.said(0)[-5000:]
    assert (tmp_path / "bin" / "requeued").exists(), running.said(0)[-5000:]
    last = max(out.glob("checkpoint-*/COMPLETE"), key=lambda path: path.stat().st_mtime).parent
    assert f"stopped by SIGTERM. The last complete checkpoint is {last}" in running.said(0)


def test_srun_itself_may_start_the_ranks(one_process, backbone_folder, rows_file, tmp_path):
    slurm = slurm_for_tests.install(tmp_path / "bin", job=free_port())
    flags = short_run(backbone_folder, rows_file, tmp_path / "out", engine="ddp")
    with job(tmp_path) as running:
        running.start(["srun", "--kill-on-bad-exit=1", sys.executable, "qlora_rm/train.py", *flags], **slurm)
        assert running.wait() == [0], running.said(0)[-5000:]
    assert "engine: ddp, 2 processes on cpu, fp32" in running.said(0)
    assert_close(tmp_path / "out", one_process)


def test_a_rank_killed_on_another_node_ends_the_job(backbone_folder, rows_file, tmp_path):
    out = tmp_path / "out"
    flags = short_run(backbone_folder, rows_file, out, max_steps=100_000, save_steps=2, eval_steps=50_000)
    with job(tmp_path) as running:
        two_launchers(running, flags)
        until(lambda: list(out.glob("checkpoint-*/COMPLETE")))
        killed = time.monotonic()
        children(running.processes[1])[0].kill()
        assert all(running.wait(60))
        took = time.monotonic() - killed
    assert took < BOUND
    assert "SIGKILL" in running.said(1)
    survivor = running.said(0)
    assert "[rank 0 on " in survivor and "lost the other ranks" in survivor and "out of memory?" in survivor
    assert "[rank0]: Traceback" not in survivor


@pytest.mark.parametrize("differs", ["data", "backbone"])
def test_what_differs_on_one_node_is_told_on_all_before_weights_are_loaded(
    differs, backbone_folder, rows_file, tmp_path
):
    """The same command on two hosts with different files."""
    homes = tmp_path / "first", tmp_path / "second"
    rows = Path(rows_file).read_text().splitlines(keepends=True)
    for home in homes:
        home.mkdir()
        (home / "rows.jsonl").write_text("".join(rows[: 80 if differs == "data" and home is homes[1] else None]))
        if differs == "data" or home is homes[0]:
            (home / "backbone").symlink_to(backbone_folder)
    with job(tmp_path) as running:
        two_launchers(running, short_run("./backbone", "rows.jsonl", tmp_path / "out"), homes)
        assert all(running.wait(120))
    first, second = (running.said(node).partition("elastic/multiprocessing")[0] for node in (0, 1))
    if differs == "data":
        assert first.count("error: The processes read different data (rank 0 on ") == 1
        assert "different data" not in second
    else:
        assert second.count("[rank 1] error: There is no folder ./backbone") == 1
        assert "ended because rank 1 on " in first and "There is no folder ./backbone" in first
    for said in (first, second):
        assert "compute dtype" not in said and "Traceback" not in said


@pytest.fixture
def torchrun(tmp_path):
    """Run `failing_ranks.py` under one launcher or two; return each launcher's output before and in its summary."""

    def run(how: str, nodes: int) -> list[tuple[str, str]]:
        port = free_port()
        with job(tmp_path) as running:
            for node in range(nodes):
                running.start(
                    [
                        str(BIN / "torchrun"), f"--nnodes={nodes}", f"--nproc-per-node={2 // nodes}", f"--node-rank={node}",
                        "--master-addr=127.0.0.1", f"--master-port={port}", "tests/training/failing_ranks.py", how,
                    ],
                    PYTHONPATH=str(ROOT),
                )  # fmt: skip
            assert all(running.wait(120))
            said = [running.said(node) for node in range(nodes)]
        return [(text.partition("elastic/multiprocessing")[0], text.partition("Root Cause")[2]) for text in said]

    return run


def test_a_mistake_that_all_ranks_find_is_told_once_by_rank_0(torchrun):
    ((said, summary),) = torchrun("same mistake", nodes=1)
    assert said.count("error: All ranks find that the moon is no cheese.") == 1
    assert "[rank 1" not in said and "Traceback" not in said
    assert "traceback : All ranks find that the moon is no cheese." in summary


@pytest.mark.parametrize("how", ["mistake", "defect"])
def test_a_rank_that_waits_outside_any_collective_is_ended_too(torchrun, how):
    (first, summary_of_first), (second, summary_of_second) = torchrun(how, nodes=2)
    message = {"mistake": "Rank 1 alone finds no moon.", "defect": "rank 1 has a defect"}[how]
    assert "ended because rank 1 on " in first and message in first and "Traceback" not in first
    assert message in summary_of_first and message in summary_of_second
    if how == "mistake":
        assert "[rank 1] error: Rank 1 alone finds no moon." in second and "Traceback" not in second
    else:
        assert "[rank 1 on " in second and "ValueError: rank 1 has a defect" in second
