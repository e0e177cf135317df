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


def lines_of(checks: list[Any]) -> list[str]:
    """Checks as lines of a table."""
    width = max(len(check.name) for check in checks)
    return [printable(f"{'ok  ' if c.ok else 'FAIL'}  {c.name.ljust(width)}  {c.detail}".rstrip()) for c in checks]


def load_model(options: argparse.Namespace) -> Any:
    """The `RewardModel` of the positional MODEL under the scoring options."""
    from qlora_rm.artifacts.load import RewardModel

    return RewardModel.load(options.model, **asdict(read_options(options, ScoringConfig)))
