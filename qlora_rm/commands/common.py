"""Helpers that several commands share: the type of a command, the display of checks, and the loading of a model."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from qlora_rm.config import ScoringConfig
from qlora_rm.console import printable
from qlora_rm.options import read_options

Run = Callable[[argparse.Namespace], int | None]
"""A command's function: takes the parsed options and returns the exit status, None for 0."""

EVALUATED = ("dataset", "dataset_config", "dataset_split", "columns", "hh_turns", "on_bad_row", "max_row_bytes")
"""Options of `DataConfig` that select the rows to evaluate on."""


WIDTH = 48
"""Characters of the column with the checks' names; a few names are longer."""


def line_of(check: Any) -> str:
    """Return a check as a table line; control characters from the checked file are escaped."""
    word = "ok  " if check.ok else "FAIL" if check.checked else "????"
    return printable(f"{word}  {check.name.ljust(WIDTH)}  {check.detail}".rstrip())


def status_of(checks: list[Any]) -> int:
    """Return the exit status: 0 if all checks pass, 1 if one failed, else 2 if one could not run."""
    if any(check.checked and not check.ok for check in checks):
        return 1
    return 2 if any(not check.ok for check in checks) else 0


def load_model(options: argparse.Namespace) -> Any:
    """Load the `RewardModel` of the positional argument MODEL with the scoring options."""
    from qlora_rm.artifacts.load import RewardModel

    return RewardModel.load(options.model, **asdict(read_options(options, ScoringConfig)))
