"""Hashes of large files, kept between commands: a file that is not new is hashed once.

A hash is found again only for the same path, device, inode, size, and times of change. The kernel sets the time of a change
(ctime); unlike that of a modification, nobody can set it back without setting the machine's clock.
"""

import hashlib
import os
import time
from pathlib import Path

from qlora_rm.surroundings import cache_home

SMALL = 1 << 20
"""Bytes below which a file is always hashed."""

SETTLED = 2.0
"""Seconds since the last change from which a hash is kept: within them a further change may have the same time."""

LIMIT = 2000
"""Hashes kept; the oldest ones are removed beyond it."""


def hash_file(path: Path) -> str:
    """sha256 of the whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_hash(path: Path) -> str:
    """sha256 of the whole file; a large one is not read again where its hash is kept.

    Without a folder of this user's own that can be written to, nothing is kept.
    """
    before = path.stat()
    folder = _folder() if before.st_size >= SMALL else None
    if folder is None:
        return hash_file(path)
    kept = folder / _key(path, before)
    try:
        found = kept.read_text(encoding="ascii")
    except (OSError, ValueError):
        found = ""
    if len(found) == 64:
        return found
    found = hash_file(path)
    after = path.stat()
    settled = time.time() - after.st_ctime > SETTLED
    if settled and _key(path, before) == _key(path, after):
        _keep(kept, found)
    return found


def _key(path: Path, found: os.stat_result) -> str:
    facts = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return hashlib.sha256(repr((str(path.resolve()), *facts)).encode()).hexdigest()


def _folder() -> Path | None:
    """Where hashes are kept: a folder that only this user can write to; None where there is none."""
    folder = cache_home() / "qlora_rm" / "hashes"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    ours = found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if ours and folder.is_absolute() and os.access(folder, os.W_OK) else None


def _keep(kept: Path, found: str) -> None:
    beside = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        beside.write_text(found, encoding="ascii")
        beside.replace(kept)
        others = sorted(kept.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in others[:-LIMIT]:
            old.unlink(missing_ok=True)
    except OSError:  # a full disk, or another process that removes the same: the next command hashes again
        pass
