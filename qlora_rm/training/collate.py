"""Collation of tokenized rows into a batch of sequences and the comparisons between them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_rm.backbone.packed import as_tensors
from qlora_rm.backbone.scoring import pad_batch
from qlora_rm.preferences.forest import grow, pays


@dataclass(frozen=True)
class Collator:
    """Build batches of B comparisons with S sequences; keys: those of `training/objective.py` and the model's inputs.

    `weight` comes first: transformers and accelerate read the number of examples from a batch's first tensor. `origin`,
    the file and row of each comparison, is present if the rows have it.

    Attributes:
        share_prefix: lay out the sequences as a forest, which holds each shared prefix once, instead of padding them.
        row_multiple: rows of a forest are padded to a multiple of this length.
        width: hidden size of a backbone whose attention kernel computes the full mask; a batch whose forest would cost
            more is then padded. None if the kernel skips masked positions.
    """

    pad_token_id: int
    share_prefix: bool = False
    row_multiple: int = 1
    width: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sequences: list[list[int]] = []
        comparison: list[int] = []
        wins, win_comparison, margin, ties, tie_comparison = [], [], [], [], []
        for b, row in enumerate(rows):
            start = len(sequences)
            sequences += [row["prompt_ids"] + ids for ids in row["response_ids"]]
            comparison += [b] * len(row["response_ids"])
            wins += [[start + i, start + j] for i, j in row["wins"]]
            win_comparison += [b] * len(row["wins"])
            margin += row["margins"]
            ties += [[start + i, start + j] for i, j in row["ties"]]
            tie_comparison += [b] * len(row["ties"])
        return {
            "weight": torch.tensor([row["weight"] for row in rows], dtype=torch.float),
            "counts": torch.tensor([len(row["response_ids"]) > 1 for row in rows]),
            **self._inputs(sequences),
            "comparison": torch.tensor(comparison),
            "wins": torch.tensor(wins, dtype=torch.long).reshape(-1, 2),
            "win_comparison": torch.tensor(win_comparison, dtype=torch.long),
            "margin": torch.tensor(margin, dtype=torch.float),
            "ties": torch.tensor(ties, dtype=torch.long).reshape(-1, 2),
            "tie_comparison": torch.tensor(tie_comparison, dtype=torch.long),
            **({"origin": [row["origin"] for row in rows]} if "origin" in rows[0] else {}),
        }

    def _inputs(self, sequences: list[list[int]]) -> dict[str, Tensor]:
        if self.share_prefix:
            forest = grow(sequences, self.pad_token_id, self.row_multiple)
            if self.width is None or pays(forest, sequences, self.width):
                return as_tensors(forest)
        return pad_batch(sequences, self.pad_token_id)
