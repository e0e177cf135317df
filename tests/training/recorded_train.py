"""Script that runs `qlora-rm train`, records the comparisons of each optimizer step, and ends where a test asks for it.

Environment: RECORD, a folder; END_AT, a step in whose first forward pass the last process sends itself SIGTERM;
KILL_IN_SAVE, a step in whose save the first process is killed after the optimizer is written; PAUSE, seconds to wait in
forward passes. The last process writes its part of a checkpoint late, and what the first one flushes is recorded too.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from qlora_rm.cli import main
from qlora_rm.training import checkpoints, resumable, run
from qlora_rm.training.trainer import PreferenceTrainer


class Recorded(PreferenceTrainer):
    """Writes a line for each micro-batch: the step, and the token ids of its comparisons' sequences."""

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        step, rank = self.state.global_step + 1, self.args.process_index
        counting = (inputs["weight"] > 0)[inputs["comparison"]].tolist()
        rows = zip(inputs["input_ids"], inputs["attention_mask"], counting, strict=True)
        seen = [ids[mask.bool()].tolist() for ids, mask, counts in rows if counts]
        with (Path(os.environ["RECORD"]) / f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps([step, seen]) + "\n")
        if os.environ.get("END_AT") == str(step) and rank == self.args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return super().training_step(model, inputs, *more)

    def _save_rng_state(self, output_dir: str) -> None:
        if os.environ.get("KILL_IN_SAVE") == str(self.state.global_step) and self.args.process_index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if 0 < self.args.process_index == self.args.world_size - 1:
            time.sleep(0.2)
        super()._save_rng_state(output_dir)


def noting_flush(folder: Path) -> None:
    names = sorted(path.name for path in folder.rglob("*"))
    with (Path(os.environ["RECORD"]) / "flushed").open("a") as file:
        file.write(json.dumps(names) + "\n")
    checkpoints.flush(folder)


def record() -> None:
    run.PreferenceTrainer = Recorded
    resumable.flush = noting_flush


def recorded(folder: Path) -> dict[int, list[tuple[int, ...]]]:
    """Return the sequences that each optimizer step saw, over all processes, sorted."""
    steps: dict[int, list[tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            step, seen = json.loads(line)
            steps.setdefault(step, []).extend(map(tuple, seen))
    return {step: sorted(seen) for step, seen in steps.items()}


if __name__ == "__main__":
    record()
    sys.exit(main(["train", *sys.argv[1:]]))
