"""Read parsed JSON as dataclasses: every key present, no other, each of its type."""

import dataclasses
import difflib
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qlora_rm.errors import UserError


def read_as(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as the schema's type `kind`: a dataclass, list, dict, Literal, optional or plain type.

    Raises:
        UserError: `value` is of another type, or a word that the type does not allow; the message begins with `where`.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_object(kind, value, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        return None if value is None else read_as(inner[0], value, where)
    if origin is Literal:
        if not isinstance(value, str) or value not in inner:
            raise UserError(f"{where} is {value!r:.60}. Allowed values: {', '.join(map(repr, inner))}.")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, not {value!r:.60}.")
        return [read_as(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, not {value!r:.60}.")
        return {
            read_as(inner[0], key, f"{where}, key"): read_as(inner[1], item, f"{where}: {key:.60}")
            for key, item in value.items()
        }
    wanted: Any = {float: (int, float), Any: object}.get(kind, kind)
    if not isinstance(value, wanted) or (kind in (int, float) and isinstance(value, bool)):
        raise UserError(f"{where} must be of type {getattr(kind, '__name__', kind)}, not {value!r:.60}.")
    return value


def _read_object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be an object, not {value!r:.60}.")
    hints = get_type_hints(kind)
    for key in value.keys() - hints.keys():
        near = difflib.get_close_matches(key, hints, 1)
        raise UserError(f"{where} has an unknown key {key!r:.60}." + (f" Did you mean {near[0]!r}?" if near else ""))
    for key in hints.keys() - value.keys():
        raise UserError(f"{where} lacks the key {key!r}.")
    return kind(**{key: read_as(hint, value[key], f"{where}: {key}") for key, hint in hints.items()})
