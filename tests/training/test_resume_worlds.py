"""A checkpoint resumed by another number of processes: the same pairs in every step, and the same result."""

import json
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qlora_rm.training.checkpoints import checkpoints, is_whole
from tests.launching import launch, short_run, start
from tests.training.recorded_train import recorded

pytestmark = [pytest.mark.slow, pytest.mark.long]

# two epochs of 72 comparisons in steps of 10: the last step of each has two, and is padded
RUN = {
    "per_device_train_batch_size": 5,
    "max_steps": 16,
    "save_steps": 8,
    "eval_steps": 8,
    "share_prefix": "false",
    "resume": "auto",
}


@pytest.fixture(scope="module")
def flags_of(backbone_folder, rows_file):
    return lambda out, **changes: short_run(backbone_folder, rows_file, out, **RUN | changes)


@pytest.fixture(scope="module")
def through(forks, flags_of, tmp_path_factory):
    """An uninterrupted run of one process: its adapter, and what each step saw."""
    folder = tmp_path_factory.mktemp("through")
    ended = forks.run(flags_of(folder / "out", gradient_accumulation_steps=2), record=str(folder))
    assert ended.status == 0, ended.said
    return load_file(folder / "out/adapter_model.safetensors"), recorded(folder)


def farthest(out: Path, through) -> float:
    adapter = load_file(out / "adapter_model.safetensors")
    assert adapter.keys() == through.keys()
    return max((adapter[name] - weight).abs().max().item() for name, weight in through.items())


def test_every_pair_once_an_epoch(through):
    steps = through[1]
    assert [len(steps[step]) for step in range(1, 17)] == 2 * [*7 * [20], 4]
    for epoch in (range(1, 9), range(9, 17)):
        seen = [ids for step in epoch for ids in steps[step]]
        assert len(set(seen)) == len(seen) == 2 * 72
    assert steps[1] != steps[9]


def test_one_process_two_told_to_end_by_their_launcher_and_one_again(forks, flags_of, through, tmp_path):
    out, record = tmp_path / "out", tmp_path / "record"
    record.mkdir()
    ended = forks.run(flags_of(out, gradient_accumulation_steps=2), record=str(record), end_at=["training_step", 9])
    assert ended.status == 143 and [path.name for path in checkpoints(str(out))] == ["checkpoint-5"]
    two = start(
        "cpu_ddp", flags_of(out, gradient_accumulation_steps=2), script="tests/training/recorded_train.py", PAUSE="0.5",
        RECORD=str(tmp_path),
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while max(recorded(tmp_path), default=0) < 10 and two.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    two.send_signal(signal.SIGTERM)
    said = two.communicate(timeout=120)[1]
    assert two.returncode != 0
    assert "gradient accumulation: 1 instead of 2, so that 2 x 5 comparisons at once make a step of 10" in said
    assert said.count("stopped by SIGTERM. The last complete checkpoint is") == 1, said
    last = checkpoints(str(out))[-1]
    assert is_whole(last) and last.name not in ("checkpoint-5", "checkpoint-8")
    flushed = [json.loads(line) for line in (tmp_path / "flushed").read_text().splitlines()]
    assert flushed and all("rng_state_1.pth" in names for names in flushed)  # the other process writes it
    assert forks.run(flags_of(out, gradient_accumulation_steps=2), record=str(record)).status == 0
    steps = recorded(record)
    for step, seen in recorded(tmp_path).items():
        assert step not in steps, f"step {step} was taken twice"
        steps[step] = seen
    assert steps == through[1]
    assert farthest(out, through[0]) < 1e-5


@pytest.mark.parametrize(("engine", "before", "after", "best"), [("zero2", 2, 1, 16), ("zero3", 1, 2, 8)])
def test_deepspeed_goes_on_with_another_number_of_processes(flags_of, through, tmp_path, engine, before, after, best):
    """SIGTERM reaches one process, and the other saves at the same step. The universal form is made once and kept.

    At the end they load the best step's weights, saved by the same or by the other number of processes.
    """
    out, steps = tmp_path / "out", {}
    load_best = {"load_best_model_at_end": True, "greater_is_better": best == 8}
    for processes, end_at in ((before, "11"), (after, "")):
        record = tmp_path / str(processes)
        record.mkdir()
        done = launch(
            f"cpu_{engine}", flags_of(out, gradient_accumulation_steps=2 // before, engine=engine, **load_best), "--num_processes", str(processes),
            script="tests/training/recorded_train.py", RECORD=str(record), END_AT=end_at,
        )  # fmt: skip
        if end_at:
            assert done.returncode != 0 and "checkpoint-11; go on with --resume auto" in done.stderr, done.stderr[
                -5000:
            ]
        else:
            assert done.returncode == 0, done.stderr[-5000:]
            assert f"checkpoint-11 of {before} processes for {after}" in done.stderr
            assert f"engine: {engine}, {after} process" in done.stderr
        steps |= recorded(record)
    assert steps == through[1]
    assert farthest(out / "checkpoint-16", through[0]) < 1e-5
    assert farthest(out, load_file(out / f"checkpoint-{best}/adapter_model.safetensors")) < 1e-7


def test_a_process_killed_in_a_save_leaves_the_checkpoint_before(flags_of, through, tmp_path):
    """The other process does not wait forever, and what the two had written for the last step is not used."""
    out = tmp_path / "out"
    flags, record = flags_of(out, gradient_accumulation_steps=1), {"RECORD": str(tmp_path)}
    killed = launch("cpu_zero3", flags, script="tests/training/recorded_train.py", KILL_IN_SAVE="16", **record)
    assert killed.returncode != 0 and "stopped by SIGTERM" not in killed.stderr
    assert list((out / "checkpoint-16").rglob("*optim_states.pt")) and not is_whole(out / "checkpoint-16")
    done = launch("cpu_zero3", flags, script="tests/training/recorded_train.py", **record)
    assert done.returncode == 0 and "checkpoint-8\n" in done.stderr, done.stderr[-5000:]
    assert is_whole(out / "checkpoint-16")
    assert farthest(out, through[0]) < 1e-5
