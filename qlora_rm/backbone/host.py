"""The host memory available to a process."""

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that can be allocated without swapping or exceeding the limit of a container or a SLURM job."""
    return min(psutil.virtual_memory().available, *_rooms(CGROUPS, Path("/proc/self/cgroup")), 1 << 62)


def _rooms(root: Path, membership: Path) -> Iterator[int]:
    """Bytes left below the limit of each control group (version 2) of this process, including the outer groups."""
    try:
        line = next(line for line in membership.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    group = root / line.removeprefix("0::").lstrip("/")
    for folder in (group, *group.parents):
        try:
            limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        except OSError:
            continue
        if limit != "max":
            yield max(0, int(limit) - int(used))
