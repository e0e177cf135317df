"""Scoring rows: all are returned in order; faulty ones stop the run or are marked."""

import json
from collections import Counter
from typing import Any

import pytest

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.errors import UserError
from qlora_rm.evaluation import scored_rows
from qlora_rm.evaluation.scored_rows import rank, score_rows
from qlora_rm.preferences import Candidates
from tests.reward_models_for_tests import llama_adapter

GOOD: list[dict[str, Any]] = [
    {"prompt": "What is the capital of France? ", "response": "Paris.", "id": 7},
    {"prompt": "What? ", "responses": ["Paris.", "The dog.", "No."]},
    {"messages": [{"role": "user", "content": "Boil an egg?"}, {"role": "assistant", "content": "No."}]},
    {"prompt": "What? ", "chosen": "Paris.", "rejected": "Köln"},
    {"prompt": "What? ", "responses": ["one"]},
]
BAD = ['{"prompt": "x"', "[1]", '{"question": "x"}', '{"prompt": "x", "response": true}', '{"text": "<pad>"}']
KINDS = Counter(["broken_json", "not_an_object", "missing_column", "wrong_type", "pad_in_content"])


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(str(llama_adapter()))


def lines(rows: list[dict[str, Any]]) -> list[str]:
    return [json.dumps(row) + "\n" for row in rows]


def said(prompt: str, *answers: str) -> Candidates:
    responses = tuple([{"role": "assistant", "content": answer}] for answer in answers)
    return Candidates([{"role": "user", "content": prompt}], responses)


def test_rows_gain_their_scores_in_order(model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_rows, "SCORED_AT_ONCE", 2)
    scored = list(score_rows(model, lines(GOOD), "rows"))
    assert [{key: row[key] for key in given} for row, given in zip(scored, GOOD, strict=True)] == GOOD
    [[wanted]] = model.score_candidates([said(GOOD[0]["prompt"], "Paris.")])  # turns, as the model was trained on
    assert scored[0]["score"] == pytest.approx(wanted, abs=1e-5)
    assert scored[1]["scores"] == pytest.approx(
        model.score_candidates([said("What? ", "Paris.", "The dog.", "No.")])[0], abs=1e-5
    )
    assert isinstance(scored[2]["score"], float)
    assert len(scored[3]["scores"]) == 2
    assert len(scored[4]["scores"]) == 1, "a list of one response has a list of one score"


@pytest.mark.parametrize("bad", BAD)
def test_a_faulty_row_stops_with_its_number(model: RewardModel, bad: str) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, row 3: "):
        list(score_rows(model, [*lines(GOOD[:1]), "\n", bad], "rows.jsonl"))


def test_skipped_rows_keep_their_place(model: RewardModel) -> None:
    skipped = Counter[str]()
    mixed = [line for pair in zip(lines(GOOD), BAD, strict=True) for line in pair]
    scored = list(score_rows(model, mixed, "rows", on_bad_row="skip", skipped=skipped))
    assert skipped == KINDS
    assert [row.get("score", 0) is None for row in scored] == [False, True] * 5
    assert [row["error"].partition(":")[0] for row in scored[1::2]] == [f"row {n}" for n in (2, 4, 6, 8, 10)]
    assert scored[7]["response"] is True, "what could be read of the row is kept"
    clean = list(score_rows(model, lines(GOOD), "rows"))
    assert [row.get("score") for row in scored[::2]] == pytest.approx([row.get("score") for row in clean], abs=1e-5)


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_labels_are_never_overwritten(model: RewardModel, on_bad_row: Any) -> None:
    rows = [{"prompt": "What? ", "responses": ["a", "b"], "scores": [1, 0]}]
    with pytest.raises(UserError, match=r"already has a column 'scores'.*--score_column"):
        list(score_rows(model, lines(rows), "rows", on_bad_row=on_bad_row))
    scored = next(score_rows(model, lines(rows), "rows", on_bad_row=on_bad_row, column="reward"))
    assert scored["scores"] == [1, 0]
    assert len(scored["reward"]) == 2


def test_no_rows_is_a_mistake(model: RewardModel) -> None:
    with pytest.raises(UserError, match="holds no rows"):
        list(score_rows(model, ["\n"], "rows"))


def test_ranking_is_best_first(model: RewardModel) -> None:
    responses = ["Paris.", "The dog.", "I do not know."]
    ranked = rank(model, "What is the capital of France?", responses)
    assert sorted(text for _, text in ranked) == sorted(responses)
    assert [score for score, _ in ranked] == sorted((score for score, _ in ranked), reverse=True)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    scores = model.score_candidates(
        [Candidates(turns, tuple([{"role": "assistant", "content": text}] for text in responses))]
    )[0]
    assert {text: score for score, text in ranked} == pytest.approx(dict(zip(responses, scores, strict=True)))


def test_an_empty_response_cannot_be_ranked(model: RewardModel) -> None:
    with pytest.raises(UserError, match="empty"):
        rank(model, "What?", ["", "a"])
