"""The GPU check, tested without a GPU: its budget, its report, and its code on a simulated GPU."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu import packed
from benchmarks.gpu.suite import ROOT, Finding, Part, Setting, Skipped, Suite
from tests import pretended_gpu
from tests.deep import only_deep


def sound(setting: Setting, finding: Finding) -> None:
    finding.tolerance, finding.result["figure"] = "none", 1 / 3


def wrong(setting: Setting, finding: Finding) -> None:
    finding.require(False, "too far")


def raising(setting: Setting, finding: Finding) -> None:
    raise ValueError("what went wrong")


def left_out(setting: Setting, finding: Finding) -> None:
    raise Skipped("not here")


def endless(setting: Setting, finding: Finding) -> None:
    finding.result["so far"] = 1
    time.sleep(60)


@pytest.fixture
def run(tmp_path):
    def run(*parts: Part, budget: float = 10.0) -> dict:
        output = tmp_path / "results" / "report.json"
        passed = Suite(Setting("cpu", tmp_path, small=True), output, budget).run(parts)
        report = json.loads(output.read_text())
        assert report["ok"] == passed
        return report

    return run


def test_the_report_names_machine_commit_tolerance_and_figures(run):
    report = run(Part("sound", 1, sound), Part("left out", 1, left_out))
    assert report["ok"] and report["complete"] and report["form"] == "cpu"
    assert report["machine"]["torch"] == torch.__version__ and report["machine"]["commit"]
    assert report["parts"]["sound"]["tolerance"] == "none" and report["parts"]["sound"]["result"] == {"figure": 0.3333}
    assert report["parts"]["left out"]["status"] == "skipped" and report["parts"]["left out"]["reason"] == "not here"


@pytest.mark.parametrize(("part", "reason"), [(wrong, "too far"), (raising, "ValueError: what went wrong")])
def test_a_failed_part_fails_the_run_and_keeps_no_other_from_running(run, part, reason):
    report = run(Part("bad", 1, part), Part("sound", 1, sound))
    assert not report["ok"] and report["complete"]
    assert (report["parts"]["bad"]["status"], report["parts"]["bad"]["reason"]) == ("failed", reason)
    assert report["parts"]["sound"]["status"] == "passed"


@pytest.mark.slow
def test_a_run_that_is_cut_off_leaves_what_it_had(run):
    began = time.monotonic()
    report = run(Part("sound", 0.1, sound), Part("endless", 1, endless), Part("late", 5, sound), budget=1.0)
    assert time.monotonic() - began < 10
    states = {name: part["status"] for name, part in report["parts"].items()}
    assert states == {"sound": "passed", "endless": "cut off", "late": "not begun"}
    assert report["parts"]["endless"]["result"] == {"so far": 1}
    assert not report["ok"] and not report["complete"]


def test_the_stated_times_fit_the_budget():
    assert sum(part.seconds for part in gpu_check.PARTS) <= gpu_check.BUDGET < 480


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert gpu_check.main(["--output", str(tmp_path / "report.json")]) == 0
    assert "skipped: no GPU here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_cpu_form_compares_forests_and_finds_a_wrong_one(tmp_path, monkeypatch):
    """For one architecture with a window, the comparison passes, and fails if forests end in other tokens."""
    every = packed.configs
    monkeypatch.setattr(packed, "configs", lambda size: {"mistral": every(size)["mistral"]})

    def status() -> str:
        gpu_check.main(["--cpu", "--only", "packed", "--output", str(tmp_path / "report.json")])
        return json.loads((tmp_path / "report.json").read_text())["parts"]["packed"]["status"]

    assert status() == "passed"
    forest = packed.forest_batch

    def wrong_ends(ids, *more):
        return forest([[*one[:-1], one[0]] for one in ids], *more)

    monkeypatch.setattr(packed, "forest_batch", wrong_ends)
    assert status() == "failed"


@only_deep
@pytest.mark.slow
def test_on_a_pretended_gpu_every_tensor_follows_the_model(tmp_path):
    """Load, use FlexAttention (uncompiled) and experts, train, resume, merge and verify on a device that rejects CPU
    tensors."""
    if reason := pretended_gpu.why_not():
        pytest.skip(reason)
    report = tmp_path / "report.json"
    parts = ["experts", "resume", "artefact"]
    command = [sys.executable, "-m", "tests.pretended_gpu", "benchmarks.gpu_check", "--small", "--output", str(report)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--only", *parts], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(report.read_text())
    assert found["form"] == "gpu" and found["machine"]["gpu"] == pretended_gpu.NAME
    assert {name: part["status"] for name, part in found["parts"].items()} == dict.fromkeys(parts, "passed")
