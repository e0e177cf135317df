"""Count the attacks of this folder for docs/reliability.md.

Each module names its `CATEGORY`. Each test case is one attack. A test that tries many inputs calls `tries(number)`.
`python -m tests.attacks.page > docs/reliability.md` runs them all and writes the page.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

COUNTS = "QLORA_RM_ATTACK_COUNTS"
"""Environment variable with the file to which counts are written, if any."""


@pytest.fixture
def tries(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Report how many inputs this test tried. Without a call, it counts as one."""
    return lambda number: record_property("tries", number)


class Counter:
    """Writes one JSON line for each attack that ran: category, test, inputs tried, and whether the project survived them."""

    def __init__(self, file: Path):
        self.file = file
        self.categories: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.categories = {
            item.nodeid: item.module.CATEGORY
            for item in items
            if isinstance(item, pytest.Function) and hasattr(item.module, "CATEGORY")
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.nodeid not in self.categories or (
            report.when != "call" and not report.failed
        ):  # xdist's controller has no items
            return
        number = 0 if report.skipped else next((value for name, value in report.user_properties if name == "tries"), 1)
        row = {
            "category": self.categories[report.nodeid],
            "test": report.nodeid,
            "tries": number,
            "passed": report.passed,
        }
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if file := os.environ.get(COUNTS):
        config.pluginmanager.register(Counter(Path(file)))


def contents_of(folder: Path) -> dict[str, bytes | str]:
    """Return the content of every file and link below a folder, to compare before and after an attack."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes()
    return found
