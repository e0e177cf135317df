"""docs/reliability.md lists all existing attacks, and all were survived."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.attacks.page import FOLDER

PAGE = FOLDER.parents[1] / "docs" / "reliability.md"


def table() -> dict[str, list[int]]:
    """Return, by category: attacks, inputs tried, inputs survived."""
    rows = [
        line.strip("| \n").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:1] == "|"
    ]
    return {row[0]: [int(cell.replace(",", "")) for cell in row[1:]] for row in rows[2:]}


def test_all_were_survived():
    assert all(tried == survived > 0 for _, tried, survived in table().values())


@pytest.mark.long
@pytest.mark.slow
def test_the_page_counts_the_attacks_of_this_folder():
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", str(FOLDER)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.partition("::")[0] for line in listed.splitlines() if "::" in line and "test_page.py" not in line]
    counts: Counter[str] = Counter()
    for file, number in Counter(names).items():
        source = (FOLDER / Path(file).name).read_text(encoding="utf-8")
        counts[source.partition('\nCATEGORY = "')[2].partition('"')[0]] += number
    assert {category: row[0] for category, row in table().items()} == counts, (
        "python -m tests.attacks.page > docs/reliability.md"
    )
