"""Hashes by which a file, or a base, is known again."""

import hashlib
import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from qlora_rm.artifacts.merging.checkpoint import model_files
from qlora_rm.errors import UserError
from qlora_rm.progress import Phase, counted

SEALED = (
    "*.safetensors",
    "tokenizer*.json",
    "*.model",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.jinja",
)
"""Files that decide a score and that nobody edits by hand; configs, which people do, are checked by what they say."""

SAMPLES = 64
SAMPLE_BYTES = 4096


def hash_file(path: Path) -> str:
    """sha256 of the whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """File name -> sha256 of a model folder's weights and tokenizer; `known` hashes are not computed again."""
    known = known or {}
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and any(fnmatch(p.name, s) for s in SEALED))
    hashing = Phase("hashing", len(names), "files")
    return {name: known.get(name) or hash_file(folder / name) for name in counted(names, hashing)}


def changed_files(folder: str, sealed: dict[str, str]) -> list[str]:
    """What happened to the files of `folder` since they were sealed, one line each."""
    lines = []
    for name, sha256 in counted(sealed.items(), Phase("hashing", len(sealed), "files")):
        path = Path(folder) / name
        if not path.is_file():
            lines.append(f"{name} is gone")
        elif hash_file(path) != sha256:
            lines.append(f"{name} has changed")
    return lines


def fingerprint(name_or_path: str, revision: str | None = None) -> str | None:
    """sha256 over names, sizes, headers and samples of a base's safetensors files; None where it has none.

    Any other training of the same shapes changes every sample; hashing all of a 70B base would take minutes.
    """
    try:
        files = model_files(name_or_path, revision)
    except (OSError, UserError):
        return None
    return sampled(files) if files else None


def sampled(files: Iterable[Path]) -> str:
    """sha256 over files' names, sizes and samples of their bytes; of safetensors files their headers whole."""
    digest = hashlib.sha256()
    for path in files:
        size = os.path.getsize(path)
        with path.open("rb") as file:
            digest.update(f"{path.name} {size} ".encode())
            if path.suffix == ".safetensors" and size > 8:
                digest.update(file.read(min(8 + int.from_bytes(file.read(8), "little"), size)))
            for place in range(SAMPLES):
                file.seek(size * place // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
