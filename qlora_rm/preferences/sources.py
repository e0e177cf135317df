"""Sources of rows: files, globs, folders, saved data sets and the hub, all read by `read_rows`."""

import difflib
import glob
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qlora_rm.config import MOST_WEIGHT, DataConfig
from qlora_rm.errors import UserError, first_line
from qlora_rm.preferences.arrow_rows import require_distinct
from qlora_rm.preferences.comparison import Origin
from qlora_rm.preferences.file_formats import MAX_ROW_BYTES, READERS, count_rows, decode_cells, ending, read_file
from qlora_rm.preferences.row_bytes import too_long
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.sizes import size_of
from qlora_rm.preferences.values import Row
from qlora_rm.progress import expect

Entry = str | Mapping[str, Any]
"""One data set as the user gives it: a path or hub id, or a mapping with the keys of `Source` except `name`."""

Rows = Iterator[tuple[Origin, Row | RowFault]]
"""The location of each row, and the row or its fault."""


@dataclass(frozen=True)
class Source:
    """One data set to read.

    Attributes:
        path: file, glob, folder, or hub id.
        config: configuration of a hub data set.
        split: split of a hub data set or saved DatasetDict; only those have splits.
        weight: how often its comparisons occur in the training set.
        columns: field -> column in the rows.
        name: for reports.
    """

    path: str
    config: str | None = None
    split: str | None = None
    weight: float = 1.0
    columns: dict[str, str] = field(default_factory=dict)
    name: str = ""


KEYS = tuple(item.name for item in fields(Source) if item.name != "name")


def sources(entries: Sequence[Entry], config: DataConfig, weights: Sequence[float] | None = None) -> list[Source]:
    """Return `entries` with defaults from `config`, each with a distinct name."""
    found = [_source(entry, config) for entry in entries]
    if weights:
        if any(source.weight != 1 for source in found):
            raise UserError("Give weights by --dataset_weights or by the entries' weight, not both.")
        found = [replace(source, weight=weight) for source, weight in zip(found, weights, strict=True)]
    stems = Counter(_stem(source.path) for source in found)
    return [
        replace(source, name=_printable(source.path if stems[_stem(source.path)] > 1 else _stem(source.path)))
        for source in found
    ]


def _printable(name: str) -> str:
    """Return a file's name for messages and Arrow tables, which must be UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def _source(entry: Entry, config: DataConfig) -> Source:
    given = {"path": entry} if isinstance(entry, str) else dict(entry)
    for key in given:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the keys are {', '.join(KEYS)}."
            raise UserError(f"Unknown key {key!r} in the dataset entry {given.get('path', entry)}{hint}")
    if not isinstance(given.get("path"), str) or not given["path"]:
        raise UserError(f"The dataset entry {entry!r} names no path.")
    weight, columns = given.get("weight", 1.0), given.get("columns") or {}
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= MOST_WEIGHT:
        raise UserError(
            f"The weight {weight!r} of {given['path']} must be a number above 0, and at most {MOST_WEIGHT:,}."
        )
    if not isinstance(columns, Mapping):
        raise UserError(f"The columns of {given['path']} must be a mapping field: column, not {columns!r}.")
    return Source(
        path=given["path"],
        config=given.get("config", config.dataset_config),
        split=given.get("split"),
        weight=float(weight),
        columns={**config.renames, **columns},
    )


def _stem(path: str) -> str:
    return path if glob.has_magic(path) else Path(path).name.split(".")[0] or path


def read_rows(source: Source, default_split: str = "train", limit: int = MAX_ROW_BYTES) -> Rows:
    """Yield every row of `source` with its columns renamed.

    Arguments:
        limit: largest size of a row in bytes; a longer row is a fault.

    Raises:
        UserError: nothing is found, a file is unreadable or empty, or no row has a renamed column.
    """
    awaited = dict(source.columns)
    columns: dict[str, None] = {}
    for origin, row in _raw_rows(source, default_split, limit):
        if isinstance(row, dict):
            if awaited:
                columns.update(dict.fromkeys(row))
                awaited = {name: column for name, column in awaited.items() if column not in row and name not in row}
            row = _renamed(row, source.columns)
            if _holds_cells(origin.file):
                row = _decoded(row)
        yield origin, row
    if awaited and columns:
        name, column = next(iter(awaited.items()))
        raise UserError(
            f"--columns {name}={column}: no row of {source.path} has a column {column!r}. "
            f"Columns found: {', '.join(columns)}."
        )


@lru_cache(maxsize=1)
def _holds_cells(file: str) -> bool:
    return ending(Path(file)).startswith((".csv", ".tsv"))


def _decoded(row: Row) -> Row | RowFault:
    try:
        return decode_cells(row)
    except RowFault as fault:
        return fault


def _renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Return `row` with each field taken from its column; a column that already has the field's name is dropped."""
    present = {name: column for name, column in columns.items() if column in row}
    if not present:
        return row
    gone = present.keys() | present.values()
    return {name: row[column] for name, column in present.items()} | {
        name: value for name, value in row.items() if name not in gone
    }


def _raw_rows(source: Source, default_split: str, limit: int) -> Rows:
    path = Path(source.path).expanduser()
    if _is_saved(path):
        yield from _saved_rows(source, path, default_split, limit)
    elif (files := _files(source.path, path)) is None:
        yield from _hub_rows(source, default_split, limit)
    else:
        if source.split is not None:
            raise UserError(f"{source.path} is read from files, which have no split {source.split!r}.")
        if (rows := count_rows(files, limit)) is not None:
            expect(rows)
        for file in files:
            name = _printable(str(file))
            for number, row in read_file(file, limit):
                yield Origin(name, number), row


def _files(name: str, path: Path) -> list[Path] | None:
    """Return the files that `name` refers to; None if it can only be a hub id."""
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if ending(file) in READERS and not file.name.startswith("."))
        if not found:
            raise UserError(f"The folder {name} holds no file ending in {', '.join(READERS)}.")
        return found
    if glob.has_magic(name):
        found = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not found:
            raise UserError(f"No file matches {name} (looked from {Path.cwd()}).")
        return found
    if name.count("/") == 1 and ending(path) not in READERS and not path.parent.exists():
        return None
    raise UserError(f"There is no file or folder {name} (looked from {Path.cwd()}).{_nearest(path)}")


def _nearest(path: Path) -> str:
    """Return a hint with the most similar existing name."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    wanted = path.absolute().relative_to(folder).parts[0]
    near = difflib.get_close_matches(wanted, [entry.name for entry in folder.iterdir()], n=1)
    return f" Did you mean {folder / near[0]}?" if near else f" {folder} is there and holds nothing of a similar name."


def _is_saved(path: Path) -> bool:
    """Return whether `path` is a folder written by `datasets`' save_to_disk."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _saved_rows(source: Source, path: Path, default_split: str, limit: int) -> Rows:
    import datasets
    from datasets.arrow_reader import ReadInstruction

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # for a damaged folder, json, Arrow and datasets raise different types
        raise UserError(
            f"The data set saved in {path} cannot be read: {first_line(error)}. The data may be incomplete."
        ) from error
    split = source.split or default_split
    if isinstance(saved, datasets.Dataset):
        if source.split is not None:
            raise UserError(f"{source.path} is one saved data set without splits; it has no {source.split!r}.")
        saved = datasets.DatasetDict({split.split("[")[0]: saved})
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({name: len(part) for name, part in saved.items()})
    except (ValueError, AssertionError) as error:
        raise UserError(f"{source.path} has no split {split!r} ({error}). Splits found: {', '.join(saved)}.") from None
    for part in parts:
        rows = saved[part.splitname].select(range(part.from_ or 0, part.to or len(saved[part.splitname])))
        yield from _of_dataset(f"{source.path}[{part.splitname}]", rows, (part.from_ or 0) + 1, limit)


def _hub_rows(source: Source, default_split: str, limit: int) -> Rows:
    import datasets

    split = source.split or default_split
    try:
        rows = datasets.load_dataset(source.path, source.config, split=split)
    except Exception as error:  # builders raise errors of any type; the message quotes them
        path = Path(source.path)
        raise UserError(
            f"{source.path} (split {split!r}) is no file or folder here (looked from {Path.cwd()}) and cannot be had "
            f"from the hub: {error}.{_nearest(path)}"
        ) from error
    yield from _of_dataset(f"{source.path}[{split}]", rows, 1, limit)


def _of_dataset(label: str, rows: Any, first: int, limit: int) -> Rows:
    import pyarrow

    if len(rows) == 0:
        raise UserError(f"{label} is empty: it holds no rows.")
    label = _printable(label)
    require_distinct(label, rows.column_names)
    expect(len(rows))
    number = first
    try:
        for number, row in enumerate(rows, start=first):
            yield Origin(label, number), row if size_of(row) <= limit else too_long(limit)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"{label} cannot be read after row {number}: {first_line(error)}. The data may be incomplete."
        ) from error
