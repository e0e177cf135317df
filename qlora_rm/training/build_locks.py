"""Removal of build locks that a killed process left behind: torch waits for them forever.

torch 2.13 creates a file named `lock` while it compiles an extension, such as DeepSpeed's, and removes it afterwards.
If the process is killed in between, every later run waits for that file. Remove once torch includes pytorch #190543
(issue #189245).
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from qlora_rm.console import WARNING, say

STALE_AFTER = 600.0
"""Seconds after which a lock that no local process holds counts as stale; until then another machine may hold it."""
LOOK_EVERY = 5.0


@contextmanager
def clearing_build_locks() -> Iterator[None]:
    """Remove stale locks, immediately and then every few seconds while the block runs."""
    done = threading.Event()

    def look() -> None:
        while True:
            for lock in stale_locks(build_root()):
                with suppress(OSError):
                    lock.unlink()
                    say(f"{WARNING}removed {lock}, which a killed process left while it compiled an extension")
            if done.wait(LOOK_EVERY):
                return

    watcher = threading.Thread(target=look, name="locks of extensions", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def build_root() -> Path:
    """Return the folder in which torch compiles extensions."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def stale_locks(root: Path) -> list[Path]:
    """Return build locks below `root` that are older than `STALE_AFTER` and that no local process has open."""
    old = []
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime > STALE_AFTER:
                old.append(lock)
    held = _open_files() if old else set()
    return [lock for lock in old if str(lock.resolve()) not in held]


def _open_files() -> set[str]:
    """Return the paths of files that processes of this machine have open, as far as they are visible."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            found.add(os.readlink(link))
    return found
