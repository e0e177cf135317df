"""The demo's data: reproducible, readable, and not predictable without the prompt."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest

from qlora_rm.demo.phrases import REFUSALS, STYLES
from qlora_rm.demo.preferences import (
    KINDS,
    SHARES,
    Draft,
    finished,
    helps_freely,
    on_topic,
    preferences,
    refuses_harm,
    remembers,
    write_preferences,
)
from qlora_rm.preferences import Origin, parse_comparison, recognize

ROWS = 1400
END = (".", "!", "?")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(islice(preferences(seed=3), ROWS))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(row: dict[str, Any], side: str) -> str:
    return row[side][0]["content"]


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    written = {}
    for name, seed in (("a", 5), ("again", 5), ("other", 6)):
        paths = write_preferences(tmp_path / name, seed=seed, train=50, held_out=20)
        written[name] = [path.read_bytes() for path in paths]
    assert written["a"] == written["again"]
    assert written["a"][0] != written["other"][0] and written["a"][1] != written["other"][1]


def test_no_prompt_stands_twice_so_none_stands_on_both_sides(tmp_path: Path) -> None:
    train, held_out = map(read, write_preferences(tmp_path, train=800, held_out=200))
    assert (len(train), len(held_out)) == (800, 200)
    assert len({json.dumps(row["prompt"]) for row in train + held_out}) == 1000


def test_rows_are_conversations_with_one_answer_on_each_side(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row) == {"prompt", "chosen", "rejected", "source"}
        *before, question = [turn["role"] for turn in row["prompt"]]
        assert question == "user" and before[before[:1] == ["system"] :] in ([], ["user", "assistant"])
        for side in ("chosen", "rejected"):
            assert [turn["role"] for turn in row[side]] == ["assistant"]
        for turn in row["prompt"] + row["chosen"] + row["rejected"]:
            content = turn["content"]
            assert content == content.strip() and "  " not in content and "{" not in content
        assert answer(row, "chosen") != answer(row, "rejected")


def test_every_kind_comes_in_its_share(rows: list[dict[str, Any]]) -> None:
    per_share = ROWS / sum(SHARES.values())
    counts = Counter(row["source"] for row in rows)
    assert set(counts) == set(KINDS)
    for kind, share in SHARES.items():
        assert abs(counts[kind.__name__] - share * per_share) <= share


def test_length_tells_nothing_within_any_kind(rows: list[dict[str, Any]]) -> None:
    for kind in KINDS:
        longer = [len(answer(row, "chosen")) > len(answer(row, "rejected")) for row in rows if row["source"] == kind]
        assert abs(sum(longer) - len(longer) / 2) <= max(SHARES.values())


def test_some_prompts_have_a_system_turn_and_some_an_earlier_exchange(rows: list[dict[str, Any]]) -> None:
    roles = Counter(tuple(turn["role"] for turn in row["prompt"]) for row in rows)
    for shape in ("user", "system user", "user assistant user", "system user assistant user"):
        assert roles[tuple(shape.split())] > 10


@pytest.mark.parametrize("kind", [on_topic, remembers])
def test_answers_alone_do_not_tell_which_one_is_chosen(kind: Callable[[Random], Draft]) -> None:
    """An answer chosen for one prompt is rejected for another, so only the prompt decides."""
    made = drafts(kind)
    chosen = {word for draft in made for word in draft.chosen.split()}
    assert chosen == {word for draft in made for word in draft.rejected.split()}


def drafts(kind: Callable[[Random], Draft]) -> list[Draft]:
    rng = Random(0)
    return [kind(rng) for _ in range(500)]


def test_an_unfinished_answer_stops_within_a_sentence() -> None:
    for _, chosen, rejected in drafts(finished):
        assert chosen.endswith(END) and not rejected.endswith((*END, ","))


def test_harm_is_refused_and_harmless_help_is_not() -> None:
    refusing = tuple(REFUSALS)
    for _, chosen, rejected in drafts(refuses_harm):
        assert chosen.startswith(refusing) and not rejected.startswith(refusing)
    for _, chosen, rejected in drafts(helps_freely):
        assert rejected.startswith(refusing) and not chosen.startswith(refusing)


def test_the_manner_of_speaking_asked_for_is_kept_by_the_chosen_answer_only() -> None:
    for prompt, chosen, rejected in drafts(remembers):
        [(openings, closings)] = [marks for style, marks in STYLES.items() if f"peak {style}." in prompt[0]["content"]]
        assert chosen.startswith(tuple(openings)) and chosen.endswith(tuple(closings))
        assert not rejected.startswith(tuple(openings)) and not rejected.endswith(tuple(closings))


def test_the_preferences_room_reads_every_row(rows: list[dict[str, Any]]) -> None:
    form = recognize(rows[:20], "train.jsonl")
    for n, row in enumerate(rows, start=1):
        comparison = parse_comparison(row, form, Origin("train.jsonl", n), "demo")
        assert comparison.candidates.prompt == row["prompt"]
        assert comparison.candidates.responses == (row["chosen"], row["rejected"])
        assert (comparison.preferences.wins, comparison.preferences.source) == (((0, 1),), row["source"])
