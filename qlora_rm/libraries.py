"""Filters for what other libraries print: only what concerns the user passes.

Errors always pass, and so do warnings of kinds that are not listed here. `--verbose` lets everything pass except
progress bars, whose carriage returns make a log unreadable; `progress.py` reports progress instead.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

from qlora_rm.console import rank_prefix, verbosity

NO_BARS = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
"""The libraries read these when they are imported. Our own tqdm bars pass `disable=False`, which takes precedence."""

SILENT = {
    # Missing weights, new heads and settings of checkpoints: backbone/load.py checks them, and stops or reports them.
    "TRANSFORMERS_VERBOSITY": "error",
    # Reused caches.
    "DATASETS_VERBOSITY": "error",
    # torch's C++ part: warnings about sockets while ranks meet. A rank that cannot be reached is an error.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    # Unless this is set, tokenizers warns when data workers fork after it has used threads. Our workers never tokenize.
    "TOKENIZERS_PARALLELISM": "true",
}
"""Variables that silence libraries' warnings; values that the user has set win."""

ERRORS_ONLY = (
    "accelerate",  # settings that the launcher filled in; training/engine.py checks and prints the engine in use
    "bitsandbytes",  # it misses a kernel package that only the model hub distributes; nothing depends on it
    "deepspeed",
    "peft",
    "trl",
)
"""Loggers whose warnings are about the library's own defaults."""

FOR_DEVELOPERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
"""Categories of Python warnings that are for the developers of the calling code."""

HARMLESS: dict[str, str] = {
    "The PEFT config's `base_model_name_or_path` was renamed": "artifacts/load.py holds the base against the manifest's hashes",
}
"""Other Python warnings to silence: a regular expression for the beginning of each, and the reason."""


def quiet_libraries() -> None:
    """Silence library output that needs no action from the user; call this before importing the libraries."""
    os.environ.update({name: os.environ.get(name, value) for name, value in NO_BARS.items()})
    if verbosity() == "quiet" or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # on a terminal, downloads keep their own bars
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
    """Return whether a log record is an error."""
    return record.levelno >= logging.ERROR


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Format a Python warning like our own, with its category and the file and line that raised it."""
    place = "/".join(Path(filename).parts[-3:])
    return f"{rank_prefix()}warning: {' '.join(str(message).split())} ({category.__name__}, {place}:{lineno})\n"
