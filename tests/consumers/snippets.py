"""Run the code of a model card, unchanged."""

import re
from pathlib import Path
from typing import Any


def run_snippet(folder: Path, reader: str, **given: Any) -> dict[str, Any]:
    """Execute the card's Python for the consumer `reader` in `folder`, and return its names.

    Arguments:
        given: names that the snippet expects from the user.
    """
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(rf"### {re.escape(reader)}: .*?```python\n(.*?)```", card, re.DOTALL)
    assert code, f"{folder}/README.md has no Python for {reader}"
    names = dict(given)
    exec(compile(code[1], f"card for {reader}", "exec"), names)
    return names
