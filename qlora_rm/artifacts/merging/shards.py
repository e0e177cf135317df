"""Safetensors files written one tensor at a time.

The library's writer takes a file's tensors all at once. Here all names, dtypes and shapes are known before the first
value, so headers and index are written first, and values are appended in the order of the plan.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from qlora_rm.artifacts.merging.checkpoint import NAMES

SHARD_BYTES = 5_000_000_000
"""A new file is begun where one would grow beyond this; a larger tensor stands alone."""

WAITING = 8
"""Pieces that may wait to be written."""


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
        sha256: file name -> hash of what was written, complete once the context has ended.
    """

    def __init__(self, folder: Path, wanted: Sequence[Wanted]):
        self.sha256: dict[str, str] = {}
        self._folder, self._files = folder, _divided(wanted)
        self._coming = [(file, tensor) for file, tensors in self._files.items() for tensor in tensors]
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._waiting: list[Future[None]] = []
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
        """Append the tensor `name`, given in contiguous pieces of the planned dtype; another thread writes them."""
        file, wanted = self._coming.pop(0)
        assert wanted.name == name, f"{wanted.name} is next, not {name}"
        if self._open is None or self._open.name != file:
            self._finish()
            self._open = _File(self._folder, file, self._files[file])
        size = 0
        for piece in pieces:
            assert piece.dtype == wanted.dtype, (name, piece.dtype)
            size += piece.nbytes
            self._put(piece)
        assert size == wanted.nbytes, (name, size, wanted.nbytes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self._coming, f"{self._coming[0][1].name} was never written"
                self._finish()
        finally:
            self._writer.shutdown(cancel_futures=True)
            if self._open is not None:
                self._open.file.close()

    def _put(self, piece: Tensor) -> None:
        assert self._open is not None
        while len(self._waiting) >= WAITING:
            self._waiting.pop(0).result()
        self._waiting.append(self._writer.submit(self._open.append, piece))

    def _finish(self) -> None:
        while self._waiting:
            self._waiting.pop(0).result()
        if self._open is not None:
            self.sha256[self._open.name] = self._open.close()
            self._open = None


class _File:
    """One file: its header at once, then its data."""

    def __init__(self, folder: Path, name: str, tensors: Sequence[Wanted]):
        places, end = {}, 0
        for tensor in tensors:
            start, end = end, end + tensor.nbytes
            dtype = NAMES[tensor.dtype]
            places[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = json.dumps({"__metadata__": {"format": "pt"}, **places}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)  # so that the data begins at a multiple of 8
        self.name, self.file, self.hash = name, (folder / name).open("wb", buffering=0), hashlib.sha256()
        self._write(len(header).to_bytes(8, "little") + header)

    def append(self, piece: Tensor) -> None:
        if piece.numel():
            self._write(piece.reshape(-1).view(torch.uint8).numpy().data)

    def _write(self, data: bytes | memoryview) -> None:
        self.hash.update(data)
        rest = memoryview(data)
        while rest:
            rest = rest[self.file.write(rest) :]

    def close(self) -> str:
        """Onto the disk: the folder is renamed into place once all files are."""
        os.fsync(self.file.fileno())
        self.file.close()
        return self.hash.hexdigest()


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
