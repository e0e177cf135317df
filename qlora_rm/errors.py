"""The one exception that is written for people."""


class UserError(Exception):
    """A mistake the user can mend: what is wrong, where, and the way out, in one message.

    The doors (`cli.py`, `train.py`) print it without a traceback and exit with status 2. Everything else that is
    raised is a defect of ours or of a library, and keeps its traceback.
    """
