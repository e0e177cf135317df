"""Permissions of saved files. safetensors writes through temporary files, which only their owner may read."""

import os
import stat
from pathlib import Path

OWNER_ONLY = 0o600
WEIGHTS = ("*.safetensors",)


def open_to_umask(folder: Path, *, below: bool = True) -> None:
    """Give weight files in `folder` the permissions that the process's umask gives to new files.

    safetensors 0.8 leaves them at 0600 whatever the umask says, so that a group cannot read a shared model.
    """
    mode = 0o666 & ~_umask()
    for pattern in WEIGHTS:
        for path in folder.rglob(pattern) if below else folder.glob(pattern):
            if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) == OWNER_ONLY != mode:
                path.chmod(mode)


def _umask() -> int:
    """Return this process's umask; outside Linux it can only be read by setting another one."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("Umask:")[1].split()[0], 8)
    except (OSError, IndexError, ValueError):
        known = os.umask(0o077)
        os.umask(known)
        return known
