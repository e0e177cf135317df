"""The code of a model card, run as it stands there."""

import re
from pathlib import Path
from typing import Any


def run_snippet(folder: Path, reader: str, **given: Any) -> dict[str, Any]:
    """Execute the Python that the card of `folder` has for `reader`; returns its names.

    Arguments:
        given: what the snippet takes as the user's own.
    """
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(rf"### {re.escape(reader)}: .*?```python\n(.*?)```", card, re.DOTALL)
    assert code, f"{folder}/README.md has no Python for {reader}"
    names = dict(given)
    exec(compile(code[1], f"card for {reader}", "exec"), names)
    return names
