"""Read safetensors files (https://huggingface.co/docs/safetensors) one tensor at a time.

The format: 8 bytes with the header's length, a JSON header with each tensor's dtype, shape and place, then the data.
The library's own reader maps a whole file, writable, which Linux refuses for a file larger than memory. Here each
tensor has its own mapping, because mapped pages count as resident until nothing uses the mapping.
"""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from qlora_rm.backbone.json_files import parse_json, read_json
from qlora_rm.errors import UserError

REMEDY = "Fetch or save it again."
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
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
    """A tensor's place: its file, its bytes from `start` to `stop`, and their dtype and shape."""

    file: Path
    start: int
    stop: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def read(self) -> Tensor:
        """Map the tensor from pages of the file, which must not change meanwhile; pages are copied when written to.

        Raises:
            UserError: the file is truncated.
        """
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        begin = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        try:
            with self.file.open("rb") as file:
                pages = mmap.mmap(file.fileno(), self.stop - begin, access=mmap.ACCESS_COPY, offset=begin)
        except ValueError as error:  # longer than the file
            raise UserError(f"{self.file} is cut short. Fetch or save it again.") from error
        raw = torch.frombuffer(pages, dtype=torch.uint8, count=self.nbytes, offset=self.start - begin)
        if self.start % self.dtype.itemsize:  # the format allows it, processors may not
            raw = raw.clone()
        return raw.view(self.dtype).reshape(self.shape)

    def like(self) -> Tensor:
        """An empty tensor of this dtype and shape on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Checkpoint(dict[str, Stored]):
    """Tensor name -> place, over a model's safetensors files, one or many."""

    @classmethod
    def of_model(cls, name_or_path: str, revision: str | None = None) -> Self | None:
        """The tensors of a folder or hub id; None where it has no safetensors.

        Raises:
            UserError: a file is missing, broken or truncated.
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
    """The safetensors files of a model folder or hub id, sorted by name; empty where there are none."""

    def fetch(name: str) -> Path | None:
        path = cached_file(name_or_path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return None if path is None else Path(path)

    whole = fetch(SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [whole]
    index = fetch(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    content = read_json(index, REMEDY)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"{index} is broken: it has no weight_map of names of files. {REMEDY}")
    names = sorted(set(places.values()))
    if odd := [name for name in names if "/" in name or "\\" in name or not name.endswith(".safetensors")]:
        raise UserError(f"{index} names {odd[0]!r:.60}, which is no safetensors file of its folder. {REMEDY}")
    files = {name: fetch(name) for name in names}
    lost = [name for name, file in files.items() if file is None]
    if lost:
        raise UserError(f"{name_or_path} lacks {lost[0]}, which its {SAFE_WEIGHTS_INDEX_NAME} names. Fetch it again.")
    return [file for file in files.values() if file is not None]


def _places(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="np"):  # the library's own checks of header, places and length
            pass
    except Exception as error:  # safetensors raises its own error type for a truncated file
        raise UserError(f"{file} is broken or cut short: {error}") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = parse_json(opened.read(length).decode("utf-8", "replace"), f"The header of {file}", REMEDY)
    header.pop("__metadata__", None)
    unknown = {entry["dtype"] for entry in header.values()} - DTYPES.keys()
    if unknown:
        raise UserError(f"{file} holds tensors of a dtype that is not known here: {', '.join(sorted(unknown))}.")
    data = 8 + length
    return {
        name: Stored(
            file,
            data + entry["data_offsets"][0],
            data + entry["data_offsets"][1],
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
        )
        for name, entry in header.items()
    }


def size_of(files: list[Path]) -> int:
    """Bytes on disk."""
    return sum(os.path.getsize(file) for file in files)
