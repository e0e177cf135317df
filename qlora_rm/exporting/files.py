"""Write the files of an exported folder. Weights are linked or copied, never loaded and saved again."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor

from qlora_rm.errors import UserError, first_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BESIDE_WEIGHTS = ("config.json", "*.py")
OF_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
)


class Placing:
    """Places files of one folder in others, as hard links where the file system supports them.

    Arguments:
        copy: always copy. A link is instant and takes no space, but a later write to one file changes the other too.
    """

    def __init__(self, copy: bool = False) -> None:
        self.copy, self.linked, self.copied = copy, 0, 0

    def place(self, source: Path, target: Path) -> None:
        """Link or copy one file."""
        if not self.copy:
            try:
                os.link(source.resolve(), target)
            except OSError:  # another file system, or one without hard links
                pass
            else:
                self.linked += 1
                return
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise UserError(f"{source} cannot be copied to {target.parent}: {error.strerror}.") from error
        self.copied += 1

    def __str__(self) -> str:
        parts = [f"{n} {word}" for n, word in ((self.linked, "linked"), (self.copied, "copied")) if n]
        return f"files of weights: {', '.join(parts)}"


def copy_small_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and model code, but no other files of a training run."""
    for pattern in (*BESIDE_WEIGHTS, *OF_TOKENIZER):
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copyfile(path, target / path.name)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        UserError: it is missing or broken.
    """
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own error type for a truncated file
        raise UserError(f"{path} is missing, broken or cut short: {first_line(error)}") from error
    with file:
        yield file


def weight_files(folder: Path) -> dict[str, list[str]]:
    """Return file name -> names of its tensors.

    Raises:
        UserError: there are no safetensors, or a file of the index is missing.
    """
    if (folder / SINGLE).exists():
        with opened(folder / SINGLE) as held:
            return {SINGLE: list(held.keys())}
    if not (folder / INDEX).exists():
        raise UserError(f"{folder} holds no {SINGLE}: export reads safetensors only.")
    files: dict[str, list[str]] = {}
    for name, file in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].items():
        files.setdefault(file, []).append(name)
    lost = [file for file in files if not (folder / file).exists()]
    if lost:
        raise UserError(f"{folder} lacks {lost[0]}, which its index names: copy the folder again.")
    return files


def place_weights(
    source: Path, target: Path, placing: Placing, more: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """Place the weights of `source` in `target`. Tensors in `more` get a file of their own.

    With `more`, all files are renumbered, because loaders ignore the index next to a file named model.safetensors.
    """
    files = weight_files(source)
    if not more:
        for file in files:
            placing.place(source / file, target / file)
        if SINGLE not in files:
            shutil.copyfile(source / INDEX, target / INDEX)
        return
    place_of: dict[str, str] = {}
    count, size = len(files) + 1, 0
    for number, (file, names) in enumerate(sorted(files.items()), start=1):
        shard = f"model-{number:05}-of-{count:05}.safetensors"
        placing.place(source / file, target / shard)
        place_of |= dict.fromkeys(names, shard)
        size += (source / file).stat().st_size
    shard = f"model-{count:05}-of-{count:05}.safetensors"
    save_file(dict(more), target / shard, metadata={"format": "pt"})
    place_of |= dict.fromkeys(more, shard)
    size += sum(tensor.nbytes for tensor in more.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place_of.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_tensor(folder: Path, name: str) -> Tensor | None:
    """Return one tensor of a folder by name, or None if it has none of that name."""
    for file, names in weight_files(folder).items():
        if name in names:
            with opened(folder / file) as held:
                return held.get_tensor(name)
    return None


def zero_bias(head: Tensor) -> Tensor:
    """Return a bias of zeros, [labels], for a head with weight [labels, H]."""
    return torch.zeros(head.shape[0], dtype=head.dtype)


def head_names(adapter: Path) -> list[str]:
    """Return the modules of an adapter's head: those whose tensors are not LoRA weights."""
    with opened(adapter / "adapter_model.safetensors") as file:
        names = [name for name in file.keys() if "lora_" not in name]  # noqa: SIM118
    return sorted({name.removeprefix("base_model.model.").rpartition(".")[0] for name in names})
