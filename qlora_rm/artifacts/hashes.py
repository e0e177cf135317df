"""Hashes that identify files and bases."""

import hashlib
import os
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path

from qlora_rm.artifacts.hash_cache import cached_hash, hash_file
from qlora_rm.artifacts.manifest_bounds import SUBFOLDER
from qlora_rm.backbone.safetensors_reader import model_files
from qlora_rm.errors import UserError
from qlora_rm.progress import Phase, counted

LOADED = (
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    "adapter_model*",
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "*.jinja",
    "*.py",
    "vllm.yaml",
    "modules.json",
    "*sentence*bert*_config.json",
)
"""Files that this project, transformers, PEFT or vLLM load if present: each affects a score, or may."""

SINCE_VERSION_4 = ("config.json", "adapter_config.json", "*.index.json", "*.py", "vllm.yaml")
"""The patterns among them that manifests of earlier versions do not list."""

PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "pytorch_model*.index.json")
"""Weights whose loading runs code; this project writes and reads safetensors."""

CONFIGURATIONS = ("config.json", "adapter_config.json", "tokenizer_config.json", "processor_config.json")
"""Files that may name code of the folder, which consumers run under `trust_remote_code`."""

SAMPLES = 64
SAMPLE_BYTES = 4096


def loaded_files(folder: Path) -> list[str]:
    """Names of the files that a consumer loads from `folder` and from the one subfolder that tokenizers read.

    Code counts only if a configuration names it (`auto_map`). Consumers do not run other scripts in the folder.
    """
    runs_code = any(_names_code(folder / name) for name in CONFIGURATIONS)
    here = [
        path.name
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and _is_any(path.name, LOADED)
        and (runs_code or path.suffix != ".py")
    ]
    beside = folder / SUBFOLDER
    more = [f"{SUBFOLDER}{path.name}" for path in beside.iterdir() if path.is_file()] if beside.is_dir() else []
    return sorted([*here, *more])


def hash_files(folder: Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """File name -> sha256 of everything a consumer loads from a model folder; `known` hashes are not computed again."""
    known, names = known or {}, loaded_files(folder)
    hashing = Phase("hashing", len(names), "files")
    return {name: known.get(name) or hash_file(folder / name) for name in counted(names, hashing)}


def changed_files(
    folder: str, sealed: dict[str, str], *, complete: bool, cached: bool = False, names: Collection[str] | None = None
) -> list[str]:
    """Changes of the files in `folder` since their hashes were recorded, one line each.

    Arguments:
        complete: the record is of this version, and lists configurations and code too.
        cached: take hashes of large files from the cache.
        names: check only these files.
    """
    lines, hashed = [], cached_hash if cached else hash_file
    wanted = {name: sha256 for name, sha256 in sealed.items() if names is None or name in names}
    for name, sha256 in counted(wanted.items(), Phase("hashing", len(wanted), "files")):
        path = Path(folder) / name
        try:
            if not path.is_file():
                lines.append(f"{name} is gone")
            elif hashed(path) != sha256:
                lines.append(f"{name} has changed")
        except OSError as error:
            lines.append(f"{name} cannot be read: {error.strerror}")
    return [*lines, *(unlisted_files(folder, sealed, complete=complete) if names is None else [])]


def unlisted_files(folder: str, sealed: dict[str, str], *, complete: bool) -> list[str]:
    """Files of `folder` that a consumer would load but that have no recorded hash, one line each."""
    return [
        f"{name} is not in the manifest's list{', and would run code' if _is_any(name, PICKLES) else ''}"
        for name in loaded_files(Path(folder))
        if name not in sealed and (complete or not _is_any(name, SINCE_VERSION_4))
    ]


def _names_code(path: Path) -> bool:
    """Whether a configuration mentions code; a file that cannot be read counts as one that does."""
    try:
        return b'"auto_map"' in path.read_bytes()
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def fingerprint(name_or_path: str, revision: str | None = None) -> str | None:
    """sha256 over names, sizes, headers and samples of a base's safetensors files; None if it has none.

    Any other training of the same shapes changes every sample. Hashing all of a 70B base would take minutes.
    """
    try:
        files = model_files(name_or_path, revision)
    except (OSError, UserError):
        return None
    return sampled(files) if files else None


def sampled(files: Iterable[Path]) -> str:
    """sha256 over files' names, sizes and samples of their bytes, and complete headers of safetensors files."""
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
