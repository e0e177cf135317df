"""Which comparisons stand in which micro-batch: a seeded order in which every rank has the same amount to compute."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class EvenLoadSampler(Sampler[int]):
    """A random order of the comparisons whose optimizer steps fall into micro-batches of near-equal load.

    Comparisons change places only within their optimizer step, so a step holds the pairs that the seed gives it,
    whatever the number of processes. All micro-batches have the same size; transformers' `batch_rebalance` evens
    loads out by their sizes, and a mean over each would then weigh comparisons differently.

    The last step of an epoch is made full with `filler`, the index after the last comparison: a row that counts for
    nothing. accelerate would fill it with comparisons from the beginning of the epoch, as many as the number of
    processes makes necessary, and they would be seen twice.

    Arguments:
        loads: cost of each comparison, in tokens.
        batch_size: comparisons in a micro-batch.
        batches_per_step: micro-batches of all processes in one optimizer step.
    """

    def __init__(self, loads: Sequence[int], batch_size: int, batches_per_step: int, seed: int):
        self.loads, self.batch_size, self.batches_per_step, self.seed = loads, batch_size, batches_per_step, seed
        self.step = batch_size * batches_per_step
        self.filler = len(loads)
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.loads) // self.step) * self.step

    def filled_up(self, global_step: int) -> float:
        """Rows for each comparison in the optimizer step that follows `global_step` steps: 1, but more in the last step
        of an epoch, where the mean over its rows is too small by this factor."""
        steps = len(self) // self.step
        members = len(self.loads) - (steps - 1) * self.step
        return self.step / members if global_step % steps == steps - 1 else 1.0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of every epoch, also when a resumed run has skipped some."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.loads), generator=generator).tolist()
        for start in range(0, len(order), self.step):
            yield from self._evened(order[start : start + self.step])

    def _evened(self, members: list[int]) -> Iterator[int]:
        """Heaviest first, each to the lightest micro-batch that has room (longest processing time first)."""
        batches: list[list[int]] = [[] for _ in range(self.batches_per_step)]
        load = [0] * self.batches_per_step
        for member in sorted(members, key=lambda i: -self.loads[i]):
            lightest = min((b for b, batch in enumerate(batches) if len(batch) < self.batch_size), key=load.__getitem__)
            batches[lightest].append(member)
            load[lightest] += self.loads[member]
        for batch in batches:
            yield from batch + [self.filler] * (self.batch_size - len(batch))
