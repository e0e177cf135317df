"""The phases that the commands after training show."""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from qlora_rm import progress
from qlora_rm.cli import main
from tests.reward_models_for_tests import llama_adapter


@pytest.fixture(autouse=True)
def every_phase(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Show phases that end within two seconds, too."""
    opened = progress.Display.open

    def open_and_look(self: progress.Display, phase: progress.Phase) -> None:
        opened(self, phase)
        self.look()

    llama_adapter()  # made before output is captured
    capsys.readouterr()
    monkeypatch.setattr(progress, "SHOWN_AFTER", 0)
    monkeypatch.setattr(progress, "LINE_EVERY", 0)
    monkeypatch.setattr(progress.Display, "_watch", lambda *_: None)
    monkeypatch.setattr(progress.Display, "open", open_and_look)


def phases_of(said: str) -> list[str]:
    """Return the phases that print, in order."""
    assert "\r" not in said
    return [
        name
        for name, _ in groupby(re.findall(r"^([a-z ]+): [\d,]+ (?:of [\d,]+ \w+, \d|s so far)", said, re.MULTILINE))
    ]


def rows_of(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "What? ", "chosen": "Paris.", "rejected": "No."}\n' * 3, encoding="utf-8")
    return str(path)


def test_eval(tmp_path: Path, capsys: Any) -> None:
    assert main(["eval", str(llama_adapter()), "--dataset", rows_of(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert phases_of(said) == ["hashing", "loading and quantizing", "reading", "tokenizing", "evaluating"]
    assert "tokenizing: 0 of 3 rows, 0 %" in said, "the lines of the file are counted first"
    assert "tokenizing: 3 rows in 0 s" in said
    assert "evaluating: 0 of 6 sequences" in said


def test_merge_and_verify(tmp_path: Path, capsys: Any) -> None:
    merged = str(tmp_path / "merged")
    assert main(["merge", str(llama_adapter()), "--output", merged, "--dtype", "fp32"]) == 0
    said = capsys.readouterr().err
    assert [name for name in phases_of(said) if name != "hashing"] == ["merging", "verifying"]
    assert re.search(r"^merging: \d+ MB in 0 s$", said, re.MULTILINE)
    assert re.search(r"^verifying: 0 of \d+ weights", said, re.MULTILINE), "in place of transformers' bar"
    assert main(["verify", merged]) == 0
    said = capsys.readouterr().err
    assert phases_of(said) == ["verifying"]
    assert re.search(r"^verifying: 0 of \d+ sequences", said, re.MULTILINE)


def test_score(tmp_path: Path, capsys: Any) -> None:
    assert main(["score", str(llama_adapter()), "--input", rows_of(tmp_path), "--score_column", "s"]) == 0
    said = capsys.readouterr().err
    assert phases_of(said) == ["hashing", "loading and quantizing", "scoring"]
    assert "scoring: 3 rows in 0 s" in said


@pytest.mark.parametrize("command", ["eval", "score", "verify"])
def test_quiet_commands_print_results_only(tmp_path: Path, capsys: Any, command: str) -> None:
    rest = {"eval": ["--dataset", rows_of(tmp_path)], "score": ["--input", rows_of(tmp_path)], "verify": []}
    assert main([command, str(llama_adapter()), *rest[command], "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out
