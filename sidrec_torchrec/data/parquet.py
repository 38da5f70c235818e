"""One Parquet file, opened with errors a user can act on, and read in bounded memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sidrec_torchrec.errors import DataError, first_line

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ParquetTable:
    """Path, schema and length of a Parquet file; every read opens the file anew, so this can travel to workers.

    Args:
        path: the file.
        schema: its Arrow schema.
        num_rows: its rows.
        num_row_groups: the parts it was written in.
    """

    path: Path
    schema: pa.Schema
    num_rows: int
    num_row_groups: int

    @staticmethod
    def open(path: Path, *, may_be_empty: bool = False) -> "ParquetTable":
        """Reads the footer.

        Args:
            path: the file.
            may_be_empty: whether it may have no rows.

        Raises:
            DataError: if the file is missing, is no (whole) Parquet file, or has no rows.
        """
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file; docs/data.md describes the files of a data folder")
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                schema, num_rows, num_row_groups = file.schema_arrow, file.metadata.num_rows, file.num_row_groups
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file, or cut short: {first_line(error)}") from error
        if num_rows == 0 and not may_be_empty:
            raise DataError(f"{path}: the file has no rows")
        return ParquetTable(path, schema, num_rows, num_row_groups)

    def type_of(self, column: str, *, what: str = "column") -> pa.DataType:
        """Arrow type of a column.

        Raises:
            DataError: if there is no such column; lists those there are.
        """
        if column not in self.schema.names:
            available = ", ".join(f"'{field.name}' ({field.type})" for field in self.schema)
            raise DataError(f"{self.path}: no {what} '{column}'; the file has {available}")
        return self.schema.field(column).type

    def require_int64(self, column: str) -> None:
        """Raises DataError unless ``column`` is there and of type int64."""
        actual = self.type_of(column, what="required column")
        if actual != pa.int64():
            raise DataError(f"{self.path}: column '{column}' must be int64, is {actual}; cast it when writing the file")

    def batches(
        self,
        columns: Sequence[str],
        batch_size: int,
        row_groups: Sequence[int] | None = None,
        *,
        share: tuple[int, int] | None = None,
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yields (number of the first row, batch of at most ``batch_size`` rows).

        Args:
            columns: to read.
            batch_size: most rows in a batch.
            row_groups: which of the file's row groups to read, in this order; None for the whole file in order.
            share: (rank, world size): only this one of as many stretches of the batches, in order; a batch is then of one
                row group. Row groups in other stretches are not opened; of one that several share, Arrow decodes what comes
                before, and it is dropped.

        Raises:
            DataError: if the file cannot be decoded; names the row where reading stopped.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        first_row = 0
        try:
            # a row group's columns are streamed, not held whole; threads cost more than they save of a few columns
            with pq.ParquetFile(
                self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            ) as file:
                if share is None and row_groups is None:
                    for batch in file.iter_batches(batch_size, columns=list(columns), use_threads=False):
                        yield first_row, batch
                        first_row += batch.num_rows
                    return
                rank, world_size = share or (0, 1)
                sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                groups = range(len(sizes)) if row_groups is None else row_groups
                counts = [-(-sizes[g] // batch_size) for g in groups]
                begin, end = (sum(counts) * r // world_size for r in (rank, rank + 1))
                for group, count in zip(groups, counts, strict=True):
                    first_row = sum(sizes[:group])
                    if begin < count and end > 0:
                        read = file.iter_batches(
                            batch_size, row_groups=[group], columns=list(columns), use_threads=False
                        )
                        for place, batch in zip(range(min(count, end)), read, strict=False):
                            if place >= begin:
                                yield first_row, batch
                            first_row += batch.num_rows
                    begin, end = begin - count, end - count
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}: cannot be read past row {first_row}: {first_line(error)}") from error

    def read_unique_ids(self, column: str) -> np.ndarray:
        """A whole id column: int64 [num_rows], in file order.

        Raises:
            DataError: on a null or a repeated id; names the rows.
        """
        parts = [self.int64(batch, column, row) for row, batch in self.batches([column], 1 << 20)]
        ids_N = np.concatenate(parts)
        order = np.argsort(ids_N, kind="stable")
        repeats = np.flatnonzero(ids_N[order[1:]] == ids_N[order[:-1]])
        if repeats.size:
            first = repeats[np.argmin(order[repeats + 1])]
            raise DataError(
                f"{self.path}: column '{column}', row {order[first + 1]}: {column} {ids_N[order[first]]} is already "
                f"in row {order[first]}; ids must be unique ({repeats.size} repeats in all)"
            )
        return ids_N

    def int64(self, batch: pa.RecordBatch, column: str, first_row: int) -> np.ndarray:
        """A required integer column of a batch as int64 [N].

        Raises:
            DataError: on a null; names the row of the file.
        """
        values = batch.column(column)
        if values.null_count:
            row = first_row + int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
            raise DataError(f"{self.path}: column '{column}', row {row}: null; every row needs a value")
        return values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)


@dataclass(frozen=True)
class ArrowTable(ParquetTable):
    """A table in memory, read as a file is. Made by ``ArrowTable.of``.

    Args:
        table: the table; ``path`` is what errors call it.
    """

    table: pa.Table

    @staticmethod
    def of(table: pa.Table, name: str) -> "ArrowTable":
        """``table``, which errors call ``name``; it may have no rows."""
        return ArrowTable(Path(name), table.schema, table.num_rows, 1, table)

    def batches(
        self,
        columns: Sequence[str],
        batch_size: int,
        row_groups: Sequence[int] | None = None,
        *,
        share: tuple[int, int] | None = None,
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """See ``ParquetTable``; the whole table in order alone."""
        if row_groups is not None or share is not None:
            raise ValueError("a table in memory is read whole")
        first_row = 0
        for batch in self.table.select(list(columns)).to_batches(batch_size):
            yield first_row, batch
            first_row += batch.num_rows


def is_vector(kind: pa.DataType) -> bool:
    """Whether a column of this type is a source: a list of floats."""
    return _is_list(kind) and pa.types.is_floating(kind.value_type)


def is_categorical(kind: pa.DataType) -> bool:
    """Whether a column of this type is categorical: strings, integers or booleans, or lists of them."""
    if _is_list(kind):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
    )


def is_multi_label(kind: pa.DataType) -> bool:
    """Whether a categorical column of this type holds several values a row."""
    return _is_list(kind)


def vectors(column: pa.Array, dim: int) -> tuple[np.ndarray, np.ndarray, int | None]:
    """A column of float lists as a matrix; null, empty and all-zero rows are missing.

    Args:
        column: N lists of floats.
        dim: the width every row that is there must have.

    Returns:
        float32 [N, dim] with zeros where missing; bool [N], where a vector is there; and the first row of another
        width, None if there is none (then the other two are meaningless).
    """
    num_rows = len(column)
    lengths_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    given_N = lengths_N > 0
    wrong_N = given_N & (lengths_N != dim)
    if wrong_N.any():
        return np.empty((0, dim), np.float32), given_N, int(np.argmax(wrong_N))
    x_ND = np.zeros((num_rows, dim), np.float32)
    # flatten() skips null rows, whatever lies beneath them; nulls inside a vector become NaN and are refused as such.
    x_ND[given_N] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return x_ND, np.any(x_ND, axis=1), None


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
