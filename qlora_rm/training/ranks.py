"""Exchange of values and problems between the ranks of a job."""

from typing import Any, TypeVar

import torch

from qlora_rm.errors import UserError

T = TypeVar("T")


def exchange(mine: T, world_size: int) -> list[T]:
    """Return every rank's value, in order of rank. Collective."""
    if world_size == 1:
        return [mine]
    everyones: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyones, mine)
    return everyones


def stop_together(problem: str | None, world_size: int) -> None:
    """Raise the first rank's problem on every rank, if any rank has one. Collective.

    Raises:
        UserError: the problem.
    """
    for told in exchange(problem, world_size):
        if told is not None:
            raise UserError(told)
