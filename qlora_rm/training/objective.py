"""Losses on scores: Bradley-Terry, its extensions to ties, and Plackett-Luce, for any number of responses per prompt.

Shapes: B comparisons, S scored sequences, P wins (ordered pairs), T ties. A batch maps
    weight           float [B]     factor on each comparison's loss
    counts           bool [B]      False for a filler row with one response, which only pads a step
    wins             int64 [P, 2]  indices into the S scores: winner, loser
    win_comparison   int64 [P]     index of the comparison a win belongs to
    margin           float [P]     by how much the winner should outscore the loser
    comparison       int64 [S]     index of the comparison a sequence belongs to
    ties             int64 [T, 2]  indices into the S scores
    tie_comparison   int64 [T]
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from qlora_rm.config import ObjectiveConfig

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Objective:
    """The loss of a batch of comparisons, from the scores of its sequences.

    Attributes:
        config: likelihood, meaning of ties, label smoothing.
        centring: coefficient of (s_winner + s_loser)^2, which keeps scores near zero (Eisenstein et al. 2023, eq. 2).
    """

    config: ObjectiveConfig
    centring: float = 0.0

    def losses(self, scores: Tensor, batch: Batch) -> Tensor:
        """Return the weighted loss of each comparison, float32 [B]; their mean is the batch's loss.

        Each comparison's terms (its pairs, or its ranks) are averaged, so that a prompt with nine responses counts
        as much as one with two (Ouyang et al. 2022, eq. 1).
        """
        scores = scores.float()
        if self.config.objective == "plackett_luce":
            loss = _mean_by_comparison(*plackett_luce(scores, batch), batch)
        else:
            loss = _mean_by_comparison(*self._pairs(scores, batch), batch)
        if self.centring:
            total = scores[batch["wins"]].sum(-1)
            loss = loss + self.centring * _mean_by_comparison(total**2, batch["win_comparison"], batch)
        return batch["weight"] * loss

    def _pairs(self, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss of every pair that counts, and the comparison it belongs to."""
        threshold = self.config.tie_threshold if self.config.ties == "rao_kupper" else 0.0
        losses = win_loss(_differences(scores, batch["wins"]), batch["margin"], threshold, self.config.label_smoothing)
        if self.config.ties == "ignore":
            return losses, batch["win_comparison"]
        tied = _differences(scores, batch["ties"])
        tie_losses = half_tie_loss(tied) if self.config.ties == "half" else rao_kupper_tie_loss(tied, threshold)
        return torch.cat([losses, tie_losses]), torch.cat([batch["win_comparison"], batch["tie_comparison"]])


def win_loss(difference: Tensor, margin: Tensor, threshold: float = 0.0, label_smoothing: float = 0.0) -> Tensor:
    """-log P(winner beats loser), [P]: Bradley-Terry, -log sigmoid(d - margin).

    With a tie `threshold` eta it is Rao-Kupper's win, sigmoid(d - eta). With `label_smoothing` e the label is right
    with probability 1 - e. The reversed label has no margin, because the data gives none for it.
    """
    loss = -logsigmoid(difference - margin - threshold)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-difference - threshold)
    return loss


def half_tie_loss(difference: Tensor) -> Tensor:
    """Loss of a tie as half a win each way, [T]; its minimum, ln 2, is at equal scores."""
    return -(logsigmoid(difference) + logsigmoid(-difference)) / 2


def rao_kupper_tie_loss(difference: Tensor, threshold: float) -> Tensor:
    """-log P(tie), [T], with P(tie) = (theta^2 - 1) sigmoid(d - eta) sigmoid(-d - eta), eta = log theta.

    Source: Rao and Kupper 1967, "Ties in paired-comparison experiments", eq. 2.4.
    """
    return -(
        math.log(math.expm1(2 * threshold)) + logsigmoid(difference - threshold) + logsigmoid(-difference - threshold)
    )


def plackett_luce(scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of every response that beats another, and the comparison it belongs to.

    Response i is drawn first from itself and all it beats: logsumexp(s_i, s_beaten...) - s_i. Over a full ranking
    these terms add up to the negative log of its Plackett-Luce likelihood. For two responses the only term is
    Bradley-Terry's. Tied responses do not appear in each other's terms.
    """
    winners, comparison_of = _unique_winners(batch)
    candidates = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    candidates[batch["wins"][:, 0], batch["wins"][:, 1]] = True
    first = torch.where(candidates, scores[None, :], -math.inf).logsumexp(-1) - scores
    return first[winners], comparison_of


def _unique_winners(batch: Batch) -> tuple[Tensor, Tensor]:
    pairs = torch.stack([batch["wins"][:, 0], batch["win_comparison"]], dim=-1).unique(dim=0)
    return pairs[:, 0], pairs[:, 1]


def _differences(scores: Tensor, pairs: Tensor) -> Tensor:
    return scores[pairs[:, 0]] - scores[pairs[:, 1]]


def _mean_by_comparison(terms: Tensor, comparison: Tensor, batch: Batch) -> Tensor:
    """Mean of each comparison's terms, [B]; 0 for a comparison without terms."""
    size = len(batch["weight"])
    total = terms.new_zeros(size).index_add(0, comparison, terms)
    return total / torch.bincount(comparison, minlength=size).clamp(min=1)


EVALUATION = ("loss", "wins_right", "wins", "margin", "responses", "score", "score_squared")


ROUNDING = 1e-12
"""A variance below this fraction of the mean square is float64 rounding of equal scores."""


def evaluate_batch(scores: Tensor, losses: Tensor, batch: Batch) -> Tensor:
    """Return sums per comparison, float64 [B, 7] with columns `EVALUATION`; they give exact means for any batches.

    In float32 the squares would lose the deviation of scores around 1000.
    """
    size = len(batch["weight"])
    difference = _differences(scores, batch["wins"])

    def sums(terms: Tensor, comparison: Tensor) -> Tensor:
        return scores.new_zeros(size, dtype=torch.float64).index_add(0, comparison, terms.double())

    wins, rows = batch["win_comparison"], batch["comparison"]
    return torch.stack(
        [
            losses.double(),
            sums(difference > 0, wins),
            sums(torch.ones_like(difference), wins),
            sums(difference, wins),
            sums(torch.ones_like(scores), rows),
            sums(scores, rows),
            sums(scores.double() ** 2, rows),
        ],
        dim=-1,
    )


def summarize(sums: Tensor) -> dict[str, float]:
    """Return loss per comparison, accuracy and margin per win, mean and deviation of scores; `sums`: float64 [B, 7]."""
    total = dict(zip(EVALUATION, sums.double().sum(0).tolist(), strict=True))
    wins, responses = max(total["wins"], 1), max(total["responses"], 1)
    mean, square = total["score"] / responses, total["score_squared"] / responses
    variance = square - mean**2
    return {
        "loss": total["loss"] / max(len(sums), 1),
        "accuracy": total["wins_right"] / wins,
        "margin": total["margin"] / wins,
        "mean_reward": mean,
        "std_reward": math.sqrt(variance) if variance > ROUNDING * square else 0.0,
    }
