"""Real launches of `train` on CPU ranks, as a user types them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def launch(config: str, flags: list[str], *more: str, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run what a user types, on the CPU ranks of `accelerate_configs/<config>.yaml` (two, unless changed by `more`)."""
    process = start(config, flags, *more, **how)
    try:
        said, warned = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, said, warned)


def start(
    config: str, flags: list[str], *more: str, script: str = "qlora_rm/train.py", **variables: str
) -> subprocess.Popen[str]:
    """Start the same without waiting for it."""
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        "--config_file",
        f"accelerate_configs/{config}.yaml",
        "--main_process_port=0",  # the next free port, so that concurrent launches do not collide
        *more,
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    return subprocess.Popen(
        [*command, script, *flags], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def short_run(backbone: str, rows: str, out: Path, **changes) -> list[str]:
    options = {
        "model_name_or_path": backbone, "dataset": rows, "eval_fraction": 0.25, "output_dir": out, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "max_steps": 8, "eval_steps": 4, "save_steps": 4, "bf16": False,
        "disable_tqdm": True, "logging_steps": 1,
    } | changes  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]
