"""`COMPLETE`, the file that makes a checkpoint count: the size and sha256 of every file that affects the result.

It is written last, after everything else has reached the disk. While a checkpoint is written or removed, `INCOMPLETE` is there
instead. It distinguishes a folder that a kill left half written from a damaged one and from other programs' folders.
"""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from qlora_rm.artifacts.hashes import hash_file
from qlora_rm.progress import Phase

WHOLE = "COMPLETE"
UNFINISHED = "INCOMPLETE"
OWN = ("progress.json", "run_terms.json")
"""Files that only this project writes into a checkpoint."""
NOT_DECIDING = ("*.md", "*.log", "*.png", "*.py", "events.out.*", "training_args.bin", WHOLE, f".{WHOLE}", UNFINISHED)
"""Files that a resumed run does not read: they may be changed or deleted."""
READ_BY_LOADERS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.json")
"""Files that transformers, PEFT or DeepSpeed read if they find them, whether the run wrote them or not."""
MADE_LATER = ("latest_universal", "*_universal/*", ".universal/*")
"""DeepSpeed's universal form, which is made again if `COMPLETE` does not list it (`zero_resharding.py`)."""
FORMAT = 2
THREADS = 4


class Entry(NamedTuple):
    """What `COMPLETE` records of a file; sha256 is None if an earlier version recorded sizes only."""

    bytes: int
    sha256: str | None


class NotWhole(Exception):
    """Why `COMPLETE` cannot be read."""


def read_mark(folder: Path) -> dict[str, Entry]:
    """Return the entries of `COMPLETE` by file name, relative to `folder`.

    Raises:
        NotWhole: it is missing, or has a format that this project does not write.
    """
    path = folder / WHOLE
    if not path.exists():
        raise NotWhole(_without_mark(folder))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = _entries(content)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise NotWhole(f"its {WHOLE} cannot be read ({error or type(error).__name__})") from None
    for name in entries:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise NotWhole(f"its {WHOLE} lists {name!r}, which is outside the folder")
    return entries


def _entries(content: object) -> dict[str, Entry]:
    if not isinstance(content, dict):
        raise TypeError(f"it holds {content!r:.40} instead of a mapping")
    if "format" not in content:  # sizes only, by name
        return {name: Entry(_size(size), None) for name, size in content.items()}
    if content["format"] != FORMAT or not isinstance(content.get("files"), dict):
        raise TypeError(f"its format is {content['format']!r:.40}, this version reads {FORMAT}")
    return {name: Entry(_size(of["bytes"]), _sha256(of["sha256"])) for name, of in content["files"].items()}


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r:.40} is no size")
    return value


def _sha256(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no sha256")
    return value


def _without_mark(folder: Path) -> str:
    if (folder / UNFINISHED).exists():
        return "it was cut off while it was saved or removed"
    if is_empty(folder):
        return "it is empty"
    if any((folder / name).exists() for name in OWN):
        return f"its {WHOLE} file is missing"
    return f"it was not made by qlora-rm: it has no {WHOLE} file"


def write_mark(folder: Path, known: Mapping[str, Entry] | None = None) -> Path:
    """Write `.COMPLETE`, which a rename turns into `COMPLETE`; return its path.

    Arguments:
        known: entries that need not be computed again.
    """
    known = known or {}
    names = [name for name in files_of(folder) if _decides(name)]
    hashes = _hashes(folder, [name for name in names if name not in known])
    entries = {
        name: known[name] if name in known else Entry((folder / name).stat().st_size, hashes[name]) for name in names
    }
    beside = folder / f".{WHOLE}"
    content = {"format": FORMAT, "files": {name: entry._asdict() for name, entry in entries.items()}}
    beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return beside


def fault(folder: Path, *, contents: bool = False) -> str | None:
    """Return in a few words why no run can resume from `folder`; None if it is a complete checkpoint.

    Arguments:
        contents: compare every file's sha256 too, not only its size.
    """
    if not folder.is_dir():
        return "it is a link to nothing" if folder.is_symlink() and not folder.exists() else "it is not a folder"
    try:
        entries = {name: entry for name, entry in read_mark(folder).items() if _decides(name)}
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != entry.bytes:
                return f"{name} has {size:,} bytes, and {WHOLE} lists {entry.bytes:,}"
        for name in files_of(folder):
            if name not in entries and _is_read(name):
                return f"{WHOLE} does not list {name}"
        return _changed(folder, entries) if contents else None
    except NotWhole as reason:
        return str(reason)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read ({error.strerror})"


def _changed(folder: Path, entries: Mapping[str, Entry]) -> str | None:
    hashed = {name: entry.sha256 for name, entry in entries.items() if entry.sha256 is not None}
    found = _hashes(folder, hashed)
    changed = [name for name, sha256 in hashed.items() if found[name] != sha256]
    return f"the contents of {', '.join(changed)} have changed since the save (sha256)" if changed else None


def notes_sizes_only(folder: Path) -> bool:
    """Whether a version that recorded no sha256 wrote the `COMPLETE` of a complete checkpoint."""
    return any(entry.sha256 is None for entry in read_mark(folder).values())


def files_of(folder: Path) -> list[str]:
    """Return the names of all files in and below `folder`, relative to it, sorted."""
    found = []
    for at, _, names in os.walk(folder):
        found += [(Path(at) / name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _decides(name: str) -> bool:
    return not any(fnmatch(PurePosixPath(name).name, pattern) for pattern in NOT_DECIDING)


def _is_read(name: str) -> bool:
    if any(part.startswith(".") for part in PurePosixPath(name).parts):
        return False  # written by an editor or a file manager; no loader reads hidden files
    made_later = any(fnmatch(name, pattern) for pattern in MADE_LATER)
    return _decides(name) and not made_later and any(fnmatch(PurePosixPath(name).name, one) for one in READ_BY_LOADERS)


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the sha256 of files by name; hashlib releases the GIL, so threads help."""
    names = list(names)
    sizes = {name: (folder / name).stat().st_size / 1e6 for name in names}
    hashes: dict[str, str] = {}
    with Phase("hashing", sum(sizes.values()), "MB") as phase, ThreadPoolExecutor(THREADS) as pool:
        for name, sha256 in zip(names, pool.map(hash_file, (folder / name for name in names)), strict=True):
            hashes[name] = sha256
            phase.advance(sizes[name])
    return hashes
