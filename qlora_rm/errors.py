"""The exceptions that are written for people, and what is told of the others."""


class UserError(Exception):
    """A mistake the user can mend: what is wrong, where, and the way out, in one message.

    The doors (`cli.py`, `train.py`) print it without a traceback and exit with status 2. Everything else that is
    raised is a defect of ours or of a library, and keeps its traceback.
    """


class Terminated(Exception):
    """A run that was told to end (SIGTERM) has saved a checkpoint and ends; the doors exit with status 143.

    143 is what a shell reports of a process that SIGTERM has ended (128 + 15): schedulers count it as taken away, not
    as failed, and whether the signal came before the first step or during training, what to do is the same: start
    the command again with `--resume auto`.
    """


def first_line(error: Exception) -> str:
    """What a library said, without the lines that follow; its kind of error where it said nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
