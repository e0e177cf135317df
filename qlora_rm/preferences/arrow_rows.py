"""Rows of Parquet files, a batch at a time, each measured before it becomes Python objects."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_rm.errors import UserError, first_line
from qlora_rm.preferences.row_bytes import too_long
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.values import Row

if TYPE_CHECKING:
    import pyarrow

BATCH = 1000
BYTES_AT_ONCE = 2**28
"""A batch holds so few rows that rows at the limit stay below this: a page of kilobytes may name one text for each of them."""


def parquet_rows(path: Path) -> int:
    """How many rows the file says it has."""
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows


def read_parquet(path: Path, limit: int) -> Iterator[tuple[int, Row | RowFault]]:
    """The rows of a Parquet file with their numbers, counting from 1.

    Raises:
        UserError: the file is damaged, or two of its columns have one name.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _require_distinct_fields(path, file.schema_arrow)
            for group in range(file.num_row_groups):
                largest = _largest_cell(file.metadata.row_group(group), limit)
                size = max(1, min(BATCH, BYTES_AT_ONCE // largest))
                for batch in file.iter_batches(size, row_groups=[group]):
                    for row in rows_of(batch, limit):
                        number += 1
                        yield number, row
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        raise UserError(f"{path} is not valid Parquet behind row {number}: {error}. Is the file whole?") from None


def _largest_cell(group: Any, limit: int) -> int:
    """Bytes that no cell of the row group exceeds, as far as rows within the limit are concerned."""
    chunks = (group.column(index).total_uncompressed_size for index in range(group.num_columns))
    return max(1, min(limit, max(chunks, default=1)))


def rows_of(batch: "pyarrow.RecordBatch", limit: int) -> Iterator[Row | RowFault]:
    """The rows of a batch. One of more than `limit` bytes, or with a value that Python cannot hold, is a fault: the batch is
    halved until it stands alone."""
    fault = too_long(limit)
    if batch.nbytes <= limit:
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date before the year 1, nanoseconds
            fault = RowFault("unreadable_value", f"a value of the row cannot be read ({first_line(error)})")
        else:
            yield from rows
            return
    if batch.num_rows == 1:
        yield fault
        return
    middle = batch.num_rows // 2
    yield from rows_of(batch.slice(0, middle), limit)
    yield from rows_of(batch.slice(middle), limit)


def _require_distinct_fields(path: Path, schema: "pyarrow.Schema") -> None:
    """No two columns, and no two fields inside a column, have one name."""
    require_distinct(path, schema.names)
    types = [(name, schema.field(index).type) for index, name in enumerate(schema.names)]
    while types:
        name, kind = types.pop()
        inside = [kind.field(index) for index in range(kind.num_fields)]
        require_distinct(f"{path}, column {name},", [field.name for field in inside])
        types += [(f"{name}.{field.name}", field.type) for field in inside]


def require_distinct(file: object, columns: Sequence[str]) -> None:
    """Raise a `UserError` where two columns have one name, of which a row could keep one only; no name is no column."""
    twice = [f"{name!r} ({count} times)" for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise UserError(
            f"{file} has columns of the same name: {', '.join(twice)}. Rename or remove all but one of each."
        )
