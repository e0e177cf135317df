"""Rows of Parquet files, read in batches; each row's size is checked before it becomes Python objects."""

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
"""Upper bound of a batch if all rows are at the limit: a small dictionary page can repeat a long text in every row."""


def parquet_rows(path: Path) -> int:
    """Return the number of rows in the file's metadata."""
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows


def read_parquet(path: Path, limit: int) -> Iterator[tuple[int, Row | RowFault]]:
    """Yield the rows of a Parquet file with their numbers, counting from 1.

    Raises:
        UserError: the file is damaged, or two of its columns have the same name.
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
        raise UserError(
            f"{path} cannot be read as Parquet after row {number}: {error}. The file may be truncated."
        ) from None


def _largest_cell(group: Any, limit: int) -> int:
    """Return an upper bound in bytes for the cells of the row group, at most `limit`."""
    chunks = (group.column(index).total_uncompressed_size for index in range(group.num_columns))
    return max(1, min(limit, max(chunks, default=1)))


def rows_of(batch: "pyarrow.RecordBatch", limit: int) -> Iterator[Row | RowFault]:
    """Yield the rows of a batch. A row over `limit` bytes, or with a value that Python cannot represent, is a fault.

    The batch is halved until such a row is alone.
    """
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
    """Require distinct names for all columns, and for all fields inside a column."""
    require_distinct(path, schema.names)
    types = [(name, schema.field(index).type) for index, name in enumerate(schema.names)]
    while types:
        name, kind = types.pop()
        inside = [kind.field(index) for index in range(kind.num_fields)]
        require_distinct(f"{path}, column {name},", [field.name for field in inside])
        types += [(f"{name}.{field.name}", field.type) for field in inside]


def require_distinct(file: object, columns: Sequence[str]) -> None:
    """Raise a `UserError` if columns share a name, since a row keeps only one of them; empty names are ignored."""
    twice = [f"{name!r} ({count} times)" for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise UserError(
            f"{file} has columns of the same name: {', '.join(twice)}. Rename or remove all but one of each."
        )
