"""What several doors share: the shape of a command, and how checks and models are shown and loaded."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from qlora_rm.config import ScoringConfig
from qlora_rm.console import printable
from qlora_rm.options import read_options

Run = Callable[[argparse.Namespace], int | None]
"""What a command does with its options; the exit status, None for 0."""

EVALUATED = ("dataset", "dataset_config", "dataset_split", "columns", "hh_turns", "on_bad_row", "max_row_bytes")
"""Options of `DataConfig` that say which rows to measure on."""


WIDTH = 48
"""Characters of the longest name of a check but for a few."""


def line_of(check: Any) -> str:
    """A check as a line of a table. What comes from a file under test is printed without control characters."""
    word = "ok  " if check.ok else "FAIL" if check.checked else "????"
    return printable(f"{word}  {check.name.ljust(WIDTH)}  {check.detail}".rstrip())


def status_of(checks: list[Any]) -> int:
    """The exit status: 0 where all checks hold, 1 where one failed, 2 where one could not be made."""
    if any(check.checked and not check.ok for check in checks):
        return 1
    return 2 if any(not check.ok for check in checks) else 0


def load_model(options: argparse.Namespace) -> Any:
    """The `RewardModel` of the positional MODEL under the scoring options."""
    from qlora_rm.artifacts.load import RewardModel

    return RewardModel.load(options.model, **asdict(read_options(options, ScoringConfig)))
