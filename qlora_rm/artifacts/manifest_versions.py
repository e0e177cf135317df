"""Upgrade a manifest file of any version to this version's schema."""

import hashlib
import json
from pathlib import Path
from typing import Any

from qlora_rm.backbone.json_files import read_json
from qlora_rm.errors import UserError

SCHEMA_VERSION = 4
RESTORE = "Restore it from the training run's output."
SINCE: dict[int, dict[str, tuple[str, ...]]] = {
    2: {"": ("history", "files"), "base": ("weights_fingerprint",), "merge": ("base",)},
    3: {"": ("noise",), "contract": ("rotary_length", "date", "trained_on", "text_as")},
    4: {"": ("content_sha256",), "base": ("weights_sha256",)},
}
"""Schema version -> the keys that it added, by the object that holds them; "" is the outermost one."""

UNKNOWN: dict[str, Any] = {"history": [], "files": {}, "noise": {}, "base": "dequantized"}
"""Value of a key that a file of an earlier version lacks; null for all other keys."""


class NoManifest(UserError):
    """There is no manifest that this version can read, so nothing can be checked against it."""


def content_of(path: Path) -> dict[str, Any]:
    """Return the parsed file with the keys of the newest schema, but its own `schema_version`; types are not checked.

    Raises:
        NoManifest: there is no file, or a newer qlora_rm wrote it.
        UserError: it is not JSON, or mixes the keys of several versions.
    """
    try:
        content = read_json(path, RESTORE)
    except FileNotFoundError:
        raise NoManifest(
            f"{path.parent} has no {path.name}: it was not written by qlora-rm, or not to the end."
        ) from None
    found = content.get("schema_version") if isinstance(content, dict) else None
    if type(found) is int and found > SCHEMA_VERSION:
        raise NoManifest(
            f"{path} has schema version {found}; this qlora_rm reads up to version {SCHEMA_VERSION}. Use the qlora_rm "
            "that wrote it, or a newer one."
        )
    if type(found) is not int or found < 1:
        raise UserError(f"{path} has schema version {found!r:.60}, which does not exist. {RESTORE}")
    return _upgraded(content, found, path)


def content_hash(content: dict[str, Any]) -> str:
    """sha256 of everything but `content_sha256`, as JSON with sorted keys and without white space.

    Raises:
        ValueError: a number is not finite.
    """
    rest = {key: value for key, value in content.items() if key != "content_sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def require_own_hash(content: dict[str, Any], path: Path) -> None:
    """Check the content against its recorded hash, if there is one.

    Raises:
        UserError: the content was changed after it was written.
    """
    recorded = content.get("content_sha256")
    if recorded is not None and recorded != content_hash(content):
        raise UserError(
            f"{path} was changed after it was written: its content_sha256 is that of other content. {RESTORE}"
        )


def _upgraded(content: dict[str, Any], found: int, path: Path) -> dict[str, Any]:
    """Add the keys of later versions to `content`.

    Raises:
        UserError: a key has a value that the file's own version did not have: the version number was changed.
    """
    content = dict(content)
    for since in range(found + 1, SCHEMA_VERSION + 1):
        for name, keys in SINCE[since].items():
            holder = content if not name else content.get(name)
            if not isinstance(holder, dict):
                continue
            for key in keys:
                if holder.get(key, UNKNOWN.get(key)) != UNKNOWN.get(key):
                    where = f"{path}: {name}" if name else str(path)
                    raise UserError(f"{where} has the key {key!r}, which version {found} does not have. {RESTORE}")
            holder = holder | {key: UNKNOWN.get(key) for key in keys}
            content = holder if not name else content | {name: holder}
    return content
