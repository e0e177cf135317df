"""Reads one file, row by row, by its ending. Our own readers and not Arrow's: they name the row that is broken, give
the good rows around it, and never change a value's type.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from qlora_rm.errors import UserError
from qlora_rm.preferences.contents import Row, json_type
from qlora_rm.preferences.faults import RowFault

Numbered = Iterator[tuple[int, Row | RowFault]]
"""Row number, counting from 1, and the row or what is wrong with it."""

JSON_CELLS = frozenset(
    {"responses", "ranks", "scores", "preferences", "ties", "margin", "weight", "tools", "chat_template_kwargs"}
    | {"messages", "conversations", "chosen_ids", "rejected_ids", "chosen_input_ids", "rejected_input_ids"}
    | {"input_ids_chosen", "input_ids_rejected", "attention_mask_chosen", "attention_mask_rejected"}
)
"""Fields that are no text; in a CSV, whose cells all are, they are written as JSON."""

ONE_A_LINE = (".jsonl", ".ndjson")

csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is shorter than a long prompt


def read_file(path: Path) -> Numbered:
    """The rows of one file.

    Raises:
        UserError: the file is empty, broken beyond single rows, unreadable, or of an unknown kind.
    """
    reader = READERS.get(ending(path))
    if reader is None:
        raise UserError(f"{path}: files ending in {path.suffix or 'nothing'!r} are not read; {', '.join(READERS)} are.")
    number = 0
    try:
        for number, row in reader(path):
            yield number, row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read behind row {number}: {error}. Is the file whole?") from error
    if number == 0:
        raise UserError(f"{path} is empty: it holds no rows. Remove it from the data, or write it anew.")


def count_rows(files: Iterable[Path]) -> int | None:
    """How many rows the files hold, to show how far reading is; None where finding out would mean parsing them."""
    count = 0
    for path in files:
        kind = ending(path).removesuffix(".gz")
        try:
            if kind in ONE_A_LINE:
                with _open(path) as lines:
                    count += sum(not line.isspace() for line in lines)
            elif kind == ".parquet":
                count += _parquet_rows(path)
            else:
                return None
        except (OSError, EOFError, ValueError, zlib.error):
            return None  # read_file says what is wrong
    return count


def _parquet_rows(path: Path) -> int:
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows


def ending(path: Path) -> str:
    """The file's ending in lower case, without .gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        return suffixes[-2] + ".gz" if len(suffixes) > 1 else ".gz"
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _read_jsonl(path: Path) -> Numbered:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parse(line)


def _parse(line: bytes) -> Row | RowFault:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return RowFault("broken_json", f"the line is not JSON ({error})")
    return _as_row(value)


def _as_row(value: Any) -> Row | RowFault:
    return (
        value if isinstance(value, dict) else RowFault("not_an_object", f"the row is {json_type(value)}, not an object")
    )


def _read_json(path: Path) -> Numbered:
    """A list of objects; or one object per line, which is JSONL by another ending."""
    with _open(path) as file:
        opens_list = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not opens_list:
        yield from _read_jsonl(path)
        return
    with _open(path) as file:
        try:
            values = json.load(file)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path} is not valid JSON: {error}. JSONL, one object per line, survives a bad row."
            ) from None
    for number, value in enumerate(values, start=1):
        yield number, _as_row(value)


def _read_csv(path: Path, delimiter: str = ",") -> Numbered:
    """Rows under a header; row 1 is the first below it."""
    with _open(path) as file:
        rows = csv.reader(
            (line.decode("utf-8-sig" if n == 0 else "utf-8") for n, line in enumerate(file)), delimiter=delimiter
        )
        header = next(rows, None)
        try:
            for number, cells in enumerate((cells for cells in rows if cells), start=1):
                yield number, _csv_row(header or [], cells)
        except csv.Error as error:
            raise UserError(f"{path}, line {rows.line_num}: not valid CSV ({error}).") from None


def _csv_row(header: list[str], cells: list[str]) -> Row | RowFault:
    if len(cells) != len(header):
        return RowFault("broken_csv", f"the row has {len(cells)} cells, the header {len(header)}")
    return dict(zip(header, cells, strict=True))


def decode_cells(row: Row) -> Row:
    """The fields of a CSV row that are no text, read as JSON; an empty cell is an absent value."""
    return {field: _cell(text) if field in JSON_CELLS else text for field, text in row.items()}


def _cell(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else None
    except ValueError:
        return text  # the field's own check says what it should have been


def _read_parquet(path: Path) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=1000)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not valid Parquet: {error}.") from None


def _read_tsv(path: Path) -> Numbered:
    return _read_csv(path, delimiter="\t")


_TEXT_READERS: dict[str, Callable[[Path], Numbered]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
READERS = {**_TEXT_READERS, ".parquet": _read_parquet, **{f"{name}.gz": read for name, read in _TEXT_READERS.items()}}
