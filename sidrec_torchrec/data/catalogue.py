"""The items that a log meets, written with vectors from a file too large to hold."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.columns import may_be_vector
from sidrec_torchrec.data.conversion import check_float16, half_vectors
from sidrec_torchrec.data.embeddings import checked_vectors
from sidrec_torchrec.data.event_log import parquet_writer
from sidrec_torchrec.data.ids import IdIndex, canonical, shown
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path

_ROWS = 8192


@dataclass(frozen=True)
class VectorFile:
    """Vectors by item, one row an item.

    Args:
        table: the file.
        id_column: of items, numbers.
        column: of lists of numbers.
        name: of the source that they become.
        scale: what each number is multiplied by.
    """

    table: ParquetTable
    id_column: str
    column: str
    name: str
    scale: float = 1.0

    def __post_init__(self) -> None:
        self.table.require_numbers(self.id_column)
        kind = self.table.type_of(self.column)
        if not may_be_vector(kind):
            raise DataError(f"{self.table.path}: column '{self.column}' is {kind}; vectors are lists of numbers")

    def width(self) -> int:
        """That of the first vector."""
        for _, batch in self.table.batches([self.column], 256):
            if lengths := [len(vector) for vector in batch.column(0) if vector.is_valid and len(vector)]:
                return lengths[0]
        raise DataError(f"{self.table.path}: column '{self.column}' holds no vector in any row")


def write_catalogue(path: Path, items: pa.Table, vectors: VectorFile | None) -> int:
    """Writes the items: those with a vector in the order of the vectors' file, then the others.

    Args:
        path: the file.
        items: ``item_id`` and whatever else is known of each.
        vectors: theirs; of other items too, which are passed over. None: the items get no source.

    Returns:
        How many items have no vector; 0 without vectors.

    Raises:
        DataError: if a vector is broken, or an item has two; names file, column, row and item.
    """
    kinds = [(f.name, f.type) for f in items.schema]
    if vectors is None:
        with atomic_path(path) as temporary, parquet_writer(temporary, items.schema) as writer:
            writer.write_table(items)
        return 0
    dim, table = vectors.width(), vectors.table
    schema = pa.schema([*kinds, (vectors.name, pa.list_(pa.float16()))])
    index = IdIndex(canonical(items["item_id"]))
    is_written_N = np.zeros(items.num_rows, bool)
    with atomic_path(path) as temporary, parquet_writer(temporary, schema) as writer:
        for first_row, batch in table.batches([vectors.id_column, vectors.column], 8 * _ROWS):
            ids = table.ids(batch, vectors.id_column, first_row)
            place_N = index.find(ids)
            kept = np.flatnonzero(place_N >= 0)
            _check_new(vectors, ids, place_N, kept, is_written_N, first_row)
            x_ND, present_N = checked_vectors(table, batch.column(1), vectors.column, dim, first_row, ids)[:2]
            x_ND = x_ND[kept] * vectors.scale
            check_float16(x_ND, f"{table.path}: column '{vectors.column}', after row {first_row}: ")
            if len(kept):
                columns = items.take(pa.array(place_N[kept])).columns
                writer.write_table(pa.table([*columns, half_vectors(x_ND, present_N[kept])], schema=schema))
        rest = np.flatnonzero(~is_written_N)
        for begin in range(0, len(rest), _ROWS):
            some = rest[begin : begin + _ROWS]
            none = pa.nulls(len(some), schema.field(vectors.name).type)
            writer.write_table(pa.table([*items.take(pa.array(some)).columns, none], schema=schema))
        if len(rest) == items.num_rows:
            raise DataError(
                f"{table.path}: column '{vectors.id_column}' names none of the log's items; is it of another set?"
            )
    return len(rest)


def _check_new(
    vectors: VectorFile, ids: pa.Array, place_N: np.ndarray, kept: np.ndarray, is_written_N: np.ndarray, first_row: int
) -> None:
    """Marks the items of a batch as written.

    Raises:
        DataError: if one is written already.
    """
    first = np.zeros(len(kept), bool)
    first[np.unique(place_N[kept], return_index=True)[1]] = True
    again = kept[is_written_N[place_N[kept]] | ~first]
    if len(again):
        where = vectors.table.at(vectors.id_column, first_row + int(again[0]))
        raise DataError(f"{where}: item {shown(ids, again[0])} has a row already; each item needs one")
    is_written_N[place_N[kept]] = True
