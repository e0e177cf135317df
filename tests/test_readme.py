"""The README's commands are the ones the demo runs, and its names exist."""

import re
import shlex
from pathlib import Path

import pytest

from qlora_rm.demo import walk
from qlora_rm.training.arguments import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    ")]


def test_every_command_is_one_the_demo_or_the_makefile_runs(monkeypatch):
    """`make demo` and `make test` run before every merge; other README commands must be among those that they run."""
    ran = []
    monkeypatch.setattr(walk, "run", lambda *command: ran.append(list(command)))
    walk.walk()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert COMMANDS
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] in ("git", "source"):
            continue
        assert (words in ran) or (words[0] == "make" and words[1] in targets), command


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?:recipes|accelerate_configs|docs)/[\w./]*\w", README))))
def test_files_it_names_exist(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_read_by_the_door_they_are_for(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = parse(["--config", str(recipe), "--bf16", "False", "--report_to", "none"])
    assert options.data.dataset and options.backbone.model_name_or_path
