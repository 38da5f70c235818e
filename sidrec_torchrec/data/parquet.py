"""A Parquet data set as one table, opened with errors a user can act on, and read in bounded memory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.columns import is_list, is_number, plain_type
from sidrec_torchrec.data.ids import ID_TYPES, canonical, check_unique, id_type
from sidrec_torchrec.data.parts import Part, open_parts
from sidrec_torchrec.errors import DataError, first_line
from sidrec_torchrec.part_files import open_parquet
from sidrec_torchrec.storage.mirror import local

_BUFFER_BYTES = 1 << 20
_NULL_OF_FIXED_SIZE = "Expected all lists to be of size"
_OLD_PYARROW = (
    f"; pyarrow {pa.__version__} cannot read nulls among lists of fixed size: write lists of no fixed size, or take pyarrow 26 "
    "or newer, on Python 3.11 or newer"
)


@dataclass(frozen=True)
class ParquetTable:
    """Parts, schema and length of a data set; every read opens the files anew, so this can travel to workers.

    Args:
        path: as it was named: a file, a folder of parts, or a glob.
        schema: its Arrow schema, under our names.
        num_rows: rows of all parts, which follow one another in the order of their paths.
        parts: its files.
        names: the files' own names of columns that have another than ours.
    """

    path: Path
    schema: pa.Schema
    num_rows: int
    parts: tuple[Part, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, *, may_be_empty: bool = False, names: Mapping[str, str] | None = None) -> "ParquetTable":
        """Reads the footers.

        Args:
            path: a file, a folder of parts, at any depth (``column=value`` folders are columns, as hive has them), or a glob.
            may_be_empty: whether it may have no rows.
            names: by our name of a column, its own; those that the files do not have are left as they are.

        Raises:
            DataError: if there is no file, one is no (whole) Parquet file, the parts' columns differ, or there are no rows.
        """
        path = local(path)
        parts = open_parts(path)
        num_rows = sum(part.num_rows for part in parts)
        if num_rows == 0 and not may_be_empty:
            raise DataError(f"{path}: the {'file has' if len(parts) == 1 else 'files have'} no rows")
        types = _common_types(parts)
        renamed, schema = _under_our_names(types, names or {})
        return ParquetTable(path, schema.with_metadata(parts[0].schema.metadata), num_rows, parts, renamed)

    @property
    def num_row_groups(self) -> int:
        """Those of all parts."""
        return sum(len(part.row_groups) for part in self.parts)

    def at(self, column: str, row: int) -> str:
        """File, column and row as messages name them: those of the part that the row is in.

        Args:
            column: ours.
            row: of all parts.
        """
        path, first = self.path, 0
        for part, end in zip(self.parts, accumulate(part.num_rows for part in self.parts), strict=True):
            if row < end:
                path, first = part.path, end - part.num_rows
                break
        return f"{path}: column '{self.own_name(column)}', row {row - first}"

    def own_name(self, column: str) -> str:
        """What the files call a column."""
        return self.names.get(column, column)

    def type_of(self, column: str, *, what: str = "column") -> pa.DataType:
        """Arrow type of a column.

        Raises:
            DataError: if there is no such column; lists those there are.
        """
        if column not in self.schema.names:
            available = ", ".join(f"'{self.own_name(field.name)}' ({field.type})" for field in self.schema)
            remedy = (
                f"; if one of them is it, say so: --columns {column}=ITS_NAME" if what.startswith("required") else ""
            )
            raise DataError(f"{self.path}: no {what} '{column}'; the file has {available}{remedy}")
        return self.schema.field(column).type

    def require_int64(self, column: str) -> None:
        """Raises DataError unless ``column`` is there and of type int64."""
        actual = self.type_of(column, what="required column")
        if actual != pa.int64():
            raise DataError(f"{self.path}: column '{column}' must be int64, is {actual}; cast it when writing the file")

    def require_ids(self, column: str) -> None:
        """Raises DataError unless ``column`` is there and can hold ids."""
        actual = self.type_of(column, what="required column")
        if id_type(actual) is None:
            own = self.own_name(column)
            raise DataError(
                f"{self.path}: column '{own}' is {actual}; ids are {ID_TYPES}: cast it when writing the file"
            )

    def require_numbers(self, *columns: str, lists: bool = False) -> None:
        """Raises DataError unless the columns are there and hold numbers or booleans, or lists of them."""
        for column in columns:
            kind = self.type_of(column)
            value = kind.value_type if lists and is_list(kind) else kind
            if is_list(kind) != lists or not (is_number(value) or pa.types.is_boolean(value)):
                raise DataError(
                    f"{self.path}: column '{self.own_name(column)}' is {kind}; expected {'lists of ' * lists}numbers"
                )

    def batches(
        self,
        columns: Sequence[str],
        batch_size: int,
        row_groups: Sequence[int] | None = None,
        *,
        share: tuple[int, int] | None = None,
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yields (number of the first row, batch of at most ``batch_size`` rows, all of one part).

        Args:
            columns: to read; ours.
            batch_size: most rows in a batch.
            row_groups: which of the row groups of all parts to read, in this order; None for all parts in order.
            share: (rank, world size): only this one of as many stretches of the batches, in order; a batch is then of one
                row group. Row groups in other stretches are not opened; of one that several share, Arrow decodes what comes
                before, and it is dropped.

        Raises:
            DataError: if a file cannot be decoded; names the row where reading stopped.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if share is None and row_groups is None:
            first_row = 0
            for part in self.parts:
                for row, batch in self._read(part, None, columns, batch_size):
                    yield first_row + row, batch
                first_row += part.num_rows
            return
        rank, world_size = share or (0, 1)
        groups = self._row_groups
        chosen = groups if row_groups is None else [groups[group] for group in row_groups]
        counts = [-(-part.row_groups[group] // batch_size) for part, group, _ in chosen]
        begin, end = (sum(counts) * r // world_size for r in (rank, rank + 1))
        for (part, group, first_row), count in zip(chosen, counts, strict=True):
            if begin < count and end > 0:
                read = self._read(part, group, columns, batch_size)
                for place, (row, batch) in zip(range(min(count, end)), read, strict=False):
                    if place >= begin:
                        yield first_row + row, batch
            begin, end = begin - count, end - count

    def read_unique_ids(self, column: str) -> pa.Array:
        """A whole column of ids, canonical [num_rows], in order.

        Raises:
            DataError: on a null or a repeated id; names the rows.
        """
        parts = [self.ids(batch, column, row) for row, batch in self.batches([column], 1 << 20)]
        ids = pa.concat_arrays(parts or [pa.array([], id_type(self.schema.field(column).type))])
        check_unique(ids, lambda row: self.at(column, row), self.own_name(column))
        return ids

    def ids(self, batch: pa.RecordBatch, column: str, first_row: int) -> pa.Array:
        """A required column of ids of a batch, canonical [N].

        Raises:
            DataError: on a null; names the row of the file.
        """
        self.check_no_null(batch, column, first_row)
        ids = canonical(batch.column(column))
        try:
            ids.validate(full=True)
        except pa.ArrowInvalid:
            raise DataError(
                f"{self.at(column, first_row)} and after: an id is not UTF-8; make it a column of bytes"
            ) from None
        return ids

    def int64(self, batch: pa.RecordBatch, column: str, first_row: int) -> np.ndarray:
        """A required integer column of a batch as int64 [N].

        Raises:
            DataError: on a null; names the row of the file.
        """
        self.check_no_null(batch, column, first_row)
        return batch.column(column).to_numpy(zero_copy_only=False).astype(np.int64, copy=False)

    def check_no_null(self, batch: pa.RecordBatch, column: str, first_row: int) -> None:
        """Raises DataError if a column of a batch has a null; names the row of the file."""
        values = batch.column(column)
        if values.null_count:
            row = first_row + int(np.argmax(values.is_null().to_numpy(zero_copy_only=False)))
            raise DataError(f"{self.at(column, row)}: null; every row needs a value")

    @cached_property
    def _row_groups(self) -> list[tuple[Part, int, int]]:
        """Of all parts: the part, its own number of the group, and the first row."""
        places = [(part, group) for part in self.parts for group in range(len(part.row_groups))]
        ends = accumulate(part.row_groups[group] for part, group in places)
        return [(part, group, end - part.row_groups[group]) for (part, group), end in zip(places, ends, strict=True)]

    def _read(
        self, part: Part, group: int | None, columns: Sequence[str], batch_size: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches of a part, or of one of its row groups, with their first rows in it, under our names."""
        own = [self.own_name(column) for column in columns]
        known = part.types()
        for ours, name in zip(columns, own, strict=True):
            if name not in known:
                raise DataError(
                    f"{part.path}: no column '{name}', which {self.parts[0].path} has; write it there too"
                    + f" (it is our '{ours}')" * (ours != name)
                )
        stored = [name for name in own if name in part.schema.names]
        first_row = 0
        try:
            # a row group's columns are streamed, not held whole; threads cost more than they save of a few columns
            with open_parquet(part.path, buffer_size=_BUFFER_BYTES) as file:
                groups = None if group is None else [group]
                for batch in file.iter_batches(batch_size, row_groups=groups, columns=stored, use_threads=False):
                    arrays = [
                        batch.column(name) if name in stored else pa.repeat(part.partition[name], len(batch))
                        for name in own
                    ]
                    yield first_row, pa.RecordBatch.from_arrays(arrays, names=list(columns))
                    first_row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            advice = _OLD_PYARROW if _NULL_OF_FIXED_SIZE in str(error) else ""
            raise DataError(f"{part.path}: cannot be read past row {first_row}: {first_line(error)}{advice}") from error


@dataclass(frozen=True)
class ArrowTable(ParquetTable):
    """A table in memory, read as a file is. Made by ``ArrowTable.of``.

    Args:
        table: the table; ``path`` is what errors call it.
    """

    table: pa.Table = field(default_factory=lambda: pa.table({}))

    @staticmethod
    def of(table: pa.Table, name: str, names: Mapping[str, str] | None = None) -> "ArrowTable":
        """``table``, which errors call ``name``; it may have no rows. Its own ``names`` by ours, as ``ParquetTable.open`` has it."""
        renamed, schema = _under_our_names({field.name: field.type for field in table.schema}, names or {})
        return ArrowTable(Path(name), schema, table.num_rows, names=renamed, table=table)

    @property
    def num_row_groups(self) -> int:
        """One."""
        return 1

    def batches(
        self,
        columns: Sequence[str],
        batch_size: int,
        row_groups: Sequence[int] | None = None,
        *,
        share: tuple[int, int] | None = None,
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """See ``ParquetTable``; the table is one row group."""
        if row_groups is not None and list(row_groups) != [0]:
            raise ValueError(f"a table in memory is one row group, not {list(row_groups)}")
        rank, world_size = share or (0, 1)
        count = -(-self.num_rows // batch_size)
        begin, end = (count * r // world_size for r in (rank, rank + 1))
        own = self.table.select([self.own_name(column) for column in columns]).rename_columns(list(columns))
        for first_row in range(begin * batch_size, min(end * batch_size, self.num_rows), batch_size):
            (batch,) = own.slice(first_row, batch_size).combine_chunks().to_batches()
            yield first_row, batch


def _under_our_names(types: Mapping[str, pa.DataType], names: Mapping[str, str]) -> tuple[dict[str, str], pa.Schema]:
    """Those of the names whose columns are there, and the schema that they give."""
    renamed = {ours: own for ours, own in names.items() if own in types}
    ours = {own: ours for ours, own in renamed.items()}
    # a column that another one's new name hides is not to be read
    fields = [(ours.get(own, own), kind) for own, kind in types.items() if own in ours or own not in renamed]
    return renamed, pa.schema(fields)


def _common_types(parts: Sequence[Part]) -> dict[str, pa.DataType]:
    """By column of any part, its type in the first that has it.

    Raises:
        DataError: if a column holds other values in another part.
    """
    types: dict[str, tuple[pa.DataType, Part]] = {}
    for part in parts:
        for name, kind in part.types().items():
            first, its = types.setdefault(name, (kind, part))
            if plain_type(kind) != plain_type(first):
                raise DataError(
                    f"{part.path}: column '{name}' is {kind}, in {its.path} it is {first}; write all parts with one type"
                )
    return {name: kind for name, (kind, _) in types.items()}
