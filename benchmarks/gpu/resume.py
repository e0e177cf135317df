"""Compare a run that was saved half-way and resumed with an uninterrupted run, by the adapter's bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu.models import checkpoint, preference_rows, tokenizer, write
from benchmarks.gpu.passes import free
from benchmarks.gpu.suite import Finding, Setting
from qlora_rm.artifacts.manifest import FILE_NAME
from qlora_rm.training.run import main as train

STEPS, HALF = 8, 4
TIMES = 4.0
"""Largest allowed distance of the resumed run from the uninterrupted one, in distances of two uninterrupted runs, where those
differ."""


def resume(setting: Setting, finding: Finding) -> None:
    """Run one command three times: uninterrupted, resumed from the first run's checkpoint, and uninterrupted again.

    All runs share one process, which compiles attention once.
    """
    finding.tolerance = (
        f"the same bits after {STEPS} steps and after {HALF} + {STEPS - HALF}; where two uninterrupted runs differ, {TIMES:g} "
        "times their largest difference"
    )
    through = trained(setting)
    resumed = setting.scratch / "resumed"
    name = f"checkpoint-{HALF}"
    shutil.copytree(through / name, resumed / name)
    run(setting, resumed, "--resume", "auto")
    again = setting.scratch / "again"
    run(setting, again)
    steps = json.loads((resumed / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    to_resumed, to_again = (differences(through, other) for other in (resumed, again))
    moved = differences(through / name, through)
    finding.result |= {
        "resumed to uninterrupted": to_resumed,
        "uninterrupted to uninterrupted": to_again,
        "largest step of the second half": moved["largest difference"],
    }
    finding.require(steps == STEPS, f"the resumed run ended at step {steps}")
    finding.require(moved["largest difference"] > 0, "the second half trained nothing")
    allowed = TIMES * to_again["largest difference"]
    same = to_resumed["same bits"] or (not to_again["same bits"] and to_resumed["largest difference"] <= allowed)
    finding.require(same, f"the resumed run ended elsewhere: {to_resumed}; two uninterrupted runs: {to_again}")


def trained(setting: Setting) -> Path:
    """Return the folder of the uninterrupted run, made once. Other parts use it too."""
    folder = setting.scratch / "through"
    if not (folder / FILE_NAME).exists():
        run(setting, folder)
    return folder


def run(setting: Setting, folder: Path, *more: str) -> None:
    """Run `qlora-rm train` in this process: 4 bit, LoRA with dropout, and defaults for everything that depends on the device."""
    backbone = checkpoint(setting, "llama")
    tokenizer(setting).save_pretrained(backbone)
    rows = "".join(json.dumps(row) + "\n" for row in preference_rows(96))
    options: dict[str, Any] = {
        "model_name_or_path": backbone, "dataset": write(setting.scratch / "rows.jsonl", rows), "output_dir": folder,
        "eval_fraction": 0.25, "eval_strategy": "no", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "learning_rate": 3e-3, "lora_dropout": 0.1, "max_steps": STEPS, "save_steps": HALF, "logging_steps": HALF,
        "disable_tqdm": True,
    }  # fmt: skip
    free()
    train([word for name, value in options.items() for word in (f"--{name}", str(value))] + list(more))


def differences(one: Path, other: Path) -> dict[str, Any]:
    """Return the differences of two adapters with their heads."""
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    return {
        "same bits": all(torch.equal(left[name], right[name]) for name in left),
        "largest difference": max(float((left[name] - right[name]).abs().max()) for name in left),
    }
