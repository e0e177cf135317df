"""Agreement of a reward model with people, its confidence interval, and the accuracy of length as a baseline."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import softplus

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.console import table
from qlora_rm.intervals import wilson_interval
from qlora_rm.progress import Phase


@dataclass(frozen=True)
class Agreement:
    """Agreement of scores with W preferences of one response over another.

    Attributes:
        wins: W; each win counts once, even if one prompt has several.
        accuracy: share of the wins whose winner scores higher; equal scores count as wrong.
        interval: 95 % Wilson interval of the accuracy. It assumes independent wins, and is too narrow if prompts have
            many.
        equal: wins whose two scores are the same number.
        mean_margin: mean of winner's score minus loser's.
        log_loss: mean of -log sigmoid(margin), the Bradley-Terry loss; constant scores give ln 2 = 0.693.
    """

    wins: int
    accuracy: float
    interval: tuple[float, float]
    equal: int
    mean_margin: float
    log_loss: float

    @classmethod
    def of(cls, margins: Tensor) -> "Agreement":
        """Compute the agreement from the margins of W wins, float [W]."""
        wins, right = len(margins), int((margins > 0).sum())
        return cls(
            wins=wins,
            accuracy=right / wins if wins else math.nan,
            interval=wilson_interval(right, wins),
            equal=int((margins == 0).sum()),
            mean_margin=float(margins.mean()),
            log_loss=float(softplus(-margins).mean()),
        )


@dataclass(frozen=True)
class Evaluation:
    """A reward model's agreement with a set of comparisons.

    Attributes:
        swapped_accuracy: accuracy of the same scores on reversed preferences; it must be 1 - accuracy - equal / wins.
        prefer_longer, prefer_shorter: accuracy of choosing by length in tokens; equal lengths count as wrong.
        ties: pairs that people called equal; no other number includes them.
        responses: number of responses, each scored once; `mean_score` and `std_score` are over them.
    """

    comparisons: int
    overall: Agreement
    by_source: dict[str, Agreement]
    swapped_accuracy: float
    prefer_longer: float
    prefer_shorter: float
    ties: int
    responses: int
    mean_score: float
    std_score: float

    def as_dict(self) -> dict[str, Any]:
        """Return the evaluation for JSON; values that are undefined without wins are null."""
        return _without_nan(asdict(self))

    def lines(self) -> list[str]:
        """Return the evaluation as text."""
        parts = {"all": self.overall} | (self.by_source if len(self.by_source) > 1 else {})
        header = ("source", "wins", "accuracy", "95 % interval", "equal", "margin", "log-loss")
        lines = table(header, [(name, *_cells(agreement)) for name, agreement in parts.items()])
        return [
            *lines,
            "",
            f"prefer the longer {self.prefer_longer:.4f}, prefer the shorter {self.prefer_shorter:.4f}; "
            f"preferences turned round {self.swapped_accuracy:.4f}",
            f"{self.comparisons:,} comparisons, {self.ties:,} tied pairs left out; {self.responses:,} responses, "
            f"score mean {self.mean_score:.4f}, standard deviation {self.std_score:.4f}",
        ]


def _cells(agreement: Agreement) -> tuple[str, ...]:
    low, high = agreement.interval
    return (
        f"{agreement.wins:,}",
        f"{agreement.accuracy:.4f}",
        f"{low:.4f} to {high:.4f}",
        f"{agreement.equal:,}",
        f"{agreement.mean_margin:.4f}",
        f"{agreement.log_loss:.4f}",
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(model: RewardModel, dataset: Dataset) -> Evaluation:
    """Score every response of `dataset` (columns of `arrow_table.SCHEMA`) once, and compare with its preferences."""
    sequences = sequences_of(dataset)
    lengths = torch.tensor([len(ids) for ids in sequences])
    with Phase("evaluating"):
        scores = model.score_token_ids(sequences)
    return agreement_with(scores, lengths, dataset)


def sequences_of(dataset: Dataset) -> list[list[int]]:
    """Return the token ids of all responses with their prompts, row by row."""
    return [
        [*prompt, *ids]
        for prompt, responses in zip(dataset["prompt_ids"], dataset["response_ids"], strict=True)
        for ids in responses
    ]


def win_pairs(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return the indices of the winners and of the losers among all responses, int64 [W] each."""
    start, pairs = 0, []
    for responses, wins in zip(dataset["response_ids"], dataset["wins"], strict=True):
        pairs += [(start + winner, start + loser) for winner, loser in wins]
        start += len(responses)
    winners, losers = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    return winners, losers


def agreement_with(scores: Tensor, lengths: Tensor, dataset: Dataset) -> Evaluation:
    """Return the evaluation of given scores.

    Arguments:
        scores, lengths: float and int [R], of all responses of `dataset`, row by row.
    """
    winners, losers = win_pairs(dataset)
    source_of = [source for source, wins in zip(dataset["source"], dataset["wins"], strict=True) for _ in wins]
    margins = (scores[winners] - scores[losers]).double()
    longer = lengths[winners] - lengths[losers]
    return Evaluation(
        comparisons=len(dataset),
        overall=Agreement.of(margins),
        by_source={name: Agreement.of(margins[_places(source_of, name)]) for name in sorted(set(source_of))},
        swapped_accuracy=Agreement.of((scores[losers] - scores[winners]).double()).accuracy,
        prefer_longer=_share(longer > 0),
        prefer_shorter=_share(longer < 0),
        ties=sum(map(len, dataset["ties"])),
        responses=len(scores),
        mean_score=float(scores.double().mean()),
        std_score=float(scores.double().std(correction=0)),
    )


def _places(values: Sequence[str], wanted: str) -> list[int]:
    return [place for place, value in enumerate(values) if value == wanted]


def _share(which: Tensor) -> float:
    return int(which.sum()) / len(which) if len(which) else math.nan
