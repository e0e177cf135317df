"""A written model's golden scores, as a stock reader computes them: in memory, or layer by layer from the disk."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from qlora_rm.artifacts.arithmetic import lacks_16_bit_units
from qlora_rm.artifacts.golden import GoldenItem, scores_of
from qlora_rm.artifacts.load import load_stock
from qlora_rm.artifacts.merging.checkpoint import Checkpoint
from qlora_rm.backbone.host import free_memory
from qlora_rm.backbone.precision import NAMES
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.console import say

SHARE = 0.8
"""Of the free memory, what a model under proof may take."""


@dataclass(frozen=True)
class ReadBack:
    """Scores of the golden items' token ids, and the name of the dtype they were computed in."""

    scores: list[list[float]]
    computed_in: str


def read_back(folder: str, items: Sequence[GoldenItem], pad: int, trust_remote_code: bool = False) -> ReadBack:
    """Load the model in `folder` by transformers' Auto class alone, and score `items` with it.

    What does not fit into memory is read from the disk for each batch, one layer at a time (accelerate's offloading).
    """
    stored = Checkpoint.of_model(folder)
    room = int(SHARE * free_memory())
    if stored is None or loaded_bytes(stored) <= room:
        return _scored(load_stock(folder, trust_remote_code)[0], items, pad)
    say(f"the model does not fit into memory: its golden scores are computed layer by layer from {Path(folder).parent}")
    with tempfile.TemporaryDirectory(dir=Path(folder).parent, prefix=".offload.") as offload:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=torch.float32 if lacks_16_bit_units() else "auto",
            device_map="auto",
            max_memory={"cpu": room},
            offload_folder=offload,
            trust_remote_code=trust_remote_code,
        )
        return _scored(model.eval(), items, pad)


def loaded_bytes(stored: Checkpoint) -> int:
    """Memory that the tensors take once they are loaded here."""
    width = 4 if lacks_16_bit_units() else 0
    return sum(
        torch.Size(place.shape).numel() * max(width, place.dtype.itemsize) if place.dtype.is_floating_point else 0
        for place in stored.values()
    )


def _scored(model: PreTrainedModel, items: Sequence[GoldenItem], pad: int) -> ReadBack:
    scores = scores_of(items, lambda ids: score_sequences(model, ids, pad_token_id=pad))
    return ReadBack(scores, NAMES[model.dtype])
