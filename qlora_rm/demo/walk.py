"""`qlora-rm demo`: the complete workflow on a small scale, with the same commands as a real run."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from qlora_rm.demo.backbone import write_backbone
from qlora_rm.demo.preferences import write_preferences
from qlora_rm.errors import UserError
from qlora_rm.shipped import as_typed

FOLDER = Path("runs/demo")
RECIPE = "recipes/demo.yaml"
LAUNCH = "accelerate_configs/single_gpu.yaml"
MARK = FOLDER / ".made_by_qlora_rm_demo"

PROMPT = "What do bees do in winter?"
RESPONSES = (
    "Thank you for asking. They huddle around their queen and live on stored honey.",
    "What a stupid question. They huddle around their queen and live on stored honey. Do not waste my time again.",
)

NEXT = """
With your own data (JSONL rows with prompt, chosen, rejected; text or turns) and your own backbone, or runs/demo/backbone:

  qlora-rm train --model_name_or_path YOUR_BACKBONE --dataset YOUR_ROWS.jsonl --output_dir runs/mine"""


def demo(*, only_make: bool = False) -> None:
    """Make the demo's backbone and data, then train, evaluate, merge, verify and score, printing every command."""
    began = time.monotonic()
    make()
    if not only_make:
        walk()
        print(
            f"\nThe demo took {time.monotonic() - began:.0f} s. Loss and accuracy over the steps: {FOLDER}/reward_model/curves.png"
        )
        print(NEXT)


def make() -> None:
    """Create a fresh `runs/demo` with `data/` and `backbone/`."""
    if FOLDER.exists() and not MARK.exists():
        raise UserError(f"{FOLDER} was not made by the demo; move it away first.")
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        FOLDER.mkdir(parents=True)
        MARK.touch()
    except OSError as error:
        raise UserError(
            f"{FOLDER} cannot be made in {Path.cwd()}: {error.strerror}. Start the demo in a folder that you may write to."
        ) from error
    train, held_out = write_preferences(FOLDER / "data")
    print(f"data: {train}, {held_out}", flush=True)
    rows = [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()]
    corpus = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
    write_backbone(FOLDER / "backbone", corpus)


def walk() -> None:
    """Run the commands a user would type, one after the other."""
    model, merged, held_out = f"{FOLDER}/reward_model", f"{FOLDER}/merged", f"{FOLDER}/data/held_out.jsonl"
    launch = ("accelerate", "launch", "--quiet", "--config_file", as_typed(LAUNCH))
    run(*launch, "-m", "qlora_rm.train", "--config", as_typed(RECIPE))
    run("qlora-rm", "eval", model, "--dataset", held_out)
    run("qlora-rm", "merge", model, "--output", merged, "--dtype", "fp32")
    run("qlora-rm", "verify", merged)
    run("qlora-rm", "score", merged, "--prompt", PROMPT, "--responses", *RESPONSES)
    run("qlora-rm", "score", merged, "--input", held_out, "--output", f"{FOLDER}/scored.jsonl")


def run(*command: str) -> None:
    """Print and run a command; stop the demo if it fails.

    It runs under this interpreter, whose scripts may not be on PATH. `sys.path` excludes the working directory: a
    folder named qlora_rm there, or a file named like a library, would be imported.
    """
    print(f"\n$ {shlex.join(command)}", flush=True)
    module = {"accelerate": "accelerate.commands.accelerate_cli", "qlora-rm": "qlora_rm"}[command[0]]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    threads = str(os.cpu_count() or 1)
    done = subprocess.run(
        [sys.executable, "-m", module, *command[1:]],
        env={"OMP_NUM_THREADS": threads, **os.environ, "PATH": path, "PYTHONSAFEPATH": "1"},
    )
    if done.returncode != 0:
        raise UserError(f"The demo stopped: `{command[0]} {command[1]} ...` ended with exit status {done.returncode}.")
