"""The amount of output under --quiet and --verbose, from us and from libraries."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qlora_rm import console
from qlora_rm.cli import main
from qlora_rm.config import OutputConfig
from qlora_rm.options import output_asked

LIBRARIES = """
import logging, os, sys, warnings
from qlora_rm.libraries import quiet_libraries
quiet_libraries()
for name in ("peft.tuners", "accelerate.launch", "DeepSpeed"):
    logger = logging.getLogger(name)
    if name == "DeepSpeed": logger.setLevel(logging.WARNING)  # as DeepSpeed does when it is imported
    logger.warning("%s warns", name)
    logger.error("%s fails", name)
warnings.warn("call it otherwise", FutureWarning)
warnings.warn("two\\nlines", UserWarning)
print(os.environ.get("TRANSFORMERS_VERBOSITY"), os.environ["TQDM_DISABLE"], file=sys.stderr)
"""


def libraries(level: str, **variables: str) -> list[str]:
    environ = {
        name: value for name, value in os.environ.items() if name not in ("TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS")
    }
    environ |= {console.VERBOSITY: level} | variables
    done = subprocess.run([sys.executable, "-c", LIBRARIES], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.parametrize("level", ["normal", "quiet"])
def test_errors_come_through_and_notes_for_developers_do_not(level: str) -> None:
    said = libraries(level)
    assert said == [
        "peft.tuners fails",
        "accelerate.launch fails",
        "DeepSpeed fails",
        "warning: two lines (UserWarning, <string>:11)",
        "error 1",
    ]


def test_verbose_lets_the_libraries_speak() -> None:
    said = "\n".join(libraries("verbose"))
    for text in ("peft.tuners warns", "DeepSpeed warns", "FutureWarning: call it otherwise", "UserWarning: two\nlines"):
        assert text in said
    assert "None 1" in said, "bars stay off: they fill a log with carriage returns"


def test_what_the_user_has_set_stays() -> None:
    assert libraries("normal", TRANSFORMERS_VERBOSITY="info")[-1] == "info 1"


def test_quiet_keeps_warnings_and_results(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(console.VERBOSITY, "quiet")
    console.say("a note", "warning: look here", "another note")
    console.say_result("the result")
    assert capsys.readouterr().err == "warning: look here\nthe result\n"


@pytest.mark.parametrize(
    ("words", "file", "asked"),
    [
        ([], None, (False, False)),
        (["--quiet", "--max_steps", "3"], None, (True, False)),
        (["--max_steps", "3", "--verbose"], None, (False, True)),
        (["--config", "FILE"], "quiet: true\n", (True, False)),
        (["--config=FILE", "--quiet", "false"], "quiet: true\n", (False, False)),
        (["--config", "FILE"], "[a, list]\n", (False, False)),
        (["--config", "FILE", "--quiet"], "a: [", (False, False)),  # the full parser reports the error
        (["--config", "nowhere.yaml"], None, (False, False)),
    ],
)
def test_train_is_asked_before_its_libraries_are_loaded(
    tmp_path: Path, words: list[str], file: str | None, asked: tuple[bool, bool]
) -> None:
    path = tmp_path / "run.yaml"
    if file is not None:
        path.write_text(file, encoding="utf-8")
    assert output_asked([word.replace("FILE", str(path)) for word in words]) == OutputConfig(*asked)


@pytest.mark.parametrize("command", ["eval x", "verify x", "train", "plan", "serve x", "demo"])
def test_quiet_and_verbose_exclude_each_other(command: str, capsys: Any) -> None:
    assert main([*command.split(), "--quiet", "--verbose"]) == 2
    assert capsys.readouterr().err == "error: Give --quiet or --verbose, not both.\n"


def test_a_command_is_quiet_and_what_comes_after_is_not(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []

    def demo(**_: Any) -> None:
        levels.append((console.verbosity(), os.environ.get(console.VERBOSITY)))

    monkeypatch.delenv(console.VERBOSITY, raising=False)
    monkeypatch.setattr("qlora_rm.demo.walk.demo", demo)
    for words in (["demo", "--quiet"], ["demo", "--verbose"], ["demo"]):
        assert main(words) == 0
    assert levels == [("quiet", "quiet"), ("verbose", "verbose"), ("normal", None)]
