"""``items.parquet``: one row an item, with its sources and targets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.parquet import ParquetTable, is_categorical, is_vector, vectors
from sidrec_torchrec.errors import DataError

ITEMS_FILE = "items.parquet"


@dataclass(frozen=True)
class ItemBatch:
    """Some consecutive items.

    Args:
        first_row: row of the file the batch starts at.
        item_ids: int64 [N].
        sources: float32 [N, d] by source; finite; all zeros where missing.
        present: bool [N] by source; False where the vector is missing (null, empty or all zeros in the file).
        targets: Arrow array of length N by categorical column; ``Vocabulary.encode`` makes labels of it.
    """

    first_row: int
    item_ids: np.ndarray
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
    """

    table: ParquetTable
    source_dims: dict[str, int]
    categorical: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def num_items(self) -> int:
        return self.table.num_rows

    def ids(self) -> np.ndarray:
        """Every item_id, int64 [num_items], in file order.

        Raises:
            DataError: on a null or repeated id; names the rows.
        """
        return self._ids

    @cached_property
    def _ids(self) -> np.ndarray:
        return self.table.read_unique_ids("item_id")

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
            _check_known(self.table, name, "source", self.source_dims)
        for name in targets:
            _check_known(self.table, name, "target", self.categorical)
        self.ids()
        columns = ["item_id", *sources, *targets]
        for first_row, batch in self.table.batches(columns, batch_size, row_groups, share=share):
            item_ids_N = self.table.int64(batch, "item_id", first_row)
            read = {name: self._source(batch.column(name), name, first_row, item_ids_N) for name in sources}
            yield ItemBatch(
                first_row=first_row,
                item_ids=item_ids_N,
                sources={name: x_ND for name, (x_ND, _) in read.items()},
                present={name: present_N for name, (_, present_N) in read.items()},
                targets={name: batch.column(name) for name in targets},
            )

    def _source(
        self, column: pa.Array, name: str, first_row: int, item_ids_N: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        dim = self.source_dims[name]
        x_ND, present_N, wrong = vectors(column, dim)
        if wrong is not None:
            raise DataError(
                f"{self.path}: column '{name}', row {first_row + wrong} (item_id {item_ids_N[wrong]}): "
                f"{len(column[wrong])} values, expected {dim} as in the rows before"
            )
        if not np.isfinite(x_ND.sum(dtype=np.float64)):  # one pass, without an array of bools
            finite_N = np.isfinite(x_ND).all(axis=1)
            bad = int(np.argmin(finite_N))
            where = int(np.argmin(np.isfinite(x_ND[bad])))
            raise DataError(
                f"{self.path}: column '{name}', row {first_row + bad} (item_id {item_ids_N[bad]}): value {where} is "
                f"{x_ND[bad, where]}; write null for a missing vector"
            )
        return x_ND, present_N


class ItemRows:
    """Rows of the item file by item_id; holds 12 bytes an item.

    Args:
        items: the item file.

    Raises:
        DataError: on a null or repeated item_id.
    """

    def __init__(self, items: Items) -> None:
        self._path = items.path
        ids = items.ids()
        self._rows = np.argsort(ids, kind="stable").astype(np.int32)
        self._sorted_ids = ids[self._rows]

    def find(
        self,
        item_ids_N: np.ndarray,
        path: Path,
        first_row: int,
        remedy: str = "add the item or leave its events out",
    ) -> np.ndarray:
        """int32 [N], rows of the item file.

        Args:
            item_ids_N: int64 [N].
            path: file they are from.
            first_row: of that file.
            remedy: what to do about an unknown item.

        Raises:
            DataError: on an item that is not in the item file; names the row.
        """
        at_N = np.searchsorted(self._sorted_ids, item_ids_N).clip(max=len(self._sorted_ids) - 1)
        known_N = self._sorted_ids[at_N] == item_ids_N
        if not known_N.all():
            bad = int(np.argmin(known_N))
            raise DataError(
                f"{path}: column 'item_id', row {first_row + bad}: item_id {item_ids_N[bad]} is not in {self._path}; {remedy}"
            )
        return self._rows[at_N]


def open_items(
    folder_or_file: str | Path,
    *,
    sources: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
) -> Items:
    """Opens ``items.parquet`` and checks its columns (the values are checked as they are read).

    Args:
        folder_or_file: the data folder, or the file itself.
        sources: the sources to use, in this order; None for every column of float lists.
        targets: the categorical columns to use; None for every one (strings, integers, or lists of them).

    Returns:
        The items; nothing but the schema (and, for sources of variable-size lists, a first vector) is read yet.

    Raises:
        DataError: if the file is missing, broken or empty, or a column is unknown or of the wrong type.

    Example::

        items = open_items("data", sources=["text_emb"], targets=["category"])
        for batch in items.batches(4096):
            train(batch.sources["text_emb"], batch.present["text_emb"], batch.targets["category"])
    """
    path = Path(folder_or_file)
    table = ParquetTable.open(path / ITEMS_FILE if path.is_dir() else path)
    table.require_int64("item_id")
    all_sources = [field.name for field in table.schema if is_vector(field.type)]
    all_targets = [f.name for f in table.schema if f.name != "item_id" and is_categorical(f.type)]
    for name in sources or ():
        _check_known(table, name, "source", all_sources)
    for name in targets or ():
        _check_known(table, name, "target", all_targets)
    chosen = all_sources if sources is None else sources
    return Items(
        table=table,
        source_dims={name: _width(table, name) for name in chosen},
        categorical=tuple(all_targets if targets is None else targets),
    )


def _check_known(table: ParquetTable, name: str, what: str, known: Sequence[str] | dict[str, int]) -> None:
    if name in known:
        return
    available = ", ".join(f"'{column}'" for column in known) or "none"
    if name in table.schema.names:
        raise DataError(
            f"{table.path}: column '{name}' of type {table.type_of(name)} cannot be a {what}, or was not asked "
            f"for when the file was opened; available: {available}"
        )
    raise DataError(f"{table.path}: no {what} '{name}'; available: {available}")


def _width(table: ParquetTable, name: str) -> int:
    kind = table.type_of(name)
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size
    for _, batch in table.batches([name], 1024):
        lengths_N = pc.fill_null(pc.list_value_length(batch.column(0)), 0).to_numpy(zero_copy_only=False)
        if lengths_N.any():
            return int(lengths_N[np.argmax(lengths_N > 0)])
    raise DataError(f"{table.path}: column '{name}' holds no vector in any row; drop it or name other sources")
