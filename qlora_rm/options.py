"""Command-line options from the dataclasses of `config.py`: one description per option, and no library import."""

import argparse
import types
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from qlora_rm.config import OutputConfig

T = TypeVar("T")
TRUTH = dict.fromkeys(["true", "t", "yes", "y", "1"], True) | dict.fromkeys(["false", "f", "no", "n", "0"], False)
"""Values of a flag, as transformers' parser, which `train` uses, reads them."""


def add_options(parser: argparse.ArgumentParser, config: type, only: Collection[str] | None = None) -> None:
    """Add a flag to `parser` for each field of the dataclass `config`, or for those named in `only`.

    A bool is `--name` and `--no_name` (the command's parser also reads `--name true`); a `Literal` has choices; a list takes one or
    more words.
    """
    group = parser.add_argument_group(_title(config))
    hints = get_type_hints(config)
    for item in fields(config):
        if only is None or item.name in only:
            _add(group, item, hints[item.name])


def read_options(namespace: argparse.Namespace, config: type[T]) -> T:
    """Return an instance of `config` from the parsed options; fields without an option keep their defaults."""
    given = vars(namespace)
    return config(**{item.name: given[item.name] for item in fields(config) if item.name in given})  # type: ignore[arg-type]


def output_asked(words: Sequence[str]) -> OutputConfig:
    """Return `--quiet` and `--verbose` from the arguments of `train`, or else from its YAML file.

    They are needed before the libraries are loaded. The full parser needs those libraries, and it reports mistakes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", "quiet", "verbose"):
        parser.add_argument(f"--{name}", nargs="?", const="true")
    try:
        given = {name: value for name, value in vars(parser.parse_known_args(words)[0]).items() if value is not None}
        file = yaml.safe_load(Path(given.pop("config")).read_text(encoding="utf-8")) if "config" in given else None
    except (argparse.ArgumentError, OSError, ValueError, yaml.YAMLError):
        return OutputConfig()
    told = (file if isinstance(file, dict) else {}) | given
    on = {name: TRUTH.get(str(told.get(name)).lower(), False) for name in ("quiet", "verbose")}
    return OutputConfig(**on)


def _title(config: type) -> str:
    return (config.__doc__ or config.__name__).splitlines()[0].rstrip(".")


def _add(group: Any, item: "Field[Any]", hint: Any) -> None:
    made: Any = item.default_factory
    default = item.default if made is MISSING else made()
    text = item.metadata["help"]
    if hint is bool:
        group.add_argument(f"--{item.name}", action="store_true", default=default, help=text)
        help_of_negation = f"The reverse of --{item.name}." if default else argparse.SUPPRESS
        group.add_argument(f"--no_{item.name}", dest=item.name, action="store_false", help=help_of_negation)
        return
    kind, many = _value_type(hint)
    if default not in (None, []):
        text += f" [{default}]"
    settings: dict[str, Any] = {"choices": get_args(kind)} if get_origin(kind) is Literal else {"type": kind}
    if get_origin(kind) is not Literal:
        settings["metavar"] = item.name.upper()
    group.add_argument(f"--{item.name}", default=default, nargs="+" if many else None, help=text, **settings)


def _value_type(hint: Any) -> tuple[Any, bool]:
    """Return the type of one value, and whether there may be several."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    return hint, False
