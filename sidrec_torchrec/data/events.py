"""``events.parquet`` and ``users.parquet``: who met which item when, and who they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.parquet import ParquetTable, is_categorical
from sidrec_torchrec.data.tasks import DEFAULT_TASKS, UNKNOWN
from sidrec_torchrec.errors import DataError

EVENTS_FILE = "events.parquet"
USERS_FILE = "users.parquet"
EVENT_IDS = ("user_id", "item_id", "timestamp")


@dataclass(frozen=True)
class EventBatch:
    """Some consecutive events.

    Args:
        first_row: row of the file the batch starts at.
        user_ids: int64 [N].
        item_ids: int64 [N].
        timestamps: int64 [N].
        labels: int8 [N, K] of 0, 1 and, where several tasks are read, ``tasks.UNKNOWN``; K = 0 if the file has no labels
            (then every event is a positive).
    """

    first_row: int
    user_ids: np.ndarray
    item_ids: np.ndarray
    timestamps: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.user_ids)


@dataclass(frozen=True)
class Events:
    """An opened event file. Made by ``open_events``.

    Args:
        table: the Parquet file.
        tasks: its label columns; none if it has no labels.
    """

    table: ParquetTable
    tasks: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def num_events(self) -> int:
        return self.table.num_rows

    def batches(self, batch_size: int = 1 << 18, *, to_learn: bool = True) -> Iterator[EventBatch]:
        """Reads the file in order, holding one batch in memory.

        Args:
            batch_size: most events in a batch.
            to_learn: whether both labels of each task must occur.

        Raises:
            DataError: on a null (but for labels of several tasks, which may be missing), or a label other than 0 and 1;
                names file, column and row. After the last batch, ``to_learn``, if every label of a task was the same:
                nothing can be learned from those.
        """
        counts_K2 = np.zeros((len(self.tasks), 2), np.int64)  # negatives, positives
        for first_row, batch in self.table.batches([*EVENT_IDS, *self.tasks], batch_size):
            labels_NK = np.empty((len(batch), len(self.tasks)), np.int8)
            for k, task in enumerate(self.tasks):
                labels_NK[:, k] = self._labels(batch, task, first_row)
                counts_K2[k] += [(labels_NK[:, k] == value).sum() for value in (0, 1)]
            user_ids_N, item_ids_N, timestamps_N = (self.table.int64(batch, name, first_row) for name in EVENT_IDS)
            yield EventBatch(first_row, user_ids_N, item_ids_N, timestamps_N, labels_NK)
        for task, counts_2 in zip(self.tasks, counts_K2, strict=True):
            if to_learn and not counts_2.all():
                rows = f"{counts_2.sum()} rows" + " that have it" * bool(counts_2.sum() < self.num_events)
                raise DataError(
                    f"{self.path}: column '{task}' is {int(counts_2[1] > 0)} in all {rows}; a ranker needs both classes. "
                    "If every event is a positive, leave the column out"
                )

    def _labels(self, batch: pa.RecordBatch, task: str, first_row: int) -> np.ndarray:
        """One task's labels, int64 [N] of 0, 1 and UNKNOWN."""
        if len(self.tasks) == 1:
            known_N = np.ones(len(batch), bool)
            labels_N = self.table.int64(batch, task, first_row)
        else:
            column = batch.column(task)
            known_N = column.is_valid().to_numpy(zero_copy_only=False)
            labels_N = column.cast(pa.int64()).fill_null(0).to_numpy()
        bad_N = (labels_N != 0) & (labels_N != 1)
        if bad_N.any():
            row = int(np.argmax(bad_N))
            raise DataError(f"{self.path}: column '{task}', row {first_row + row}: {labels_N[row]}; a label is 0 or 1")
        return np.where(known_N, labels_N, UNKNOWN)


@dataclass(frozen=True)
class UserBatch:
    """Some consecutive users: int64 ``user_ids`` [N], and an Arrow array of length N by categorical column."""

    first_row: int
    user_ids: np.ndarray
    columns: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.user_ids)


@dataclass(frozen=True)
class Users:
    """An opened user file. Made by ``open_users``.

    Args:
        table: the Parquet file.
        categorical: names of its categorical columns (strings, integers, or lists of them); others are left unread.
    """

    table: ParquetTable
    categorical: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def num_users(self) -> int:
        return self.table.num_rows

    def ids(self) -> np.ndarray:
        """Every user_id, int64 [num_users], in file order.

        Raises:
            DataError: on a null or repeated id; names the rows.
        """
        return self._ids

    @cached_property
    def _ids(self) -> np.ndarray:
        return self.table.read_unique_ids("user_id")

    def batches(self, batch_size: int = 1 << 16, columns: Sequence[str] | None = None) -> Iterator[UserBatch]:
        """Reads the file in order, holding one batch (and the ids) in memory.

        Args:
            batch_size: most rows in a batch.
            columns: categorical columns to read; None for all.

        Raises:
            DataError: on an unknown column, or a null or repeated user_id.
        """
        columns = self.categorical if columns is None else tuple(columns)
        for name in columns:
            if name not in self.categorical:
                kind = self.table.type_of(name)
                raise DataError(f"{self.path}: column '{name}' is {kind}, not categorical")
        self.ids()
        for first_row, batch in self.table.batches(["user_id", *columns], batch_size):
            user_ids_N = self.table.int64(batch, "user_id", first_row)
            yield UserBatch(first_row, user_ids_N, {name: batch.column(name) for name in columns})


def open_events(folder_or_file: str | Path, tasks: tuple[str, ...] = ()) -> Events:
    """Opens ``events.parquet`` and checks its columns (the values are checked as they are read).

    Args:
        folder_or_file: the data folder, or the file itself.
        tasks: label columns to read; none named means ``label``, if there is one.

    Raises:
        DataError: if the file is missing, broken or empty, or a column is missing or of the wrong type.
    """
    path = Path(folder_or_file)
    return events_of(ParquetTable.open(path / EVENTS_FILE if path.is_dir() else path), tasks)


def events_of(table: ParquetTable, tasks: tuple[str, ...] = ()) -> Events:
    """The events of a table; see ``open_events``."""
    for column in EVENT_IDS:
        table.require_int64(column)
    if not tasks and DEFAULT_TASKS[0] in table.schema.names:
        tasks = DEFAULT_TASKS
    for task in tasks:
        kind = table.type_of(task, what="label column")
        if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            raise DataError(f"{table.path}: column '{task}' must be int8 or bool, is {kind}")
    return Events(table, tasks)


def open_users(folder_or_file: str | Path) -> Users | None:
    """Opens ``users.parquet``; None if the folder has none.

    Raises:
        DataError: if the file is broken or empty, or has no int64 ``user_id``.
    """
    path = Path(folder_or_file)
    if path.is_dir():
        path = path / USERS_FILE
        if not path.exists():
            return None
    return users_of(ParquetTable.open(path))


def users_of(table: ParquetTable) -> Users:
    """The users of a table; see ``open_users``."""
    table.require_int64("user_id")
    columns = [field.name for field in table.schema if field.name != "user_id" and is_categorical(field.type)]
    return Users(table, tuple(columns))
