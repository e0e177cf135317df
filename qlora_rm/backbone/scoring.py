"""Scores of token sequences outside the trainer: the one way evaluation, scoring and proofs read a model."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


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
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    autocast: torch.dtype | None = None,
    tokens_per_batch: int = 8192,
    padding_side: str = "right",
) -> Tensor:
    """Scores of S token sequences, float32 [S] on the CPU, in the order given.

    Arguments:
        model: any sequence-classification model with one label, in a wrapper or not; put back into the mode it was in.
        autocast: the dtype of the training run's autocast, so that scores are computed as they were trained.
        tokens_per_batch: upper bound of a batch's padded size in tokens (a single longer sequence stands alone).
    """
    scores = torch.empty(len(sequences))
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    context = torch.autocast(device.type, autocast) if autocast not in (None, torch.float32) else nullcontext()
    with torch.no_grad(), context:
        for indices in batches_by_length([len(s) for s in sequences], tokens_per_batch):
            batch = pad_batch([sequences[i] for i in indices], pad_token_id, padding_side)
            logits = model(**{name: tensor.to(device) for name, tensor in batch.items()}).logits
            scores[indices] = logits[:, 0].float().cpu()
    model.train(was_training)
    return scores


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that too large a batch fails at once."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
