"""Model folders: what one holds, and new ones that appear complete or not at all."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from qlora_rm.backbone.paths import is_local
from qlora_rm.console import say
from qlora_rm.errors import UserError

Kind = Literal["adapter", "model"]


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


def artifact_kind(folder: str) -> Kind:
    """Whether `folder` holds an adapter or a whole model (also any hub id), by its files.

    Raises:
        UserError: neither, or a language model without a score head.
    """
    path = Path(folder)
    if not is_local(folder):
        return "model"
    if not path.is_dir():
        raise UserError(
            f"There is no folder {folder}." if not path.exists() else f"{folder} is a file, not a model folder."
        )
    if (path / "adapter_config.json").exists():
        return "adapter"
    if (path / "config.json").exists():
        return "model"
    inside = sorted(p.parent.name for name in ("adapter_config.json", "config.json") for p in path.glob(f"*/{name}"))
    hint = f" Did you mean {path / inside[-1]}?" if inside else ""
    what = "is empty" if not any(path.iterdir()) else "holds neither adapter_config.json nor config.json"
    raise UserError(f"{folder} is no reward model: it {what}.{hint}")
