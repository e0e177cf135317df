"""Make environments for consumers that need other versions: packages in a separate folder, first on the path.

torch and everything else come from the project's environment. The folders are under build/, are named by a hash of their pins,
and are made once.
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
    """Return the folder with the packages that `<name>.txt` pins. Skips the test if pip cannot install them."""
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
    """Run `script` with the packages of an overlay, and return its standard output."""
    environment = os.environ | {
        "PYTHONPATH": str(packages),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
