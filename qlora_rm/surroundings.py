"""The environment of a command: the encoding of its streams and arguments, and caches where HOME is not writable."""

import codecs
import os
import sys
import tempfile
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path

from qlora_rm.console import say
from qlora_rm.errors import UserError

UNWRITABLE_HOME = "HOME cannot be written to, so libraries keep their caches in {}. To choose a folder, set {}."


def prepare_streams() -> None:
    """Make every character printable.

    Characters that the locale's encoding lacks are printed as escapes. ASCII, the encoding of the C locale with
    Python's UTF-8 mode off, is replaced by UTF-8, as that mode would do.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            ascii_only = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if ascii_only else None, errors="backslashreplace")


def require_readable(words: Sequence[str]) -> None:
    """Reject file names and texts that this locale cannot decode, before libraries fail on them.

    Raises:
        UserError: an argument, the working directory, or this installation's path holds such bytes.
    """
    encoding = codecs.lookup(sys.getfilesystemencoding()).name
    for word in (*words, os.getcwd(), __file__):
        if encoding != "utf-8" and any("\ud800" <= character <= "\udfff" for character in word):
            shown = os.fsencode(word).decode("utf-8", "backslashreplace")
            raise UserError(f"This locale's encoding is {encoding}, which cannot hold {shown!r}. Set PYTHONUTF8=1.")


def prepare_caches() -> None:
    """Move libraries' caches to a temporary folder if HOME is not writable, for this process and its children.

    Variables that are already set are kept, and so is a read-only hub cache: it may hold models.
    """
    moved = {name: folder for name, folder in _caches().items() if name not in os.environ and not _can_write(folder)}
    if Path(_hub_home()).is_dir():
        moved.pop("HF_HOME", None)
    if not moved:
        return
    instead = _own_temporary_folder()
    say(UNWRITABLE_HOME.format(instead, ", ".join(moved)))
    os.environ.update({name: str(instead / name.lower()) for name in moved})
    if not _in_home("").is_absolute():  # no HOME, and a user without a name
        os.environ["HOME"] = str(instead)


def _caches() -> dict[str, Path]:
    """Return each library's default cache folder, by the variable that overrides it."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or _in_home(".config"))
    return {
        "HF_HOME": _hub_home(),
        "HF_DATASETS_CACHE": _hub_home() / "datasets",
        "HF_MODULES_CACHE": _hub_home() / "modules",
        "MPLCONFIGDIR": config / "matplotlib",
        "TORCH_EXTENSIONS_DIR": cache_home() / "torch_extensions",
        "TRITON_CACHE_DIR": _in_home(".triton") / "cache",
    }


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME") or cache_home() / "huggingface")


def cache_home() -> Path:
    """Return the user's cache folder, which may be missing or read-only."""
    return Path(os.environ.get("XDG_CACHE_HOME") or _in_home(".cache"))


def _in_home(name: str) -> Path:
    return Path(os.path.expanduser("~"), name)


def _can_write(folder: Path) -> bool:
    """Return whether `folder` and files in it can be created; a test in the nearest existing parent leaves no trace."""
    if not folder.is_absolute():
        return False
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryDirectory(prefix=".qlora_rm-", dir=there):
            return True
    except OSError:
        return False


def _own_temporary_folder() -> Path:
    """Return the same folder at every start, so that caches persist; a new one if another user owns that name."""
    folder = Path(tempfile.gettempdir(), f"qlora_rm-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        is_ours = found.st_uid == os.getuid() and not found.st_mode & 0o077 and not folder.is_symlink()
    except OSError:
        is_ours = False
    return folder if is_ours else Path(tempfile.mkdtemp(prefix="qlora_rm-"))
