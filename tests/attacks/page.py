"""Make docs/reliability.md: how many attacks of each category were tried, and how many the project survived.

python -m tests.attacks.page > docs/reliability.md
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

HEAD = """# Reliability

`tests/attacks/` holds the attacks that this project must survive: damaged checkpoints, foreign artifacts, hostile clients and
poisoned rows. An attack is survived where its test passes: the input is refused with a message, or handled without a wrong result.
`python -m tests.attacks.page` runs all of them and writes this page. To add one, write a test in the module of its category. An attack that cannot be tried as root counts no input.

| category | attacks | inputs tried | survived |
|---|---|---|---|
"""


def run(arguments: list[str]) -> list[dict]:
    """Run the attacks with pytest. Return one row for each.

    Arguments:
        arguments: for pytest, in addition to the folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", *arguments, str(FOLDER)]
        subprocess.run(command, env={**os.environ, "QLORA_RM_ATTACK_COUNTS": str(file)}, stdout=sys.stderr, check=False)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def page(rows: list[dict]) -> str:
    """Return the Markdown page for the rows that `run` returns."""
    by_category: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_category[row["category"]].append(row)
    lines = [
        f"| {category} | {len(of)} | {sum(row['tries'] for row in of):,} | {sum(row['tries'] for row in of if row['passed']):,} |"
        for category, of in sorted(by_category.items())
    ]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(run(sys.argv[1:])), end="")
