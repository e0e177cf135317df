"""Environments for readers that want other versions: packages in a folder of their own, put first on the path.

torch and all else come from the project's environment. The folders lie under build/, are named by what is in them, and
are made once.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "build" / "readers"


def overlay(name: str) -> Path:
    """The folder with the packages that `<name>.txt` pins; skips the test where pip cannot get them."""
    pins = HERE / f"{name}.txt"
    folder = FOLDER / f"{name}-{hashlib.sha256(pins.read_bytes()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(beside), "-r", str(pins)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        beside.rename(folder)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        shutil.rmtree(beside, ignore_errors=True)
        pytest.skip(f"pip could not install {pins.name}: {(error.stderr or str(error)).strip()[-200:]}")
    return folder


def run_in(packages: Path, script: Path, *words: str, timeout: int = 600) -> str:
    """Standard output of `script`, run under the packages of an overlay."""
    environment = os.environ | {
        "PYTHONPATH": str(packages),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
