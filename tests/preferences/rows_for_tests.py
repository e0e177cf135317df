"""One good row of every format, and helpers to write files of rows."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_rm.config import DataConfig

Row = dict[str, Any]

USER = {"role": "user", "content": "What is the capital of France?"}
PARIS = {"role": "assistant", "content": "Paris."}
ROME = {"role": "assistant", "content": "Rome."}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]

TEXT_EXPLICIT = {"prompt": "Capital of France? ", "chosen": "Paris.", "rejected": "Rome."}
TEXT_IMPLICIT = {"chosen": "Capital of France? Paris.", "rejected": "Capital of France? Rome."}
TURNS_EXPLICIT = {"prompt": [USER], "chosen": [PARIS], "rejected": [ROME]}
TURNS_IMPLICIT = {"chosen": [USER, PARIS], "rejected": [USER, ROME]}
HH = {
    "chosen": "\n\nHuman: Capital of France?\n\nAssistant: Paris.",
    "rejected": "\n\nHuman: Capital of France?\n\nAssistant: Rome.",
}
WHOLE = {"prompt": USER["content"], "chosen": [USER, PARIS], "rejected": [USER, ROME]}
SHAREGPT = {
    "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Capital of France?"}],
    "chosen": {"from": "gpt", "value": "Paris."},
    "rejected": {"from": "gpt", "value": "Rome."},
}
RANKS = {"prompt": "Capital? ", "responses": ["Rome.", "Paris.", "Berlin."], "ranks": [2, 1, 2]}
SCORES = {"prompt": "Capital? ", "responses": ["Rome.", "Paris.", "Berlin."], "scores": [0.5, 3, 0.5]}
PREFERENCES = {
    "prompt": [USER],
    "responses": ["Rome.", "Paris.", "Berlin."],
    "preferences": [[1, 0], [1, 2]],
    "ties": [[0, 2]],
}
IDS = {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8]}

FORMATS: Mapping[str, Row] = {
    "explicit prompt, text": TEXT_EXPLICIT,
    "implicit prompt, text": TEXT_IMPLICIT,
    "explicit prompt, turns": TURNS_EXPLICIT,
    "implicit prompt, turns": TURNS_IMPLICIT,
    "raw HH text": HH,
    "prompt text and conversations": WHOLE,
    "ShareGPT": SHAREGPT,
    "K responses with ranks": RANKS,
    "K responses with scores": SCORES,
    "K responses with preferences": PREFERENCES,
    "token ids (chosen_ids, rejected_ids)": IDS,
}


def write(path: Path, rows: Iterable[Any]) -> str:
    """Write `rows` as JSONL; a string is written unchanged as a line."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def numbered(count: int, **more: Any) -> list[Row]:
    """Return `count` text rows with explicit, distinct prompts."""
    return [
        {"prompt": f"Question {n}? ", "chosen": f"Yes, {n}.", "rejected": f"No, {n}.", **more} for n in range(count)
    ]


def config(*paths: Any, **options: Any) -> DataConfig:
    """Return a `DataConfig` for `paths`."""
    return DataConfig(dataset=list(paths), **options)
