"""Assignment of comparisons to optimizer steps, and to the micro-batches of a step."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

Order = Callable[[int], list[int]]
"""Function that returns the indices of all comparisons, in the order of the given epoch."""


def random_order(count: int, seed: int) -> Order:
    """Return an order with a new random permutation in each epoch."""
    return lambda epoch: torch.randperm(count, generator=_generator(seed, epoch)).tolist()


def sequential_order(count: int) -> Order:
    """Return the order of the data set, the same in each epoch."""
    return lambda epoch: list(range(count))


def length_grouped_order(lengths: Sequence[int], step: int, seed: int) -> Order:
    """Return transformers' `group_by_length` order: random, with comparisons of similar length next to each other.

    Arguments:
        step: comparisons in an optimizer step. transformers uses those of one process, so that its order depends on the
            number of processes.
    """
    return lambda epoch: get_length_grouped_indices(list(lengths), step, generator=_generator(seed, epoch))


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed + epoch)


def comparisons_kept(count: int, batch_size: int, drop_last: bool) -> int:
    """Return the number of comparisons per epoch: all, or without the last micro-batch if that is not full."""
    return count // batch_size * batch_size if drop_last else count


class StepSampler(Sampler[int]):
    """An order of the comparisons, cut into optimizer steps of full micro-batches.

    A step holds the same comparisons for any number of processes. The last step of an epoch is padded with `filler`,
    the index after the last comparison: a row of weight zero. accelerate would pad it with comparisons from the
    beginning of the epoch, which would be seen twice.

    Arguments:
        count: number of comparisons.
        batch_size: comparisons in a micro-batch.
        batches_per_step: micro-batches of all processes in one optimizer step.
        loads: cost of each comparison, in tokens. If given, the comparisons of a step are distributed so that its
            micro-batches have near-equal loads; otherwise they stay in order.
        drop_last: leave out the comparisons at the end of an epoch that do not fill a micro-batch.
    """

    def __init__(
        self,
        order: Order,
        count: int,
        batch_size: int,
        batches_per_step: int,
        *,
        loads: Sequence[int] | None = None,
        drop_last: bool = False,
    ):
        self.order, self.loads = order, loads
        self.batch_size, self.batches_per_step = batch_size, batches_per_step
        self.step = batch_size * batches_per_step
        self.kept = comparisons_kept(count, batch_size, drop_last)
        self.filler = count
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.kept // self.step) * self.step

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; called at the start of every epoch, also when a resumed run has skipped some."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)[: self.kept]
        for start in range(0, len(order), self.step):
            members = order[start : start + self.step]
            for batch in self._in_order(members) if self.loads is None else self._evened(members, self.loads):
                yield from batch + [self.filler] * (self.batch_size - len(batch))

    def _in_order(self, members: list[int]) -> list[list[int]]:
        return [members[start : start + self.batch_size] for start in range(0, self.step, self.batch_size)]

    def _evened(self, members: list[int], loads: Sequence[int]) -> list[list[int]]:
        """Assign members, heaviest first, to the lightest micro-batch that has room (longest processing time first)."""
        batches: list[list[int]] = [[] for _ in range(self.batches_per_step)]
        load = [0] * self.batches_per_step
        for member in sorted(members, key=lambda i: -loads[i]):
            lightest = min((b for b, batch in enumerate(batches) if len(batch) < self.batch_size), key=load.__getitem__)
            batches[lightest].append(member)
            load[lightest] += loads[member]
        return batches
