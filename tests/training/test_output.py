"""The output of a real run whose standard error is a file."""

import os
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from qlora_rm.training.arguments import parse
from qlora_rm.training.summary import next_commands
from tests.said import unknown

ROOT = Path(__file__).resolve().parents[2]
SHOW_ALL = """
import sys
from qlora_rm import progress
progress.SHOWN_AFTER = 0
at_once = progress.Display.open
def open(self, phase):
    at_once(self, phase)
    self.look()
progress.Display.open = open
from qlora_rm.cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""
"""Runs the train command, and shows even phases that end within two seconds."""
PHASES = ["starting", "reading", "tokenizing", "loading and quantizing", "training", "evaluating", "golden scores"]

pytestmark = [pytest.mark.slow, pytest.mark.long]


def run(words: list[str], tmp_path: Path) -> tuple[str, str]:
    """Return standard output and error of a run, captured in files."""
    names = tmp_path / "stdout", tmp_path / "stderr"
    quiet = {"TRANSFORMERS_VERBOSITY", "TQDM_DISABLE", "PYTHONWARNINGS"}  # users do not set these
    environ = {name: value for name, value in os.environ.items() if name not in quiet}
    with names[0].open("wb") as out, names[1].open("wb") as err:
        done = subprocess.run([sys.executable, "-c", SHOW_ALL, *words], stdout=out, stderr=err, cwd=ROOT, env=environ)
    said, told = (name.read_bytes().decode() for name in names)
    assert done.returncode == 0, told
    assert "\r" not in said + told
    return said, told


def phases_of(told: str) -> list[str]:
    """Return the phases that print, in order, without repetitions."""
    phase = rf"^({'|'.join(PHASES)}): (?!\d+ comparisons)\d"  # "training: 72 comparisons" reports what was read
    found = re.findall(phase, told, re.MULTILINE)
    return [name for name, _ in groupby(found)]


def test_a_run_prints_its_phases_and_a_table_and_nothing_else(flags: Any, tmp_path: Path) -> None:
    said, told = run(flags(disable_tqdm=None, dataloader_num_workers=1, max_length=256), tmp_path)
    assert said == ""
    assert unknown(told) == [], "lines that are none of ours"
    phases = phases_of(told)
    assert [name for name in PHASES if name in phases] == PHASES
    assert phases[:5] == PHASES[:5]
    assert phases[-1] == "golden scores"
    assert re.search(r"^training: \d of 8 steps, \d+ %", told, re.MULTILINE)
    lines = told.splitlines()
    assert [line for line in lines if line.startswith("step ")] != []
    end = lines[lines.index("", lines.index("training on 72 comparisons")) + 1 :]
    assert re.fullmatch(r"held-out accuracy +\d\.\d{4}, 95 % interval \d\.\d{4} to \d\.\d{4}", end[0])
    assert re.fullmatch(r"held-out comparisons +24 with 24 ordered pairs", end[2])
    assert end[5].split() == ["reward", "model", str(tmp_path / "out")]
    assert [line.split()[1] for line in end[8:]] == ["eval", "merge", "verify", "score"]


def test_a_quiet_run_prints_its_result(flags: Any, tmp_path: Path) -> None:
    said, told = run([*flags(disable_tqdm=None, max_steps=2, max_length=256), "--quiet"], tmp_path)
    assert said == ""
    assert told.startswith("\nheld-out accuracy")
    assert phases_of(told) == []
    assert len(told.splitlines()) == 13


def test_a_verbose_run_prints_its_log_too(flags: Any, tmp_path: Path) -> None:
    _, told = run([*flags(disable_tqdm=None, max_steps=2), "--verbose"], tmp_path)
    assert re.search(r"^step 2: loss \S+, grad_norm \S+, learning_rate ", told, re.MULTILINE)
    assert [name for name in PHASES if name in phases_of(told)] == PHASES
    assert "next:" in told


@pytest.mark.parametrize(
    ("flags", "evaluation"),
    [
        ([], ["--dataset", "HELD_OUT_ROWS.jsonl"]),
        (
            ["--eval_dataset", "held out.jsonl", "--columns", "prompt=q", "--hh_turns", "true"],
            ["--dataset", "held out.jsonl", "--columns", "prompt=q", "--hh_turns"],
        ),
        (["--eval_split", "test"], ["--dataset", "rows.jsonl", "--dataset_split", "test"]),
    ],
)
def test_what_to_type_next(flags: list[str], evaluation: list[str]) -> None:
    options = parse(["--model_name_or_path", "x", "--dataset", "rows.jsonl", "--output_dir", "runs/one", *flags])
    commands = next_commands(options, "runs/one")
    assert commands[0] == ["qlora-rm", "eval", "runs/one", *evaluation]
    assert commands[1] == ["qlora-rm", "merge", "runs/one", "--output", "runs/one_merged"]
    assert commands[2] == ["qlora-rm", "verify", "runs/one_merged"]
    whole = parse(["--model_name_or_path", "x", "--no_use_lora", "--trust_remote_code", "true"])
    assert [words[1:3] for words in next_commands(whole, "out")] == [
        ["eval", "out"],
        ["verify", "out"],
        ["score", "out"],
    ]
    assert all(words[-1] == "--trust_remote_code" for words in next_commands(whole, "out"))
