"""Tell folders from hub ids, and model folders from other folders, before a library raises an obscure error."""

import difflib
from pathlib import Path

from qlora_rm.errors import UserError


def is_local(name: str) -> bool:
    """Whether `name` means a folder: it exists, or is written as a path rather than as `owner/model`."""
    return Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def require_folder(name: str) -> None:
    """Raise `UserError` where a local `name` does not exist; hub ids are left to the library."""
    folder = Path(name).expanduser()
    if not is_local(name) or folder.exists():
        return
    near = difflib.get_close_matches(folder.name, [p.name for p in folder.parent.glob("*")], 1)
    raise UserError(f"There is no folder {name}." + (f" Did you mean {folder.parent / near[0]}?" if near else ""))


def require_model(name: str) -> None:
    """Raise `UserError` where a local `name` is not a model folder; the message names what it is instead."""
    require_folder(name)
    folder = Path(name).expanduser()
    if not is_local(name) or (folder / "config.json").exists():
        return
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{name} holds an adapter, not a backbone. To go on training it pass --adapter {name}; to make one model of "
            f"it and its base use `qlora-rm merge {name}`."
        )
    raise UserError(f"{name} is not a model folder: it holds no config.json.")
