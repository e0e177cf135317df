"""New model folders that appear complete or not at all."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlora_rm.console import say
from qlora_rm.errors import UserError


@contextmanager
def new_folder(output: str) -> Iterator[Path]:
    """Create a temporary folder next to `output`, renamed to `output` at the end and removed after any error.

    It first removes temporary folders that killed processes have left for the same `output`.

    Raises:
        UserError: `output` exists and is not an empty folder, or cannot be created.
    """
    target = Path(output).resolve()  # follows a link: a folder cannot be renamed to a link
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder. Choose another --output, or remove it.")
    if os.path.ismount(target):
        raise UserError(f"{output} is a mount point, which no folder can be renamed to. Name a folder inside it.")
    host = socket.gethostname()
    _remove_abandoned(target, host)
    beside = target.with_name(f".{target.name}.{host}.{os.getpid()}")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from error
    try:
        yield beside
        beside.rename(target)
    except BaseException:
        shutil.rmtree(beside)
        raise


def _remove_abandoned(target: Path, host: str) -> None:
    """Remove only this host's folders: processes of another host cannot be checked from here."""
    for left in target.parent.glob(f".{target.name}.{host}.*"):
        process = left.name.rpartition(".")[2]
        if process.isdigit() and not _is_alive(int(process)):
            say(f"removed {left}, left by a process that was killed")
            shutil.rmtree(left)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
