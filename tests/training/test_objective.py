"""The objectives against their formulas, against TRL, and against each other."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from qlora_rm.config import ObjectiveConfig
from qlora_rm.training.collate import Collator
from qlora_rm.training.objective import Objective, evaluate_batch, rao_kupper_tie_loss, summarize, win_loss

finite = st.floats(-20, 20, width=32)


def row(k, wins, ties=(), margins=None, weight=1.0):
    return {
        "prompt_ids": [5],
        "response_ids": [[6 + i] for i in range(k)],
        "wins": [list(w) for w in wins],
        "ties": [list(t) for t in ties],
        "margins": margins or [0.0] * len(wins),
        "weight": weight,
    }


def losses(rows, scores, centring=0.0, **config):
    batch = Collator(pad_token_id=0)(rows)
    return Objective(ObjectiveConfig(**config), centring).losses(torch.tensor(scores, dtype=torch.float), batch)


@given(st.lists(st.tuples(finite, finite, st.floats(0, 3, width=32)), min_size=1, max_size=6))
def test_pairs_have_trls_loss(pairs):
    """RewardTrainer.compute_loss: -logsigmoid(chosen - rejected - margin), mean, plus centring."""
    rows = [row(2, [(0, 1)], margins=[m]) for _, _, m in pairs]
    ours = losses(rows, [s for c, r, _ in pairs for s in (c, r)], centring=0.01).mean()
    chosen, rejected, margin = torch.tensor(pairs, dtype=torch.float).T
    trl = -logsigmoid(chosen - rejected - margin).mean() + 0.01 * ((chosen + rejected) ** 2).mean()
    torch.testing.assert_close(ours, trl)


@given(st.lists(finite, min_size=3, max_size=9))
def test_k_responses_are_all_pairs_with_weights_summing_to_one(scores):
    wins = list(itertools.combinations(range(len(scores)), 2))
    one = losses([row(len(scores), wins)], scores)
    expected = sum(-logsigmoid(torch.tensor(scores[i] - scores[j])) for i, j in wins) / len(wins)
    torch.testing.assert_close(one[0], expected.float(), rtol=1e-4, atol=1e-5)


@given(st.lists(finite, min_size=2, max_size=6), st.randoms())
def test_plackett_luce_is_the_probability_of_the_ranking(scores, random):
    order = list(range(len(scores)))
    random.shuffle(order)
    wins = [(order[i], order[j]) for i, j in itertools.combinations(range(len(order)), 2)]
    ranked = torch.tensor([scores[i] for i in order], dtype=torch.double)
    log_probability = sum(ranked[i] - ranked[i:].logsumexp(0) for i in range(len(ranked) - 1))
    loss = losses([row(len(scores), wins)], scores, objective="plackett_luce")
    torch.testing.assert_close(loss[0].double() * (len(scores) - 1), -log_probability, rtol=1e-4, atol=1e-4)


@given(finite, finite)
def test_two_responses_make_plackett_luce_bradley_terry(a, b):
    rows = [row(2, [(0, 1)])]
    torch.testing.assert_close(
        losses(rows, [a, b], objective="plackett_luce"), losses(rows, [a, b]), rtol=1e-4, atol=1e-5
    )


@given(finite, st.floats(0.1, 3))
def test_rao_kupper_probabilities_sum_to_one(difference, threshold):
    d, zero = torch.tensor(difference, dtype=torch.double), torch.tensor(0.0, dtype=torch.double)
    win, loss = win_loss(d, zero, threshold), win_loss(-d, zero, threshold)
    tie = rao_kupper_tie_loss(d, threshold)
    assert math.isclose((-win).exp() + (-loss).exp() + (-tie).exp(), 1.0, rel_tol=1e-6)


def test_ties_are_ignored_halved_or_modelled():
    rows = [row(3, [(0, 1), (0, 2)], ties=[(1, 2)])]
    scores = [2.0, 1.0, -1.0]
    wins = -logsigmoid(torch.tensor([1.0, 3.0])).sum()
    half = -(logsigmoid(torch.tensor(2.0)) + logsigmoid(torch.tensor(-2.0))) / 2
    torch.testing.assert_close(losses(rows, scores)[0], wins / 2)
    torch.testing.assert_close(losses(rows, scores, ties="half")[0], (wins + half) / 3)
    assert losses(rows, scores, ties="rao_kupper")[0] > wins / 3


def test_label_smoothing_is_least_at_a_finite_difference():
    rows = [row(2, [(0, 1)])]
    at = {d: losses(rows, [d, 0.0], label_smoothing=0.1).item() for d in (0.0, math.log(9), 8.0)}
    assert at[math.log(9)] == min(at.values())


def test_weight_scales_a_comparison_and_margins_are_per_win():
    """A margin [P] against scores [P]: never broadcast to [P, P]."""
    one = losses([row(2, [(0, 1)], margins=[1.0]), row(2, [(0, 1)], weight=3.0)], [0.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(one, torch.tensor([-logsigmoid(torch.tensor(-1.0)), 3 * math.log(2)]))


def test_a_comparison_of_ties_alone_has_no_loss_and_no_nan_gradient():
    batch = Collator(0)([row(2, [], ties=[(0, 1)]), row(2, [(0, 1)])])
    for objective in ("bradley_terry", "plackett_luce"):
        scores = torch.zeros(4, requires_grad=True)
        loss = Objective(ObjectiveConfig(objective=objective)).losses(scores, batch)
        loss.mean().backward()
        assert loss[0] == 0 and torch.isfinite(scores.grad).all() and scores.grad[:2].abs().sum() == 0


@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8), st.integers(1, 4))
def test_summary_does_not_depend_on_how_comparisons_fall_into_batches(pairs, size):
    rows = [row(2, [(0, 1)]) for _ in pairs]

    def sums(lo, hi):
        batch = Collator(0)(rows[lo:hi])
        scores = torch.tensor([s for pair in pairs[lo:hi] for s in pair])
        return evaluate_batch(scores, Objective(ObjectiveConfig()).losses(scores, batch), batch)

    parts = [sums(i, i + size) for i in range(0, len(pairs), size)]
    whole, split = summarize(sums(0, len(pairs))), summarize(torch.cat(parts))
    assert whole == pytest.approx(split, rel=1e-5, abs=1e-4)
    assert whole["accuracy"] == sum(a > b for a, b in pairs) / len(pairs)


def test_swapping_chosen_and_rejected_turns_accuracy_over():
    scores = torch.tensor([1.0, 0.0, 3.0, 2.0, 0.0, 1.0])
    right, swapped = (
        summarize(evaluate_batch(scores, torch.zeros(3), Collator(0)([row(2, [win])] * 3)))["accuracy"]
        for win in ((0, 1), (1, 0))
    )
    assert right == pytest.approx(2 / 3) and swapped == pytest.approx(1 / 3)


@pytest.mark.parametrize("offset", [0.0, -3.0, 1000.0])
@pytest.mark.parametrize("apart", [0.0, 0.01])
def test_the_deviation_of_scores_survives_a_large_mean(offset, apart):
    scores = torch.tensor([0.0, apart] * 50) + offset
    rows = [row(2, [(0, 1)])] * 50
    found = summarize(evaluate_batch(scores, torch.zeros(50), Collator(0)(rows)))
    assert found["std_reward"] == pytest.approx(float(scores.double().std(correction=0)), rel=1e-6, abs=0)
    assert found["mean_reward"] == pytest.approx(float(scores.double().mean()), rel=1e-12)
