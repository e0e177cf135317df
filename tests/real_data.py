"""Real preference rows as users have them: the raw files next to the repository, written as JSONL in our formats.

Each function takes the folder of the raw files (the `shared_data` fixture) and a folder to write to, and returns the
file to pass as `--dataset`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def hh(data: Path, folder: Path) -> Path:
    """Return HH-RLHF harmless, raw text; already JSONL."""
    return data / "hh-rlhf/harmless-base/test.jsonl.gz"


def llamafactory_en(data: Path, folder: Path) -> Path:
    """Return ShareGPT pairs in English; already a JSON list."""
    return data / "llamafactory_dpo_demo/data/dpo_en_demo.json"


def llamafactory_zh(data: Path, folder: Path) -> Path:
    """Return ShareGPT pairs in Chinese; already a JSON list."""
    return data / "llamafactory_dpo_demo/data/dpo_zh_demo.json"


def finegrained(data: Path, folder: Path) -> Path:
    """Write four answers to a question about passages, with all six pairs compared.

    `preference` is in the order of the pairs (1,2) (1,3) (1,4) (2,3) (2,4) (3,4): 1 if the first is better, 2 if the
    second is, 0 for a tie. In this order none of the 500 rows has a preference cycle; in other orders hundreds do.
    """

    def rows() -> Iterator[Row]:
        for row in json.loads((data / "finegrained_rlhf/tasks/qa_feedback/data/dev_feedback.json").read_text()):
            passages = "\n\n".join(f"{title}: {' '.join(sentences)}" for title, *sentences in row["passages"])
            judged = list(zip(combinations(range(4), 2), row["preference"], strict=True))
            yield {
                "prompt": f"{passages}\n\nQuestion: {row['question']}\nAnswer: ",
                "responses": [row[f"prediction {number}"] for number in range(1, 5)],
                "preferences": [pair if better == 1 else pair[::-1] for pair, better in judged if better],
                "ties": [pair for pair, better in judged if not better],
            }

    return _write(rows(), folder / "finegrained.jsonl")


def gsm8k(data: Path, folder: Path) -> Path:
    """Write four solutions of a math problem each, scored 1 if right and 0 if wrong."""

    def rows() -> Iterator[Row]:
        for row in _jsonl(data / "gsm8k_solutions/grade_school_math/data/example_model_solutions.jsonl"):
            solutions = [value for value in row.values() if isinstance(value, dict)]
            yield {
                "prompt": f"{row['question']}\n",
                "responses": [solution["solution"] for solution in solutions],
                "scores": [int(solution["is_correct"]) for solution in solutions],
            }

    return _write(rows(), folder / "gsm8k.jsonl")


def oasst(data: Path, folder: Path) -> Path:
    """Write conversation trees: each group of ranked sibling replies after the preceding turns; rank 0 is best."""

    def groups(node: Row, path: list[Row]) -> Iterator[Row]:
        role = {"prompter": "user", "assistant": "assistant"}[node["role"]]
        path = [*path, {"role": role, "content": node["text"]}]
        ranked = [reply for reply in node["replies"] if reply.get("rank") is not None]
        if len(ranked) > 1:
            yield {
                "prompt": path,
                "responses": [reply["text"] for reply in ranked],
                "ranks": [reply["rank"] for reply in ranked],
            }
        for reply in node["replies"]:
            yield from groups(reply, path)

    trees = _jsonl(data / "oasst_trees/model/model_eval/manual/data/en_100_tree.jsonl")
    return _write((group for tree in trees for group in groups(tree["prompt"], [])), folder / "oasst.jsonl")


def pandalm(data: Path, folder: Path) -> Path:
    """Write two responses and the majority of three raters, who may call a tie; six rows hold a boolean response."""

    def rows() -> Iterator[Row]:
        for row in json.loads((data / "pandalm/data/testset-v1.json").read_text()):
            verdict = Counter(row[f"annotator{number}"] for number in (1, 2, 3)).most_common(1)[0][0]
            yield {
                "prompt": f"{row['instruction']}\n\n{row['input']}\n\n",
                "responses": [row["response1"], row["response2"]],
                "ranks": {0: [1, 1], 1: [1, 2], 2: [2, 1]}[verdict],
            }

    return _write(rows(), folder / "pandalm.jsonl")


REAL_DATA: dict[str, Callable[[Path, Path], Path]] = {
    function.__name__: function
    for function in (hh, llamafactory_en, llamafactory_zh, finegrained, gsm8k, oasst, pandalm)
}


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _write(rows: Iterable[Row], path: Path) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
