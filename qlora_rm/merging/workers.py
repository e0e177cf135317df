"""Threads that work on pieces of a weight concurrently."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class Workers:
    """As many threads as torch would use, each computing alone.

    OpenMP would split every small operation between threads, which spin while they wait, on cores that hashing and
    writing need: a merge took twice as long.
    """

    def __enter__(self) -> Self:
        self._count = torch.get_num_threads()
        torch.set_num_threads(1)  # also applies to every thread started from now on
        self._pool = ThreadPoolExecutor(self._count)
        return self

    def map(self, call: Callable[[int, int], Tensor], spans: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
        """Yield the results of `call` for each (start, stop), in order. Computes a few spans ahead of the caller."""
        coming: deque[Future[Tensor]] = deque()
        for span in spans:
            coming.append(self._pool.submit(call, *span))
            if len(coming) > 2 * self._count:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._count)
