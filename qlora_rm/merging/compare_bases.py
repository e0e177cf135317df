"""Choose the base weights to merge an adapter into, by agreement with the user's own held-out pairs."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import comb
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from qlora_rm.artifacts.as_written import require_as_written
from qlora_rm.artifacts.folders import new_folder
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.own_tokenizer import read_tokenizer, tokenization_of
from qlora_rm.artifacts.trained_text import trained_text
from qlora_rm.config import DataConfig
from qlora_rm.console import say, table
from qlora_rm.evaluation.agreement import Agreement, agreement_with, sequences_of, win_pairs
from qlora_rm.merging.merge import MergeBase, MergeDtype, merge
from qlora_rm.preferences import load_comparisons

BASES: tuple[MergeBase, ...] = ("dequantized", "original")


@dataclass(frozen=True)
class Measured:
    """A merged model compared with the adapter on its quantized base.

    Attributes:
        drift, mean_drift: largest and mean absolute difference of a response's scores.
        flips: wins whose two responses changed order.
    """

    agreement: Agreement
    drift: float
    mean_drift: float
    flips: int

    @classmethod
    def of(cls, scores: Tensor, before: Tensor, dataset: Dataset) -> "Measured":
        """Compare two sets of scores of all responses, float [R] each."""
        moved = (scores - before).abs()
        winners, losers = win_pairs(dataset)
        flips = int(((scores[winners] > scores[losers]) != (before[winners] > before[losers])).sum())
        agreement = agreement_with(scores, torch.zeros(len(scores)), dataset).overall
        return cls(agreement, float(moved.max()), float(moved.mean()), flips)


@dataclass(frozen=True)
class Choice:
    """The measurements of each base, the base that was kept, and the reason."""

    kept: MergeBase
    reason: str
    adapter: Agreement
    measured: dict[MergeBase, Measured]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """Return a table for people."""
        rows = [("(adapter)", *_accuracy(self.adapter), "", "", "")]
        for base, m in self.measured.items():
            rows.append((base, *_accuracy(m.agreement), f"{m.drift:.3g}", f"{m.mean_drift:.3g}", f"{m.flips:,}"))
        header = ("base", "wins", "accuracy", "95 % interval", "largest drift", "mean drift", "flips")
        return [*table(header, rows), "", f"kept: {self.kept}, {self.reason}"]


def merge_better(adapter: str, output: str, data: DataConfig, *, dtype: MergeDtype, **places: Any) -> Choice:
    """Merge the adapter into both bases and keep at `output` the one that agrees with more of the data's wins.

    In a tie, the dequantized base is kept: its scores are those at the end of training.

    Arguments:
        places: `base_model` and `trust_remote_code`, passed to `merge`.

    Raises:
        UserError: from `merge` and `load_comparisons`.
    """
    trusted = places.get("trust_remote_code", False)
    adapted = RewardModel.load(adapter, base=places.get("base_model"), trust_remote_code=trusted)
    dataset, report = load_comparisons(data.dataset, data, adapted.tokenization, adapted.text)
    say(*report.lines())
    sequences = sequences_of(dataset)
    before = adapted.score_token_ids(sequences)
    del adapted
    with new_folder(output) as beside:
        scores: dict[MergeBase, Tensor] = {}
        measured: dict[MergeBase, Measured] = {}
        for base in BASES:
            merge(adapter, str(beside / base), dtype=dtype, base=base, **places)
            scores[base] = RewardModel.load(str(beside / base), trust_remote_code=trusted).score_token_ids(sequences)
            measured[base] = Measured.of(scores[base], before, dataset)
        kept, reason = _better(scores, measured, dataset)
        choice = Choice(kept, reason, Measured.of(before, before, dataset).agreement, measured)
        _keep(beside, kept, choice)
    return choice


def token_ids_of(folder: str, data: DataConfig, trust_remote_code: bool = False) -> list[list[list[int]]]:
    """Return token ids of the data's responses, grouped by prompt, tokenized as in training of the model in `folder`."""
    manifest = Manifest.load(folder)
    require_as_written(folder, manifest)
    tokenization = tokenization_of(manifest, read_tokenizer(folder, trust_remote_code))
    dataset, report = load_comparisons(data.dataset, data, tokenization, trained_text(manifest, tokenization))
    say(*report.lines())
    return [[row["prompt_ids"] + ids for ids in row["response_ids"]] for row in dataset]


def _better(
    scores: dict[MergeBase, Tensor], measured: dict[MergeBase, Measured], data: Dataset
) -> tuple[MergeBase, str]:
    winners, losers = win_pairs(data)
    right = {base: scores[base][winners] > scores[base][losers] for base in BASES}
    ours, theirs = (int((right[a] & ~right[b]).sum()) for a, b in (BASES, BASES[::-1]))
    counted = f"{ours} wins are right only on the dequantized base, {theirs} only on the original one"
    chance = f"{counted} (sign test: p = {sign_test(ours, theirs):.2g})"
    if measured["original"].agreement.accuracy > measured["dequantized"].agreement.accuracy:
        return "original", f"whose accuracy is higher: {chance}"
    if ours == theirs:
        return "dequantized", f"since both agree with as many wins, and its scores are those of training: {counted}"
    return "dequantized", f"whose accuracy is higher: {chance}"


def sign_test(a: int, b: int) -> float:
    """Return the two-sided probability of a split at least as uneven as a to b if both are equally likely (McNemar 1947,
    exact)."""
    n, few = a + b, min(a, b)
    return min(1.0, 2 * sum(comb(n, k) for k in range(few + 1)) / 2**n)


def _keep(folder: Path, kept: MergeBase, choice: Choice) -> None:
    """Move the kept model up into `folder`, remove the other, and record the choice and its measurements in the manifest."""
    for base in BASES:
        if base != kept:
            shutil.rmtree(folder / base)
    for path in (folder / kept).iterdir():
        path.rename(folder / path.name)
    (folder / kept).rmdir()
    manifest = Manifest.load(folder)
    last = manifest.history[-1]
    settings = last.settings | {"chosen": choice.reason, "measured": {b: asdict(m) for b, m in choice.measured.items()}}
    replace(manifest, history=[*manifest.history[:-1], replace(last, settings=settings)]).save(folder, manifest.files)


def _accuracy(agreement: Agreement) -> Sequence[str]:
    low, high = agreement.interval
    return f"{agreement.wins:,}", f"{agreement.accuracy:.4f}", f"{low:.4f} to {high:.4f}"
