"""The sha256 of every byte of a base's weights (`--verify_base full`), for cases where samples are not enough."""

import hashlib
from pathlib import Path

from qlora_rm.backbone.paths import is_local
from qlora_rm.backbone.safetensors_reader import model_files
from qlora_rm.errors import UserError
from qlora_rm.progress import Phase

CHUNK = 1 << 24
KINDS = ("*.safetensors", "*.bin")


def hash_of_base(name_or_path: str, revision: str | None = None) -> str | None:
    """sha256 over the names and contents of a base's weight files; None if there are none or they cannot be read."""
    try:
        files = _files(name_or_path, revision)
    except (OSError, UserError):
        return None
    if not files:
        return None
    digest = hashlib.sha256()
    with Phase("hashing the base", sum(file.stat().st_size for file in files) / 1e6, "MB") as phase:
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as opened:
                while chunk := opened.read(CHUNK):
                    digest.update(chunk)
                    phase.advance(len(chunk) / 1e6)
    return digest.hexdigest()


def _files(name_or_path: str, revision: str | None) -> list[Path]:
    if not is_local(name_or_path):
        return model_files(name_or_path, revision)
    folder = Path(name_or_path).expanduser()
    return sorted(path for kind in KINDS for path in folder.glob(kind))
