"""Batch token sequences and score them outside the trainer, for evaluation and for proofs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qlora_rm.backbone.packed import forest_batch, row_multiple, sharing_model
from qlora_rm.backbone.rotary import forget_lengths, rotation_of
from qlora_rm.progress import Phase

Layout = Literal["forest", "right", "left"]

TOKENS_PER_BATCH = 8192
"""Default upper bound of a batch's padded size."""


def pad_batch(sequences: Sequence[Sequence[int]], pad_token_id: int, side: str = "right") -> dict[str, Tensor]:
    """Right- or left-padded batch of S sequences: `input_ids` and `attention_mask`, both int64 [S, longest]."""
    ids = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    mask = [torch.ones_like(sequence) for sequence in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id, padding_side=side),
        "attention_mask": pad_sequence(mask, batch_first=True, padding_value=0, padding_side=side),
    }


def score_sequences(
    model: nn.Module,
    sequences: Sequence[list[int]],
    *,
    pad_token_id: int,
    autocast: torch.dtype | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    layout: Layout | None = None,
) -> Tensor:
    """Scores of S token sequences, float32 [S] on the CPU, in the order given.

    Arguments:
        model: any sequence-classification model with one label, wrapped or not; its train or eval mode is restored.
        autocast: the dtype of the training run's autocast, so that scores are computed as they were trained.
        tokens_per_batch: upper bound of a batch's size in tokens (a single longer sequence gets its own batch).
        layout: a forest, with each shared beginning once, or a batch padded on one side. Default: a forest where the
            model takes one (`packed.share_prefixes`).
    """
    scores = torch.empty(len(sequences))
    was_training = model.training
    model.eval()
    device = _device(model)
    context = torch.autocast(device.type, autocast) if autocast not in (None, torch.float32) else nullcontext()
    layout = layout or ("forest" if sharing_model(model) is not None else "right")
    rotation = rotation_of(model)
    with torch.no_grad(), context, Phase("scoring", len(sequences), "sequences") as phase:
        for indices in batches(sequences, tokens_per_batch, in_order=layout == "forest", rotation=rotation):
            if rotation is not None:
                forget_lengths(model)
            members = [sequences[i] for i in indices]
            if layout == "forest":
                batch = forest_batch(members, pad_token_id, row_multiple(model))
            else:
                batch = pad_batch(members, pad_token_id, layout)
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            scores[indices] = logits[:, 0].float().cpu()
            phase.advance(len(indices))
    model.train(was_training)
    return scores


def _device(model: nn.Module) -> torch.device:
    """Device for inputs: that of the first weight not on the meta device, where accelerate keeps offloaded weights."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def batches(
    sequences: Sequence[list[int]],
    tokens_per_batch: int,
    *,
    in_order: bool,
    rotation: Callable[[int], int] | None = None,
) -> Iterator[list[int]]:
    """Indices of the sequences that are scored together.

    In sorted order, sequences with equal beginnings share a batch. Otherwise the longest come first, so that padding
    is short and too large a batch fails at once.

    Arguments:
        rotation: sequences share a batch only where it gives their lengths the same number (`rotary.rotation_of`).
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__ if in_order else lambda i: -len(sequences[i]))
    if rotation is not None:
        order.sort(key=lambda i: -rotation(len(sequences[i])))  # stable: the order above within each
    batch: list[int] = []
    longest = 0
    for i in order:
        full = max(longest, len(sequences[i])) * (len(batch) + 1) > tokens_per_batch
        other = (
            rotation is not None and bool(batch) and rotation(len(sequences[batch[0]])) != rotation(len(sequences[i]))
        )
        if batch and (full or other):
            yield batch
            batch, longest = [], 0
        batch.append(i)
        longest = max(longest, len(sequences[i]))
    if batch:
        yield batch
