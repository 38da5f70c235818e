"""``items.parquet``: one row an item, with its sources and targets."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.columns import is_categorical, is_index, is_tensor, is_vector, may_be_vector
from sidrec_torchrec.data.embeddings import Embeddings, checked_vectors, clashes
from sidrec_torchrec.data.folder import DataFolder, open_table
from sidrec_torchrec.data.ids import IdIndex, mixed_types, shown
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.errors import DataError


@dataclass(frozen=True)
class ItemBatch:
    """Some consecutive items.

    Args:
        first_row: row of the file the batch starts at.
        item_ids: canonical [N]; see ``data.ids``.
        sources: float32 [N, d] by source; finite; all zeros where missing.
        present: bool [N] by source; False where the vector is missing (null, empty or all zeros in the file).
        targets: Arrow array of length N by categorical column; ``Vocabulary.encode`` makes labels of it.
    """

    first_row: int
    item_ids: pa.Array
    sources: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    targets: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass(frozen=True)
class Items:
    """An opened item file. Made by ``open_items``.

    Args:
        table: the Parquet file.
        source_dims: width by source.
        categorical: names of the categorical columns.
        embeddings: a second file, of the sources that the first does not have.
    """

    table: ParquetTable
    source_dims: dict[str, int]
    categorical: tuple[str, ...]
    embeddings: Embeddings | None = None

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def num_items(self) -> int:
        return self.table.num_rows

    def ids(self) -> pa.Array:
        """Every item_id, canonical [num_items], in file order.

        Raises:
            DataError: on a null or repeated id; names the rows.
        """
        return self._ids

    @cached_property
    def _ids(self) -> pa.Array:
        return self.table.read_unique_ids("item_id")

    @cached_property
    def joined(self) -> dict[str, np.ndarray]:
        """Those of its sources that are in the second file, float32 [num_items, width], in the order of the first."""
        dims = {name: dim for name, dim in self.source_dims.items() if name not in self.table.schema.names}
        return self.embeddings.join(self.ids(), dims) if self.embeddings is not None and dims else {}

    def batches(
        self,
        batch_size: int = 8192,
        sources: Sequence[str] | None = None,
        targets: Sequence[str] | None = None,
        row_groups: Sequence[int] | None = None,
        *,
        share: tuple[int, int] | None = None,
    ) -> Iterator[ItemBatch]:
        """Reads the file, holding one batch (and the ids) in memory.

        Args:
            batch_size: most rows in a batch; a batch may be shorter.
            sources: sources to read; None for all of ``source_dims``, ``()`` for none.
            targets: categorical columns to read; None for all of ``categorical``, ``()`` for none.
            row_groups: which of the file's row groups to read, in this order; None for the whole file in order.
            share: (rank, world size): only this one of as many stretches of the batches, in order; see
                ``ParquetTable.batches``.

        Raises:
            DataError: on an unknown column, a repeated item_id, a vector of another width, or a value that is not
                finite; names file, column, row and item_id.
        """
        sources = tuple(self.source_dims) if sources is None else tuple(sources)
        targets = self.categorical if targets is None else tuple(targets)
        for name in sources:
            _check_kind(self.table, name, "source", self.source_dims)
        for name in targets:
            _check_kind(self.table, name, "target", self.categorical)
        self.ids()
        own = [name for name in sources if name not in self.joined]
        columns = ["item_id", *own, *targets]
        for first_row, batch in self.table.batches(columns, batch_size, row_groups, share=share):
            item_ids = self.table.ids(batch, "item_id", first_row)
            read = {}
            for name in sources:
                if name in self.joined:
                    x_ND = np.array(self.joined[name][first_row : first_row + len(batch)])
                    read[name] = x_ND, np.any(x_ND, axis=1)
                else:
                    dim = self.source_dims[name]
                    read[name] = checked_vectors(self.table, batch.column(name), name, dim, first_row, item_ids)
            yield ItemBatch(
                first_row=first_row,
                item_ids=item_ids,
                sources={name: x_ND for name, (x_ND, _) in read.items()},
                present={name: present_N for name, (_, present_N) in read.items()},
                targets={name: batch.column(name) for name in targets},
            )


class ItemRows:
    """Rows of the item file by item_id; holds 16 bytes an item, and text itself.

    Args:
        items: the item file.

    Raises:
        DataError: on a null or repeated item_id.
    """

    def __init__(self, items: Items) -> None:
        self.path = items.path
        self._index = IdIndex(items.ids())

    def __len__(self) -> int:
        return len(self._index)

    def find(self, item_ids: pa.Array, table: ParquetTable, first_row: int) -> np.ndarray:
        """int32 [N], rows of the item file; -1 where it has no such item.

        Args:
            item_ids: canonical [N].
            table: they are from.
            first_row: of that table.

        Raises:
            DataError: if ids are numbers in one file and text in the other.
        """
        try:
            return self._index.find(item_ids).astype(np.int32)
        except TypeError:
            raise mixed_types(table.at("item_id", first_row), item_ids.type, self.path, self._index.ids.type) from None

    def find_all(self, item_ids: pa.Array, table: ParquetTable, first_row: int, remedy: str) -> np.ndarray:
        """As ``find``, of ids that must be there.

        Raises:
            DataError: on an item that is not in the item file: names the row, and ``remedy``.
        """
        rows_N = self.find(item_ids, table, first_row)
        if (rows_N < 0).any():
            raise self.unknown(item_ids, rows_N, table, first_row, remedy)
        return rows_N

    def unknown(
        self, item_ids: pa.Array, rows_N: np.ndarray, table: ParquetTable, first_row: int, remedy: str
    ) -> DataError:
        """The error of the first id that ``find`` did not find."""
        bad = int(np.argmax(rows_N < 0))
        where = table.at("item_id", first_row + bad)
        return DataError(f"{where}: item_id {shown(item_ids, bad)} is not in {self.path}; {remedy}")


def open_items(
    data: str | Path | DataFolder | Any,
    *,
    sources: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
) -> Items:
    """Opens the items of a data folder and checks their columns (the values are checked as they are read).

    Args:
        data: the data folder; or a file, folder of parts, glob or frame of items.
        sources: sources to read; None for all columns of float lists, of tensors, and of integer lists of one width.
        targets: categorical columns to read; None for all.

    Raises:
        DataError: if the items are missing, broken or empty, or a column is missing or of the wrong type.
    """
    table, schema = open_table(data, "items")
    table.require_ids("item_id")
    embeddings = _open_embeddings(DataFolder.of(data), table) if schema.embeddings else None
    columns = [field for field in table.schema if field.name != "item_id" and not is_index(field.name)]
    able = {field.name: table for field in columns if may_be_vector(field.type)}
    if embeddings is not None:
        able |= dict.fromkeys(embeddings.names(named=True), embeddings.table)
    joined = [] if embeddings is None else embeddings.names()
    all_sources = [*(field.name for field in columns if is_vector(field.type)), *joined]
    chosen = all_sources if sources is None else sources
    for name in chosen:
        _check_kind(table, name, "source", able)
    categorical = [field.name for field in columns if is_categorical(field.type)]
    for name in targets or ():
        _check_kind(table, name, "target", categorical)
    if targets is None:
        targets = [name for name in categorical if name not in chosen]
    dims = {name: _width(able[name], name) for name in chosen}
    return Items(table=table, source_dims=dims, categorical=tuple(targets), embeddings=embeddings)


def _open_embeddings(data: DataFolder, table: ParquetTable) -> Embeddings:
    """The second file.

    Raises:
        DataError: if it has a source that the items have too, or none.
    """
    embeddings = Embeddings(data.table("embeddings"))
    if both := clashes(table, embeddings.names()):
        raise DataError(
            f"{embeddings.table.path}: column '{both[0]}' is in {table.path}, too; rename one, or leave it out"
        )
    if not embeddings.names(named=True):
        raise DataError(f"{embeddings.table.path}: no column of lists of numbers; docs/data.md describes sources")
    return embeddings


def _check_kind(table: ParquetTable, name: str, what: str, able: Collection[str]) -> None:
    """Refuses a column that is not there, or of a type that cannot be a ``what``."""
    if name in able:
        return
    others = ", ".join(f"'{column}'" for column in able) or "none"
    if name not in table.schema.names:
        raise DataError(f"{table.path}: no {what} '{name}'; available: {others}")
    kind = table.type_of(name)
    raise DataError(
        f"{table.path}: column '{table.own_name(name)}' of type {kind} cannot be a {what}, or was not asked for when the file "
        f"was opened; available: {others}"
    )


def _width(table: ParquetTable, name: str) -> int:
    kind = table.type_of(name)
    if is_tensor(kind):
        return kind.shape[0]
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size
    for _, batch in table.batches([name], 1024):
        lengths_N = pc.fill_null(pc.list_value_length(batch.column(0)), 0).to_numpy(zero_copy_only=False)
        if lengths_N.any():
            return int(lengths_N[np.argmax(lengths_N > 0)])
    raise DataError(f"{table.path}: column '{name}' holds no vector in any row; drop it or name other sources")
