"""What a command meets outside itself: the encoding of its streams and words, and a home that may not be written to."""

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

    What the encoding of a locale lacks is printed as an escape. ASCII is the encoding of the locale C with Python's UTF-8
    mode turned off; it gives way to UTF-8, as that mode would have it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            ascii_only = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding="utf-8" if ascii_only else None, errors="backslashreplace")


def require_readable(words: Sequence[str]) -> None:
    """Refuse file names and texts that this locale cannot decode; libraries would fail on them one after the other.

    Raises:
        UserError: a word, the working directory, or the folder of this installation holds such bytes.
    """
    encoding = codecs.lookup(sys.getfilesystemencoding()).name
    for word in (*words, os.getcwd(), __file__):
        if encoding != "utf-8" and any("\ud800" <= character <= "\udfff" for character in word):
            shown = os.fsencode(word).decode("utf-8", "backslashreplace")
            raise UserError(f"This locale's encoding is {encoding}, which cannot hold {shown!r}. Set PYTHONUTF8=1.")


def prepare_caches() -> None:
    """Give libraries a folder for their caches where HOME cannot be written to, for this process and those it starts.

    Variables that are set stay as they are, and so does a hub cache that can only be read: models may be in it.
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
    """Where each library keeps its cache unless the variable says otherwise."""
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
    """The user's folder for caches, which may not exist or not be writable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or _in_home(".cache"))


def _in_home(name: str) -> Path:
    return Path(os.path.expanduser("~"), name)


def _can_write(folder: Path) -> bool:
    """Whether `folder` could be made and files in it; tried in the nearest folder that exists, which is left as it was."""
    if not folder.is_absolute():
        return False
    try:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryDirectory(prefix=".qlora_rm-", dir=there):
            return True
    except OSError:
        return False


def _own_temporary_folder() -> Path:
    """The same folder at every start, so that caches last; another where that name is somebody else's."""
    folder = Path(tempfile.gettempdir(), f"qlora_rm-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        is_ours = found.st_uid == os.getuid() and not found.st_mode & 0o077 and not folder.is_symlink()
    except OSError:
        is_ours = False
    return folder if is_ours else Path(tempfile.mkdtemp(prefix="qlora_rm-"))
