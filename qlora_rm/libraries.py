"""What other libraries may print: what is the user's business, and nothing else.

An error always comes through, and so does a warning of a kind that is not named here. `--verbose` lets everything through
but progress bars, whose carriage returns make a log unreadable; `progress.py` counts in their place.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

from qlora_rm.console import rank_prefix, verbosity

NO_BARS = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
"""Read by the libraries when they are imported. Our own bars are tqdm's too, but say that they are not disabled."""

SILENT = {
    # Missing weights, new heads and settings of checkpoints: backbone/load.py checks them, and stops or says so.
    "TRANSFORMERS_VERBOSITY": "error",
    # Reused caches.
    "DATASETS_VERBOSITY": "error",
    # torch's C++ part: warnings about sockets while ranks meet. A rank that cannot be reached is an error.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # tokenizers warns when data workers are forked after it has used threads, unless this is set; workers tokenize nothing.
    "TOKENIZERS_PARALLELISM": "true",
}
"""Variables that take libraries' warnings away; what the user has set stays."""

ERRORS_ONLY = (
    "accelerate",  # settings that the launcher filled in; training/engine.py checks and prints the engine in force
    "bitsandbytes",  # a package of kernels that only a model hub can give is absent; nothing depends on it
    "deepspeed",
    "peft",
    "trl",
)
"""Loggers whose warnings are about the library's own defaults."""

FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
"""Categories of Python warnings that ask whoever calls a library to change the call."""

HARMLESS: dict[str, str] = {
    "The PEFT config's `base_model_name_or_path` was renamed": "artifacts/load.py holds the base against the manifest's hashes",
}
"""Beginnings (regular expressions) of other Python warnings that are silenced, each with its reason."""


def quiet_libraries() -> None:
    """Silence what asks nothing of the user; called before the libraries are imported."""
    os.environ.update({name: os.environ.get(name, value) for name, value in NO_BARS.items()})
    if verbosity() == "quiet" or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # on a terminal a download shows its own bars
    if verbosity() == "verbose":
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in SILENT.items()})
    for name in ERRORS_ONLY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(is_error)  # DeepSpeed sets this logger's level when it is imported
    if not sys.warnoptions:
        for category in FOR_DEVELOPERS:
            warnings.simplefilter("ignore", category)
        for message in HARMLESS:
            warnings.filterwarnings("ignore", message=message)
        warnings.formatwarning = one_line


def is_error(record: logging.LogRecord) -> bool:
    """Whether a log record is an error."""
    return record.levelno >= logging.ERROR


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A Python warning as our own look, with the place it comes from."""
    place = "/".join(Path(filename).parts[-3:])
    return f"{rank_prefix()}warning: {' '.join(str(message).split())} ({category.__name__}, {place}:{lineno})\n"
