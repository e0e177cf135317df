"""A cache of large files' hashes across commands: a file is hashed again only if it changed.

A hash is reused only for the same path, device, inode, size, and times of modification and change. The kernel sets the
change time (ctime). Unlike the modification time, nobody can set it back without setting the machine's clock.
"""

import hashlib
import os
import time
from pathlib import Path

from qlora_rm.surroundings import cache_home

SMALL = 1 << 20
"""Size below which a file is always hashed, in bytes."""

SETTLED = 2.0
"""Minimum age of the last change for a hash to be cached, in seconds: a later change might get the same time."""

LIMIT = 2000
"""Number of cached hashes; beyond it the oldest are removed."""


def hash_file(path: Path) -> str:
    """sha256 of the complete file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_hash(path: Path) -> str:
    """sha256 of the complete file; a large file is not read again if its hash is cached.

    Nothing is cached without a writable folder that belongs to this user alone.
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
    """Return the cache folder, which only this user can write to, or None."""
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
    except OSError:  # a full disk, or another process removing the same file: the next command hashes again
        pass
