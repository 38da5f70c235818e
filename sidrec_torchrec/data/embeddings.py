"""Sources that are in a second file, joined to items by id."""

from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryFile

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.columns import is_vector, may_be_vector, vectors
from sidrec_torchrec.data.ids import IdIndex, shown
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.errors import DataError

_ROWS = 8192


@dataclass(frozen=True)
class Embeddings:
    """A file of ``item_id`` and vectors, in any order; items without a row have none, rows without an item are passed over.

    Args:
        table: the file.
    """

    table: ParquetTable

    def __post_init__(self) -> None:
        self.table.require_ids("item_id")

    def names(self, *, named: bool = False) -> list[str]:
        """Columns that are sources; ``named``: those that can be, if somebody says so."""
        fits = may_be_vector if named else is_vector
        return [field.name for field in self.table.schema if field.name != "item_id" and fits(field.type)]

    def join(self, item_ids: pa.Array, dims: dict[str, int]) -> dict[str, np.ndarray]:
        """Each source's vectors in the order of the items, in temporary files that are mapped into memory.

        Args:
            item_ids: canonical [num_items].
            dims: width by source.

        Returns:
            float32 [num_items, width] by source, zeros where missing.

        Raises:
            DataError: on a repeated id, ids of another type, a vector of another width, a value that is not finite, or if
                no item has a row; names file, column and row.
        """
        index = IdIndex(item_ids)
        rows = {name: _mapped((len(item_ids), dim)) for name, dim in dims.items()}
        num_found = 0
        self.table.read_unique_ids("item_id")
        for first_row, batch in self.table.batches(["item_id", *dims], _ROWS):
            ids = self.table.ids(batch, "item_id", first_row)
            try:
                item_N = index.find(ids)
            except TypeError as error:
                raise DataError(f"{self.table.at('item_id', first_row)}: {error}; write both with one type") from None
            known = np.flatnonzero(item_N >= 0)
            num_found += len(known)
            for name, dim in dims.items():
                x_ND = checked_vectors(self.table, batch.column(name), name, dim, first_row, ids)[0]
                rows[name][item_N[known]] = x_ND[known]
        if not num_found:
            raise DataError(f"{self.table.path}: no item_id of it is among the items; are they of the same catalogue?")
        return rows


def checked_vectors(
    table: ParquetTable, column: pa.Array, name: str, dim: int, first_row: int, item_ids: pa.Array
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, dim], zeros where missing, and bool [N], where a vector is there.

    Args:
        table: whose column it is.
        column: N lists of numbers, or tensors.
        name: of the column.
        dim: the width every row that is there must have.
        first_row: of the table.
        item_ids: canonical [N].

    Raises:
        DataError: on another width, or a value that is not finite; names row and item.
    """
    x_ND, present_N, wrong = vectors(column, dim)
    if wrong is not None:
        raise DataError(
            f"{table.at(name, first_row + wrong)} (item_id {shown(item_ids, wrong)}): {len(column[wrong])} values, expected "
            f"{dim} as in the rows before"
        )
    if not np.isfinite(x_ND.sum(dtype=np.float64)):  # one pass, without an array of bools
        bad = int(np.argmin(np.isfinite(x_ND).all(axis=1)))
        where = int(np.argmin(np.isfinite(x_ND[bad])))
        raise DataError(
            f"{table.at(name, first_row + bad)} (item_id {shown(item_ids, bad)}): value {where} is {x_ND[bad, where]}; write "
            "null for a missing vector"
        )
    return x_ND, present_N


def clashes(table: ParquetTable, names: Sequence[str]) -> list[str]:
    """Those of the names that are columns of the table, too."""
    return [name for name in names if name in table.schema.names]


def _mapped(shape: tuple[int, int]) -> np.ndarray:
    """Zeros in a file that is gone when nobody maps it any more."""
    with TemporaryFile() as file:
        return np.memmap(file, np.float32, "w+", shape=shape)
