"""Recipes and launch configurations that ship with the package, both in a checkout and in an installed wheel."""

import filecmp
import shutil
from pathlib import Path

from qlora_rm.console import say
from qlora_rm.errors import UserError

FOLDERS = ("recipes", "accelerate_configs", "ds_configs")
"""Folders at the top of a checkout; setup.py copies them into `qlora_rm/files` of a wheel."""


def shipped(name: str) -> Path:
    """Return the absolute path of a file or folder such as `recipes/demo.yaml`.

    Raises:
        UserError: it is missing from the installation.
    """
    for root in _roots():
        if (root / name).exists():
            return root / name
    raise UserError(f"{name} is missing from the installation in {_roots()[1]}. Install qlora_rm again.")


def _roots() -> tuple[Path, Path]:
    package = Path(__file__).resolve().parent
    return package / "files", package.parent


def as_typed(name: str) -> str:
    """Return the shipped file's path for a command: relative if it is below the working directory, else absolute."""
    path, here = shipped(name), Path.cwd().resolve()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def here_or_shipped(name: str) -> Path:
    """Return the file `name` in the working directory; if there is none, return the shipped file and print its path."""
    if not Path(name).exists() and Path(name).parts[:1] in [(folder,) for folder in FOLDERS]:
        for root in _roots():
            if (root / name).is_file():
                say(f"{name}: not in this folder, taken from {root / name}")
                return root / name
    return Path(name)


def copy_to(target: Path) -> list[Path]:
    """Copy all shipped folders into `target`; return the files that were written.

    Raises:
        UserError: a file exists with other content, in which case nothing is written; or a file cannot be written.
    """
    sources = [path for folder in FOLDERS for path in sorted(shipped(folder).rglob("*")) if path.is_file()]
    pairs = {path: target / path.relative_to(shipped(FOLDERS[0]).parent) for path in sources if path.suffix != ".pyc"}
    for source, copy in pairs.items():
        if copy.exists() and not filecmp.cmp(source, copy, shallow=False):
            raise UserError(
                f"{copy} exists and differs from the shipped file. Move it away, or copy to another folder."
            )
    new = {source: copy for source, copy in pairs.items() if not copy.exists()}
    try:
        for source, copy in new.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    except OSError as error:
        raise UserError(f"{error.filename or target} cannot be written: {error.strerror}.") from error
    return list(new.values())
