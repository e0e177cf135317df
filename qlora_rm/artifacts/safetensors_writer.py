"""Write safetensors files one tensor at a time.

The library's writer needs all tensors of a file at once. Here all names, dtypes and shapes are known before the first
value. Headers and index are written first, then values are appended in the planned order.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from qlora_rm.backbone.safetensors_reader import NAMES

SHARD_BYTES = 5_000_000_000
"""Size beyond which a new file is started, in bytes; a larger tensor gets its own file."""

WAITING_BYTES = 32_000_000
"""Bytes that may wait to be written in addition to one piece, which is a full tensor if layouts were converted."""

FLUSH_BYTES = 128_000_000
"""Bytes flushed to disk at a time during the merge; otherwise everything would be flushed at the end."""


@dataclass(frozen=True)
class Wanted:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Shards:
    """The files of one model, open for writing in the order of `wanted`.

    Attributes:
        sha256: file name -> hash of the written bytes, complete once the context has ended.
    """

    def __init__(self, folder: Path, wanted: Sequence[Wanted]):
        self.sha256: dict[str, str] = {}
        self._folder, self._files = folder, _divided(wanted)
        self._coming = [(file, tensor) for file, tensors in self._files.items() for tensor in tensors]
        self._open: _File | None = None

    def __enter__(self) -> Self:
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": sum(t.nbytes for _, t in self._coming)},
                "weight_map": {t.name: file for file, t in self._coming},
            }
            (self._folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        return self

    def write(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Append the tensor `name`, in contiguous pieces of the planned dtype."""
        file, wanted = self._coming.pop(0)
        assert wanted.name == name, f"{wanted.name} is next, not {name}"
        if self._open is None or self._open.name != file:
            self._finish()
            self._open = _File(self._folder, file, self._files[file])
        size = 0
        for piece in pieces:
            assert piece.dtype == wanted.dtype, (name, piece.dtype)
            size += piece.nbytes
            self._open.append(piece)
        assert size == wanted.nbytes, (name, size, wanted.nbytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self._coming, f"{self._coming[0][1].name} was never written"
                self._finish()
        finally:
            if self._open is not None:
                self._open.abandon()

    def _finish(self) -> None:
        if self._open is not None:
            self.sha256[self._open.name] = self._open.close()
            self._open = None


class _File:
    """One file: its header first, then its data, which one thread hashes and writes and another flushes."""

    def __init__(self, folder: Path, name: str, tensors: Sequence[Wanted]):
        places, end = {}, 0
        for tensor in tensors:
            start, end = end, end + tensor.nbytes
            dtype = NAMES[tensor.dtype]
            places[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = json.dumps({"__metadata__": {"format": "pt"}, **places}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # so that the data begins at a multiple of 8
        self.name, self._file, self._hash = name, (folder / name).open("wb", buffering=0), hashlib.sha256()
        self._writer, self._flusher = ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[int]] = deque()
        self._waiting_bytes = 0
        self._unflushed, self._flushed = 0, Future[None]()
        self._flushed.set_result(None)
        self._put(memoryview(len(header).to_bytes(8, "little") + header))

    def append(self, piece: Tensor) -> None:
        if piece.numel():
            self._put(piece.reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> str:
        """Flush to disk, since the folder is renamed once all files are written; return the sha256."""
        self._await(0)
        self._flushed.result()
        self._stop()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._hash.hexdigest()

    def abandon(self) -> None:
        self._stop()
        self._file.close()

    def _put(self, data: memoryview) -> None:
        self._await(WAITING_BYTES)
        self._waiting.append(self._writer.submit(self._write, data))
        self._waiting_bytes += len(data)

    def _await(self, nbytes: int) -> None:
        """Wait until at most `nbytes` bytes are pending."""
        while self._waiting and self._waiting_bytes > nbytes:
            self._waiting_bytes -= self._waiting.popleft().result()

    def _write(self, data: memoryview) -> int:
        size = len(data)
        self._hash.update(data)
        while data:
            data = data[self._file.write(data) :]
        self._unflushed += size
        if self._unflushed >= FLUSH_BYTES:
            self._flushed.result()
            self._unflushed, self._flushed = 0, self._flusher.submit(os.fsync, self._file.fileno())
        return size

    def _stop(self) -> None:
        for thread in (self._writer, self._flusher):
            thread.shutdown(cancel_futures=True)


def _divided(wanted: Sequence[Wanted]) -> dict[str, list[Wanted]]:
    """File name -> its tensors."""
    parts: list[list[Wanted]] = [[]]
    for tensor in wanted:
        if parts[-1] and sum(t.nbytes for t in parts[-1]) + tensor.nbytes > SHARD_BYTES:
            parts.append([])
        parts[-1].append(tensor)
    if len(parts) == 1:
        return {SAFE_WEIGHTS_NAME: parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, start=1)}
