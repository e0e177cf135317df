"""Run the demo with the commands that a user types: data, backbone, training, evaluation, merge, verify, score."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.suite import ROOT, Finding, Setting

LEAST = 0.9
"""Held-out accuracy that the demo's recipe states."""
SCRIPTS = {
    "qlora-rm": "from qlora_rm.cli import main",
    "accelerate": "from accelerate.commands.accelerate_cli import main",
}


def demo(setting: Setting, finding: Finding) -> None:
    """Run the demo in a separate folder, with links to the checkout's recipes and package."""
    finding.tolerance = f"every command ends with status 0; held-out accuracy at least {LEAST:g}"
    folder = setting.scratch / "demo"
    folder.mkdir()
    for name in ("recipes", "qlora_rm"):
        (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), str(scripts(folder / "bin"))]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
    }
    if not setting.on_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "qlora_rm.cli", "demo"]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    said: list[str] = []
    try:
        for line in process.stdout or ():
            said.append(line)
            sys.stdout.write(line)
        status = process.wait()
    finally:
        if process.poll() is None:  # cut off
            os.killpg(process.pid, 15)
        finding.result["commands"] = [line[2:].split()[:2] for line in said if line.startswith("$ ")]
    finding.require(status == 0, f"the demo ended with status {status}: {''.join(said)[-500:]}")
    state = folder / "runs/demo/reward_model/trainer_state.json"
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"] if state.exists() else []
    accuracies = [line["eval_accuracy"] for line in history if "eval_accuracy" in line]
    finding.result |= {
        "held-out accuracy": accuracies[-1] if accuracies else None,
        "seconds": next((float(found[1]) for found in map(TOOK.search, said) if found), None),
        "device": next((found[1] for found in map(ENGINE.search, said) if found), None),
    }
    finding.require(bool(accuracies) and accuracies[-1] >= LEAST, f"held-out accuracy {accuracies[-1:]}")


TOOK = re.compile(r"The demo took (\d+) s")
ENGINE = re.compile(r"^engine: (.*)")


def scripts(folder: Path) -> Path:
    """Write the commands that the demo starts, for a host whose libraries are on the path without their scripts.

    The folder goes last on the path.
    """
    folder.mkdir()
    for name, line in SCRIPTS.items():
        script = folder / name
        script.write_text(f"#!{sys.executable}\nimport sys\n\n{line}\n\nsys.exit(main())\n", encoding="utf-8")
        script.chmod(0o755)
    return folder
