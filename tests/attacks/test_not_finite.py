"""Values that are not finite, at every point where a run checks for them."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora_rm.errors import UserError
from qlora_rm.training.finite import OVERFLOWS, FiniteWatch, require_finite_scores, weights_are_finite

CATEGORY = "Training: numbers that are not finite"
BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture
def watch(tmp_path: Path) -> FiniteWatch:
    return FiniteWatch(str(tmp_path))


@pytest.mark.parametrize("bad", BAD)
def test_a_loss_names_its_step_and_rows(watch: FiniteWatch, bad: float) -> None:
    for step in (1, 2):
        for micro_batch in range(2):
            losses = torch.tensor([0.7, bad if step == 2 and micro_batch == 1 else 0.6, 0.1])
            watch.note(losses, [f"rows.jsonl, row {step}{micro_batch}{i}" for i in range(2)] + [""])
        sums = torch.tensor([[0.5, 1.0], [bad if step == 2 else 0.5, 1.0]], dtype=torch.float64)
        if step == 1:
            watch.require_step(sums, step)
        else:
            with pytest.raises(
                UserError, match=r"loss of step 2 is not finite \(rows: rows.jsonl, row 211\), .*No checkpoint"
            ):
                watch.require_step(sums, step)


@pytest.mark.parametrize("bad", [*BAD, torch.tensor(math.nan)])
def test_a_gradient_names_the_step_it_belongs_to(watch: FiniteWatch, bad: float) -> None:
    """It is checked where the trainer waits for the device: at the next step's losses, or before a save."""
    watch.note(torch.tensor([0.7]), ["rows.jsonl, row 3"])
    watch.note_norm(1.0, 4)
    watch.require_norm()
    watch.note_norm(bad, 5)
    with pytest.raises(UserError, match=r"gradient of step 5 is not finite \(rows: rows.jsonl, row 3\)"):
        watch.require_step(torch.zeros(1, 2), 6)
    watch.require_norm()


def test_fp16_may_overflow_while_it_looks_for_its_scale(tmp_path: Path) -> None:
    watch = FiniteWatch(str(tmp_path), fp16=True)
    for step in range(OVERFLOWS):
        watch.note_norm(math.inf, step)
    watch.note_norm(1.0, OVERFLOWS)
    for step in range(OVERFLOWS):
        watch.note_norm(math.inf, step)
    with pytest.raises(UserError, match="gradient of step 99"):
        watch.note_norm(math.inf, 99)


@pytest.mark.parametrize("bad", BAD)
def test_evaluations_weights_and_golden_scores(watch: FiniteWatch, bad: float) -> None:
    watch.require_metrics({"eval_loss": 0.7, "epoch": 1}, 2)
    assert watch.evaluated_at == 2
    with pytest.raises(UserError, match="eval_loss after step 4"):
        watch.require_metrics({"eval_loss": bad}, 4)
    require_finite_scores([0.1, -3.0], 4)
    with pytest.raises(
        UserError, match="1 of the 2 golden scores after step 4 are not finite, so the model is not saved"
    ):
        require_finite_scores([0.1, bad], 4)
    model = nn.Linear(2, 2)
    assert weights_are_finite(model)
    with torch.no_grad():
        model.weight[1, 1] = bad
    assert not weights_are_finite(model)
    model.weight.requires_grad = False  # frozen base weights are not checked
    assert weights_are_finite(model)
    watch.require_weights(True, 4)
    with pytest.raises(UserError, match="weights after step 4"):
        watch.require_weights(False, 4)
