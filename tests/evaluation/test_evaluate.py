"""The numbers of an evaluation, checked against hand counts, identities, and a model's own scores."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.evaluation.agreement import Agreement, agreement_with, evaluate, wilson_interval
from tests.reward_models_for_tests import llama_adapter


def comparisons(rows: list[dict[str, Any]]) -> Dataset:
    defaults = {"prompt_ids": [5, 6], "ties": [], "margins": [], "weight": 1.0, "source": "toy"}
    return Dataset.from_list([{**defaults, **row} for row in rows])


ROWS = [
    {"response_ids": [[7], [8, 9]], "wins": [[0, 1]]},
    {"response_ids": [[7, 7, 7], [8]], "wins": [[0, 1]]},
    {"response_ids": [[7], [8], [9]], "wins": [[0, 1], [0, 2]], "ties": [[1, 2]], "source": "other"},
]
SCORES = torch.tensor([1.0, 0.0, 0.0, 2.0, 3.0, 1.0, 3.0])
LENGTHS = torch.tensor([3, 4, 5, 3, 3, 3, 3])


def test_counts_by_hand() -> None:
    result = agreement_with(SCORES, LENGTHS, comparisons(ROWS))
    assert (result.comparisons, result.responses, result.ties) == (3, 7, 1)
    overall = result.overall
    assert (overall.wins, overall.equal, overall.accuracy) == (4, 1, 0.5), "equal scores count as wrong"
    assert result.swapped_accuracy == 0.25
    assert (result.prefer_longer, result.prefer_shorter) == (0.25, 0.25)
    assert overall.mean_margin == pytest.approx((1 - 2 + 2 + 0) / 4)
    expected = [math.log(1 + math.exp(-margin)) for margin in (1, -2, 2, 0)]
    assert overall.log_loss == pytest.approx(sum(expected) / 4)
    assert {name: (part.wins, part.accuracy) for name, part in result.by_source.items()} == {
        "toy": (2, 0.5),
        "other": (2, 0.5),
    }
    assert result.mean_score == pytest.approx(10 / 7)


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=30))
def test_turned_round_preferences_turn_the_accuracy_round(pairs: list[tuple[int, int]]) -> None:
    rows = comparisons([{"response_ids": [[7], [8]], "wins": [[0, 1]]} for _ in pairs])
    scores = torch.tensor([float(score) for pair in pairs for score in pair])
    result = agreement_with(scores, torch.ones(len(scores)), rows)
    overall = result.overall
    assert result.swapped_accuracy == pytest.approx(1 - overall.accuracy - overall.equal / overall.wins)
    assert overall.interval[0] <= overall.accuracy <= overall.interval[1]
    assert sum(part.wins for part in result.by_source.values()) == overall.wins


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals_are_the_published_ones(successes: int, trials: int, low: float, high: float) -> None:
    """81 of 263: Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


COUNTS = st.integers(1, 10**9).flatmap(
    lambda n: st.tuples(st.integers(0, n) | st.sampled_from([0, 1, n - 1, n]), st.just(n))
)


@given(COUNTS)
def test_wilson_intervals_hold_their_share_and_mirror(counts: tuple[int, int]) -> None:
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    assert wilson_interval(trials - successes, trials) == pytest.approx((1 - high, 1 - low))


def test_the_interval_of_none_begins_at_0_and_of_all_ends_at_1() -> None:
    """The ends must be exact: an interval from 2.8e-17 would not contain the accuracy 0.0 of seven equal pairs."""
    for trials in range(1, 400):
        assert (wilson_interval(0, trials)[0], wilson_interval(trials, trials)[1]) == (0.0, 1.0), trials


@given(COUNTS)
def test_wilson_intervals_solve_their_equation(counts: tuple[int, int]) -> None:
    """Each end p is where the normal test just rejects: (share - p)^2 = z^2 p (1 - p) / n, here in exact fractions."""
    successes, trials = (Fraction(count) for count in counts)
    for end in map(Fraction, wilson_interval(*counts)):
        if 0 < end < 1:
            spread = Fraction(1.959963984540054) ** 2 * end * (1 - end) / trials
            assert float((successes / trials - end) ** 2 / spread) == pytest.approx(1, rel=1e-5)


def test_a_wide_margin_costs_no_infinity() -> None:
    assert Agreement.of(torch.tensor([-1e4], dtype=torch.float64)).log_loss == pytest.approx(1e4)


def test_only_ties_is_undefined_not_an_error() -> None:
    rows = comparisons([{"response_ids": [[7], [8]], "wins": [], "ties": [[0, 1]]}])
    result = agreement_with(torch.tensor([0.0, 1.0]), torch.tensor([3, 3]), rows)
    assert result.as_dict()["overall"]["accuracy"] is None
    assert result.ties == 1
    assert any("1 tied pairs" in line for line in result.lines())


def test_every_response_is_scored_once() -> None:
    model = RewardModel.load(str(llama_adapter()))
    scored: list[list[int]] = []
    score = model.score_token_ids

    def counting(sequences: list[list[int]]) -> torch.Tensor:
        scored.extend(sequences)
        return score(sequences)

    model.score_token_ids = counting  # type: ignore[method-assign,assignment]
    result = evaluate(model, comparisons(ROWS))
    assert scored == [[5, 6, *ids] for row in ROWS for ids in row["response_ids"]]
    by_hand = [(s[0] - s[1]).item() for s in (score([[5, 6, 7], [5, 6, 8, 9]]), score([[5, 6, 7, 7, 7], [5, 6, 8]]))]
    assert result.by_source["toy"].mean_margin == pytest.approx(sum(by_hand) / 2, abs=1e-5)
    assert (result.prefer_longer, result.prefer_shorter) == (0.25, 0.25)
