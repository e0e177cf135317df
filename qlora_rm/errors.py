"""The exceptions whose messages are for users, and how to shorten those of libraries."""


class UserError(Exception):
    """A mistake the user can fix; the message says what is wrong, where, and what to do.

    The entry points (`cli.py`, `train.py`) print it without a traceback and exit with status 2. Any other exception is
    a defect of this package or of a library, and keeps its traceback.
    """


class Terminated(Exception):
    """SIGTERM ended the run, which saved a checkpoint first; the entry points exit with status 143.

    A shell reports 143 (128 + 15) for a process that SIGTERM ended: schedulers count it as preempted, not as failed.
    Whether the signal came before the first step or during training, start the command again with `--resume auto`.
    """


def first_line(error: Exception) -> str:
    """Return the first line of a library's error message; the exception's type name where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
