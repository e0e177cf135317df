"""The token that a server and its clients share."""

import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from qlora_rm.errors import UserError

TOKEN_VARIABLE = "QLORA_RM_TOKEN"


def read_token(file: str | None) -> str | None:
    """Return the first line of `file`; without a file, the environment variable, or None if it is empty or unset.

    The command line cannot give a token, since every user of the machine can read it.

    Raises:
        UserError: the file cannot be read, or holds no token that a header can carry.
    """
    if file is None:
        name, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            return None
    else:
        name = f"--token_file {file}"
        try:
            token = Path(file).read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name} cannot be read: {error}.") from error
    if not (token and token.isascii() and token.isprintable()):
        raise UserError(f"{name} holds no token on its first line: it must be of printable ASCII characters.")
    return token


def authorization(token: str) -> str:
    """Return the value of the Authorization header."""
    return f"Bearer {token}"


def is_authorized(given: Sequence[str], token: str) -> bool:
    """Return whether the only Authorization header carries `token`; the scheme's case does not matter (RFC 9110)."""
    if len(given) != 1:
        return False
    scheme, _, credentials = given[0].partition(" ")
    matches = hmac.compare_digest(credentials.strip(" ").encode(), token.encode())
    return matches and scheme.lower() == "bearer"
