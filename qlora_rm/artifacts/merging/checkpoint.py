"""Safetensors files (https://huggingface.co/docs/safetensors) read one tensor at a time.

The library maps files into memory, and the pages that were read count as resident until nothing uses the mapping. So each
tensor gets a mapping of its own, which goes with it.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from qlora_rm.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor's place: the file, its name and number in the order of the data there, and what it is."""

    file: Path
    name: str
    number: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory of its own: pages of the file, which are copied where they are written to.

        Raises:
            UserError: the file is broken or was cut short.
        """
        with _opened(self.file) as file:
            return file.get_tensor(self.name)

    def like(self) -> Tensor:
        """A stand-in without data, on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Checkpoint(dict[str, Stored]):
    """Tensor name -> place, of a model's safetensors files, one or many."""

    @classmethod
    def of_model(cls, name_or_path: str, revision: str | None = None) -> Self | None:
        """The files of a folder or hub id; None where it has no safetensors.

        Raises:
            UserError: a file is missing, broken or cut short.
        """
        files = model_files(name_or_path, revision)
        return cls.of_files(files) if files else None

    @classmethod
    def of_files(cls, files: list[Path]) -> Self:
        found = cls()
        for file in files:
            found.update(_places(file))
        return found


def model_files(name_or_path: str, revision: str | None = None) -> list[Path]:
    """The safetensors files of a model folder or hub id, in the order of their names; none where there are none."""

    def fetch(name: str) -> Path | None:
        path = cached_file(name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if path is None else Path(path)

    whole = fetch(SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [whole]
    index = fetch(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is broken: {error}. Fetch or save it again.") from error
    files = {name: fetch(name) for name in names}
    lost = [name for name, file in files.items() if file is None]
    if lost:
        raise UserError(f"{name_or_path} lacks {lost[0]}, which its {SAFE_WEIGHTS_INDEX_NAME} names. Fetch it again.")
    return [file for file in files.values() if file is not None]


def _places(file: Path) -> dict[str, Stored]:
    with _opened(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
    unknown = {place.get_dtype() for place in slices.values()} - DTYPES.keys()
    if unknown:
        raise UserError(f"{file} holds tensors of a dtype that is not known here: {', '.join(sorted(unknown))}.")
    return {
        name: Stored(file, name, number, DTYPES[place.get_dtype()], tuple(place.get_shape()))
        for number, (name, place) in enumerate(slices.items())
    }


def _opened(file: Path) -> Any:
    """By the library, which checks header, places and length."""
    try:
        return safe_open(file, framework="pt")
    except Exception as error:  # safetensors raises its own error type for a truncated file
        raise UserError(f"{file} is broken or cut short: {error}") from error


def size_of(files: list[Path]) -> int:
    """Bytes on disk."""
    return sum(os.path.getsize(file) for file in files)
