"""The one exception that is written for people, and what is told of the others."""


class UserError(Exception):
    """A mistake the user can mend: what is wrong, where, and the way out, in one message.

    The doors (`cli.py`, `train.py`) print it without a traceback and exit with status 2. Everything else that is
    raised is a defect of ours or of a library, and keeps its traceback.
    """


def first_line(error: Exception) -> str:
    """What a library said, without the lines that follow; its kind of error where it said nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
