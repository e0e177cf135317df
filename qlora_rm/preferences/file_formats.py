"""Readers of one file, row by row, chosen by its extension.

Unlike Arrow's readers, they name the broken row, yield the good rows around it, and never change a value's type.
"""

import csv
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_rm.config import DataConfig
from qlora_rm.errors import UserError
from qlora_rm.preferences.arrow_rows import parquet_rows, read_parquet, require_distinct
from qlora_rm.preferences.row_bytes import BombError, CsvLines, RowStream, RowTooLong, too_long
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.row_json import parse
from qlora_rm.preferences.values import Row, json_type

Numbered = Iterator[tuple[int, Row | RowFault]]
"""Row number, counting from 1, and the row or its fault."""

MAX_ROW_BYTES = DataConfig.max_row_bytes

JSON_CELLS = frozenset(
    {"responses", "ranks", "scores", "preferences", "ties", "margin", "weight", "tools", "chat_template_kwargs"}
    | {"messages", "conversations", "chosen_ids", "rejected_ids", "chosen_input_ids", "rejected_input_ids"}
    | {"input_ids_chosen", "input_ids_rejected", "attention_mask_chosen", "attention_mask_rejected"}
)
"""Fields that are not text; a CSV, whose cells are all text, holds them as JSON."""

ONE_A_LINE = (".jsonl", ".ndjson")

csv.field_size_limit(2**31 - 1)  # --max_row_bytes is the limit; the default of 128 KiB is shorter than a long prompt


def read_file(path: Path, limit: int = MAX_ROW_BYTES) -> Numbered:
    """Yield the rows of one file; a row over `limit` bytes is a fault and is never held in memory.

    Raises:
        UserError: the file is empty, damaged beyond single rows, unreadable, or of an unknown kind.
    """
    reader = READERS.get(ending(path))
    if reader is None:
        raise UserError(f"{path}: files ending in {path.suffix or 'nothing'!r} are not read; {', '.join(READERS)} are.")
    number = 0
    try:
        for number, row in reader(path, limit):
            yield number, row
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after row {number}: {error}. The file may be truncated.") from error
    except BombError as error:
        raise UserError(
            f"{path} is not read after row {number}: {error}. Remove the file if you do not know where it comes from, or "
            "expand it and see what it holds."
        ) from None
    if number == 0:
        raise UserError(f"{path} is empty: it holds no rows. Remove it from the data, or write it anew.")


EXPANDS_AT_MOST = 100
"""Largest expansion of a file whose rows are counted before they are read; beyond it, counting doubles a long read."""


def count_rows(files: Iterable[Path], limit: int = MAX_ROW_BYTES) -> int | None:
    """Return the number of rows in the files, for progress; None if counting them would need parsing."""
    count = 0
    for path in files:
        kind = ending(path).removesuffix(".gz")
        try:
            if kind in ONE_A_LINE:
                most, length = EXPANDS_AT_MOST * path.stat().st_size, 0
                with open_rows(path, limit) as rows:
                    for line in rows.lines():
                        length += len(line or b"")
                        if line is None or length > most:
                            return None
                        count += not line.isspace()
            elif kind == ".parquet":
                count += parquet_rows(path)
            else:
                return None
        except (OSError, EOFError, ValueError, zlib.error):
            return None  # read_file reports the error
    return count


def ending(path: Path) -> str:
    """Return the file's extension in lower case, including a final .gz: `.jsonl`, `.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        return suffixes[-2] + ".gz" if len(suffixes) > 1 else ".gz"
    return suffixes[-1] if suffixes else ""


@contextmanager
def open_rows(path: Path, limit: int = MAX_ROW_BYTES) -> Iterator[RowStream]:
    """Open a file for reading row by row; a .gz file is decompressed."""
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as expanded:
            yield RowStream(expanded, limit, compressed=True)  # type: ignore[arg-type]
    else:
        with path.open("rb") as file:
            yield RowStream(file, limit)


def row_of(text: bytes | str) -> Row | RowFault:
    """Return the row in a JSON text, or its fault."""
    try:
        value = parse(text)
    except RowFault as fault:
        return fault
    if isinstance(value, dict):
        return value
    return RowFault("not_an_object", f"the row is {json_type(value)}, not an object")


def _read_jsonl(path: Path, limit: int) -> Numbered:
    with open_rows(path, limit) as rows:
        for number, line in enumerate(rows.lines(), start=1):
            if line is None:
                yield number, too_long(limit)
            elif line.strip():
                yield number, row_of(line)


def _read_json(path: Path, limit: int) -> Numbered:
    """Yield the rows of a list of objects, or of one object per line (JSONL with another extension)."""
    with open_rows(path, limit) as rows:
        opens_list = rows.stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not opens_list:
        yield from _read_jsonl(path, limit)
        return
    with open_rows(path, limit) as rows:
        try:
            for number, text in enumerate(rows.elements(), start=1):
                yield number, too_long(limit) if text is None else row_of(text)
        except BombError:
            raise
        except ValueError as error:
            raise UserError(
                f"{path} is not valid JSON: {error}. JSONL, one object per line, survives a bad row."
            ) from None


def _read_csv(path: Path, limit: int, delimiter: str = ",") -> Numbered:
    """Yield the rows under a header; row 1 is the first below it."""
    with open_rows(path, limit) as rows:
        lines = CsvLines(rows)
        cells_of = csv.reader(lines, delimiter=delimiter)
        header = _csv_header(path, cells_of, limit)
        number = 0
        while True:
            lines.begin_row()
            try:
                cells = next(cells_of, None)
                row = None if not cells else _csv_row(header, cells)
            except RowTooLong:
                cells, row = [], too_long(limit)
                row.what += "; perhaps a quotation mark is not closed"
            except csv.Error as error:
                cells, row = [], RowFault("broken_csv", f"the row is not valid CSV ({error})")
            if cells is None:
                return
            if row is not None:
                number += 1
                yield number, row


def _csv_header(path: Path, cells_of: Iterator[list[str]], limit: int) -> list[str]:
    try:
        header = next(cells_of, None) or []
    except RowTooLong:
        raise UserError(
            f"{path}: the header has more than {limit:,} bytes, the limit that --max_row_bytes sets. Is this CSV?"
        ) from None
    except csv.Error as error:
        raise UserError(f"{path}, line 1: not valid CSV ({error}).") from None
    if not all(map(_is_text, header)):
        raise UserError(f"{path}, line 1: the header is not UTF-8. Save the file as UTF-8.")
    require_distinct(path, header)
    return header


def _is_text(cell: str) -> bool:
    """Return whether the bytes of a cell were UTF-8."""
    return cell.isascii() or not any("\ud800" <= character <= "\udfff" for character in cell)


def _csv_row(header: list[str], cells: list[str]) -> Row | RowFault:
    if len(cells) != len(header):
        return RowFault("broken_csv", f"the row has {len(cells)} cells, the header {len(header)}")
    if not all(map(_is_text, cells)):
        return RowFault("bad_unicode", "the row is not UTF-8")
    return {name: cell for name, cell in zip(header, cells, strict=True) if name}


def decode_cells(row: Row) -> Row:
    """Parse the non-text fields of a CSV row as JSON; an empty cell becomes None.

    Raises:
        RowFault: nested_too_deeply or duplicate_key.
    """
    return {field: _cell(text, field) if field in JSON_CELLS else text for field, text in row.items()}


def _cell(text: str, field: str) -> Any:
    try:
        return parse(text, field) if text.strip() else None
    except RowFault as fault:
        if fault.kind != "broken_json":
            raise
        return text  # the field's own check reports what it should have been


def _read_tsv(path: Path, limit: int) -> Numbered:
    return _read_csv(path, limit, delimiter="\t")


_TEXT_READERS: dict[str, Callable[[Path, int], Numbered]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
READERS = {**_TEXT_READERS, ".parquet": read_parquet, **{f"{name}.gz": read for name, read in _TEXT_READERS.items()}}
