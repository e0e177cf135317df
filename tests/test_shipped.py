"""Recipes and launch configurations are found by name from any folder, and can be copied for editing."""

from pathlib import Path
from typing import Any

import pytest

from qlora_rm.cli import main
from qlora_rm.demo import walk
from qlora_rm.shipped import FOLDERS, as_typed, here_or_shipped
from qlora_rm.training.arguments import parse

ROOT = Path(__file__).resolve().parents[1]


def test_named_as_a_command_there_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert as_typed("recipes/demo.yaml") == "recipes/demo.yaml"
    monkeypatch.chdir(tmp_path)
    assert as_typed("recipes/demo.yaml") == str(ROOT / "recipes/demo.yaml")


def test_a_recipe_is_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse(["--config", "recipes/demo.yaml"]).training.max_length == 256
    assert f"recipes/demo.yaml: not in this folder, taken from {ROOT}" in capsys.readouterr().err
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/demo.yaml").write_text("max_length: 99\n", encoding="utf-8")
    assert parse(["--config", "recipes/demo.yaml"]).training.max_length == 99
    assert "taken from" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["demo.yaml", "recipes/none.yaml", "recipes", "/recipes/demo.yaml", "../pyproject.toml"]
)
def test_no_other_file_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert here_or_shipped(name) == Path(name)


def test_copied_whole_and_over_nothing(tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "a folder 文件夹"
    assert main(["recipes", "--copy_to", str(target)]) == 0
    for folder in FOLDERS:
        copied = {
            path.relative_to(target): path.read_bytes() for path in (target / folder).rglob("*") if path.is_file()
        }
        assert copied and all((ROOT / name).read_bytes() == content for name, content in copied.items())
    mine = target / "recipes/demo.yaml"
    mine.write_text("max_length: 99\n", encoding="utf-8")
    (target / "recipes/kwise.yaml").unlink()
    assert main(["recipes", "--copy_to", str(target)]) == 2
    assert f"{mine} exists and differs" in capsys.readouterr().err
    assert not (target / "recipes/kwise.yaml").exists(), "nothing is copied where something is in the way"
    mine.unlink()
    assert main(["recipes", "--copy_to", str(target)]) == 0
    assert capsys.readouterr().out.startswith("2 files copied to ")


@pytest.mark.parametrize("where", ["file", "/proc"])
def test_a_demo_that_cannot_write_here_says_so(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path if where == "file" else where)
    if where == "file":
        (tmp_path / "runs").touch()
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.startswith(f"error: runs/demo cannot be made in {Path.cwd()}: ")


@pytest.mark.slow
def test_the_demo_runs_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses this interpreter, whose scripts need not be on PATH, and ignores modules in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qlora_rm").mkdir()
    (tmp_path / "qlora_rm/__init__.py").write_text("raise SystemExit(9)\n", encoding="utf-8")
    monkeypatch.setenv("PATH", "/nonexistent")
    walk.run("qlora-rm", "--version")
    walk.run("accelerate", "launch", "--quiet", "-m", "qlora_rm.train", "--help")
    ran: list[Any] = []
    monkeypatch.setattr(walk, "run", lambda *command: ran.append(command))
    walk.walk()
    assert ran[0][-2:] == ("--config", str(ROOT / "recipes/demo.yaml"))
