"""Run named parts under one time budget. The report is written after every part, so that a cut-off run leaves one too."""

import json
import os
import platform
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlora_rm.artifacts.manifest import library_versions

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Setting:
    """Where a run of the check computes.

    Attributes:
        device: "cuda" or "cpu".
        scratch: a folder for models and runs.
        small: shapes that a CPU computes in seconds.
    """

    device: str
    scratch: Path
    small: bool

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


@dataclass
class Finding:
    """The results of a part, filled while it runs, so that a part that is cut off keeps its results so far.

    Attributes:
        tolerance: what is allowed, in words with figures.
        result: figures by name.
        faults: requirements that failed.
    """

    tolerance: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def require(self, condition: bool, fault: str) -> None:
        if not condition:
            self.faults.append(fault)


class Skipped(Exception):
    """A part does not apply here. The message says why."""


class OutOfTime(Exception):
    """The time budget of the run is used up."""


Run = Callable[[Setting, Finding], None]


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        seconds: expected time on a GPU.
    """

    name: str
    seconds: float
    run: Run


class Suite:
    """Runs parts and keeps their report in a file.

    Arguments:
        budget: seconds for all parts together.
    """

    def __init__(self, setting: Setting, output: Path, budget: float):
        self.setting, self.output, self.ends = setting, output, time.monotonic() + budget
        self.report: dict[str, Any] = {
            "benchmark": "gpu_check",
            "form": "gpu" if setting.on_gpu else "cpu",
            "ok": False,
            "complete": False,
            "budget_seconds": budget,
            "machine": machine(setting),
            "parts": {},
        }

    def run(self, parts: Sequence[Part]) -> bool:
        """Run the parts in order. Return whether all applicable parts passed."""
        began = time.monotonic()
        for part in parts:
            self.report["parts"][part.name] = entry = self._run(part)
            self.report["seconds"] = round(time.monotonic() - began, 1)
            self._write()
            reason = f" ({entry['reason']})" if "reason" in entry else ""
            print(f"{part.name:10} {entry['status']}, {entry['seconds']:.0f} s{reason}", flush=True)
        states = {entry["status"] for entry in self.report["parts"].values()}
        self.report["complete"] = not {"not begun", "cut off"} & states
        self.report["ok"] = self.report["complete"] and "failed" not in states
        self._write()
        return bool(self.report["ok"])

    def _run(self, part: Part) -> dict[str, Any]:
        finding, left = Finding(), self.ends - time.monotonic()
        entry: dict[str, Any] = {"status": "passed", "seconds": 0.0, "stated_seconds": part.seconds}
        if left < part.seconds / 2:
            return entry | {"status": "not begun", "reason": f"{max(left, 0):.0f} s of the budget were left"}
        began = time.monotonic()
        try:
            with ended_after(left):
                part.run(self.setting, finding)
        except Skipped as reason:
            entry |= {"status": "skipped", "reason": str(reason)}
        except OutOfTime:
            entry |= {"status": "cut off", "reason": "the budget was used up"}
        except Exception as error:
            traceback.print_exc()
            finding.faults.append(f"{type(error).__name__}: {str(error)[:500]}")
        if finding.faults:
            entry |= {"status": "failed", "reason": finding.faults[0], "faults": finding.faults}
        entry["seconds"] = round(time.monotonic() - began, 1)
        return entry | {"tolerance": finding.tolerance, "result": finding.result}

    def _write(self) -> None:
        """Write the report atomically, because another process may read it at any time."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        beside = self.output.with_suffix(".part")
        beside.write_text(json.dumps(rounded(self.report), indent=1) + "\n", encoding="utf-8")
        beside.replace(self.output)


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread after `seconds`."""

    def end(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rounded(value: Any) -> Any:
    """Round floats to four significant digits, at any depth."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine(setting: Setting) -> dict[str, Any]:
    """Return GPU, driver, versions, and the tested commit."""
    facts: dict[str, Any] = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "versions": library_versions(),
        "cpu_cores": os.cpu_count(),
    }
    if setting.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": properties.total_memory / 1e9,
            "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        }
    return facts


def commit() -> str:
    """Return the commit of the checkout, with `-dirty` if files differ from it, or QLORA_RM_COMMIT without a repository."""
    found = said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return found or os.environ.get("QLORA_RM_COMMIT", "unknown")


def said_by(*command: str) -> str:
    """Return the output of a command, or nothing if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout.strip() if done.returncode == 0 else ""
