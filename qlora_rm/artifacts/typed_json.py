"""Parsed JSON read as dataclasses: every key there, no other, each of its type."""

import dataclasses
import difflib
import types
from typing import Any, get_args, get_origin, get_type_hints

from qlora_rm.errors import UserError


def read_as(kind: Any, value: Any, where: str) -> Any:
    """`value` as the schema's type `kind` (dataclass, list, optional or plain), or a `UserError` naming the place."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise UserError(f"{where} must be an object, not {value!r:.60}.")
        hints = get_type_hints(kind)
        for key in value.keys() - hints.keys():
            near = difflib.get_close_matches(key, hints, 1)
            raise UserError(f"{where} has an unknown key {key!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        for key in hints.keys() - value.keys():
            raise UserError(f"{where} lacks the key {key!r}.")
        return kind(**{key: read_as(hint, value[key], f"{where}: {key}") for key, hint in hints.items()})
    if get_origin(kind) is types.UnionType:
        return None if value is None else read_as(get_args(kind)[0], value, where)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, not {value!r:.60}.")
        return [read_as(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if get_origin(kind) is dict and isinstance(value, dict) and dataclasses.is_dataclass(get_args(kind)[1]):
        return {key: read_as(get_args(kind)[1], item, f"{where}: {key}") for key, item in value.items()}
    wanted: Any = {float: (int, float), Any: object}.get(kind, get_origin(kind) or kind)
    if not isinstance(value, wanted) or (kind in (int, float) and isinstance(value, bool)):
        raise UserError(f"{where} must be of type {getattr(kind, '__name__', kind)}, not {value!r:.60}.")
    return value
