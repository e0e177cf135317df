"""Which comparisons stand in which micro-batch: a seeded order in which every rank has the same amount to compute."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EvenLoadSampler(Sampler[int]):
    """A random order of the comparisons whose optimizer steps fall into micro-batches of near-equal load.

    Comparisons change places only within their optimizer step, so a step holds the pairs that the seed gives it,
    whatever the number of processes. All micro-batches have the same size; transformers' `batch_rebalance` evens
    loads out by their sizes, and a mean over each would then weigh comparisons differently.

    Arguments:
        loads: cost of each comparison, in tokens.
        batch_size: comparisons in a micro-batch.
        batches_per_step: micro-batches of all processes in one optimizer step.
    """

    def __init__(self, loads: Sequence[int], batch_size: int, batches_per_step: int, seed: int):
        self.loads, self.batch_size, self.batches_per_step, self.seed = loads, batch_size, batches_per_step, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.loads)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of every epoch, also when a resumed run has skipped some."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.loads), generator=generator).tolist()
        step = self.batch_size * self.batches_per_step
        for start in range(0, len(order), step):
            members = order[start : start + step]
            yield from self._evened(members) if len(members) == step else members

    def _evened(self, members: list[int]) -> Iterator[int]:
        """Heaviest first, each to the lightest micro-batch that has room (longest processing time first)."""
        batches: list[list[int]] = [[] for _ in range(self.batches_per_step)]
        load = [0] * self.batches_per_step
        for member in sorted(members, key=lambda i: -self.loads[i]):
            lightest = min((b for b, batch in enumerate(batches) if len(batch) < self.batch_size), key=load.__getitem__)
            batches[lightest].append(member)
            load[lightest] += self.loads[member]
        for batch in batches:
            yield from batch
