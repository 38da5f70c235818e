"""``events.parquet`` and ``users.parquet``: who met which item when, and who they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.columns import is_categorical, is_index, is_label, is_list, is_number, is_time, seconds
from sidrec_torchrec.data.columns import labels as read_labels
from sidrec_torchrec.data.features import FeatureName, numbers
from sidrec_torchrec.data.folder import DataFolder, DataSchema, is_data_folder, open_table
from sidrec_torchrec.data.ids import id_type
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.target_counts import TargetCounts
from sidrec_torchrec.data.tasks import DEFAULT_TASKS, UNKNOWN, RegressionName, split_tasks
from sidrec_torchrec.errors import DataError

EVENT_IDS = ("user_id", "item_id", "timestamp")


@dataclass(frozen=True)
class EventBatch:
    """Some consecutive events.

    Args:
        first_row: row of the file the batch starts at.
        user_ids: canonical [N]; see ``data.ids``.
        item_ids: canonical [N].
        timestamps: int64 [N], seconds.
        labels: int8 [N, K] of 0, 1 and, where several tasks are read, ``tasks.UNKNOWN``; K = 0 if the file has no labels
            (then every event is a positive).
        features: an Arrow array of length N by column.
        weights: float64 [N], how much each counts; None where all count alike.
        values: float64 [N, R], of tasks of regression; NaN where missing.
    """

    first_row: int
    user_ids: pa.Array
    item_ids: pa.Array
    timestamps: np.ndarray
    labels: np.ndarray
    features: dict[str, pa.Array] = field(default_factory=dict)
    weights: np.ndarray | None = None
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def __len__(self) -> int:
        return len(self.user_ids)


@dataclass(frozen=True)
class Events:
    """An opened event file. Made by ``open_events``.

    Args:
        table: the Parquet file.
        tasks: its label columns; none if it has no labels.
        time_unit: of timestamps that are plain numbers.
        features: its columns of features, those that are known of a target first; see ``data.features``.
        num_known: how many of them are known of a target.
        weight: its column of weights; "" without one.
        regressions: numbers to be predicted.
    """

    table: ParquetTable
    tasks: tuple[str, ...]
    time_unit: str = "s"
    features: tuple[FeatureName, ...] = ()
    num_known: int = 0
    weight: str = ""
    regressions: tuple[RegressionName, ...] = ()

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def user_id_type(self) -> pa.DataType:
        """Canonical type of its users' ids."""
        return id_type(self.table.type_of("user_id")) or pa.int64()

    @property
    def num_events(self) -> int:
        return self.table.num_rows

    def batches(
        self,
        batch_size: int = 1 << 18,
        *,
        to_learn: bool = True,
        share: tuple[int, int] = (0, 1),
        met: TargetCounts | None = None,
    ) -> Iterator[EventBatch]:
        """Reads the file in order, holding one batch in memory.

        Args:
            batch_size: most events in a batch.
            to_learn: whether both labels of each task must occur.
            share: which share of the file to read, and of how many.
            met: counts the targets, for a caller who checks those of all shares together; then ``to_learn`` says nothing.

        Raises:
            DataError: on a null (but for labels of several tasks, and values of regressions, which may be missing), a label other
                than 0 and 1, or times that cannot be of their unit; names file, column and row. After the last batch, ``to_learn``,
                if every label of a task was the same: nothing can be learned from those.
        """
        targets = TargetCounts.of(self.tasks, self.regressions) if met is None else met
        features = [named.column for named in self.features]
        more = [*(named.column for named in self.regressions), *([self.weight] if self.weight else [])]
        columns = dict.fromkeys([*EVENT_IDS, *self.tasks, *features, *more])
        for first_row, batch in self.table.batches([*columns], batch_size, share=None if share == (0, 1) else share):
            labels_NK = np.empty((len(batch), len(self.tasks)), np.int8)
            for k, task in enumerate(self.tasks):
                labels_NK[:, k] = self.labels(batch, task, first_row)
            values_NR = np.empty((len(batch), len(self.regressions)))
            for r, named in enumerate(self.regressions):
                values_NR[:, r] = self.values(batch, named, first_row)
            targets.add(labels_NK, values_NR)
            user_ids, item_ids = (self.table.ids(batch, name, first_row) for name in ("user_id", "item_id"))
            yield EventBatch(
                first_row,
                user_ids,
                item_ids,
                timestamps(self.table, batch, first_row, self.time_unit),
                labels_NK,
                {name: batch.column(name) for name in features},
                self.weights(batch, first_row) if self.weight else None,
                values_NR,
            )
        if to_learn and met is None:
            targets.check(self.path, self.tasks, self.num_events)

    def weights(self, batch: pa.RecordBatch, first_row: int) -> np.ndarray:
        """How much each event counts, float64 [N].

        Raises:
            DataError: on a null, or what is no finite number of at least 0; names the row.
        """
        self.table.check_no_null(batch, self.weight, first_row)
        weight_N = numbers(batch.column(self.weight))
        bad_N = ~((weight_N >= 0) & np.isfinite(weight_N))
        if bad_N.any():
            row = int(np.argmax(bad_N))
            where = self.table.at(self.weight, first_row + row)
            raise DataError(f"{where}: {weight_N[row]}; a weight is 0 or more")
        return weight_N

    def values(self, batch: pa.RecordBatch, named: RegressionName, first_row: int) -> np.ndarray:
        """One regression's values, float64 [N]; NaN where missing.

        Raises:
            DataError: on what is not finite in float32, or below 0 where its logarithm is learned; names the row.
        """
        value_N = numbers(batch.column(named.column))
        with np.errstate(over="ignore"):
            bad_N = np.isinf(value_N.astype(np.float32))
        bad_N |= named.is_log & (value_N < 0)
        if bad_N.any():
            row = int(np.argmax(bad_N))
            rule = "0 or more where its logarithm is learned" if named.is_log else "a finite number, or null"
            where = self.table.at(named.column, first_row + row)
            raise DataError(f"{where}: {value_N[row]}; a value to predict is {rule}")
        return value_N

    def labels(self, batch: pa.RecordBatch, task: str, first_row: int) -> np.ndarray:
        """One task's labels, int8 [N] of 0, 1 and UNKNOWN."""
        column = batch.column(task)
        labels_N = read_labels(column)
        bad_N = (labels_N < 0) | (labels_N == UNKNOWN) if len(self.tasks) == 1 else labels_N < 0
        if bad_N.any():
            row = int(np.argmax(bad_N))
            value = column[row].as_py()
            where = self.table.at(task, first_row + row)
            raise DataError(
                f"{where}: null; every row needs a value" if value is None else f"{where}: {value}; a label is 0 or 1"
            )
        return labels_N


@dataclass(frozen=True)
class UserBatch:
    """Some consecutive users: canonical ``user_ids`` [N], and an Arrow array of length N by categorical column."""

    first_row: int
    user_ids: pa.Array
    columns: dict[str, pa.Array]

    def __len__(self) -> int:
        return len(self.user_ids)


@dataclass(frozen=True)
class Users:
    """An opened user file. Made by ``open_users``.

    Args:
        table: the Parquet file.
        categorical: names of the categorical columns to read: of strings or integers, or, if somebody named them, lists of those.
        are_chosen: whether somebody named them.
        dense: columns to be cut into buckets.
    """

    table: ParquetTable
    categorical: tuple[str, ...]
    are_chosen: bool = False
    dense: tuple[FeatureName, ...] = ()

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def num_users(self) -> int:
        return self.table.num_rows

    def ids(self) -> pa.Array:
        """Every user_id, canonical [num_users], in file order.

        Raises:
            DataError: on a null or repeated id; names the rows.
        """
        return self._ids

    @cached_property
    def _ids(self) -> pa.Array:
        return self.table.read_unique_ids("user_id")

    def batches(self, batch_size: int = 1 << 16, columns: Sequence[str] | None = None) -> Iterator[UserBatch]:
        """Reads the file in order, holding one batch (and the ids) in memory.

        Args:
            batch_size: most rows in a batch.
            columns: categorical and dense columns to read; None for all categorical ones.

        Raises:
            DataError: on an unknown column, or a null or repeated user_id.
        """
        columns = self.categorical if columns is None else tuple(columns)
        for name in columns:
            if name not in self.categorical and name not in [named.column for named in self.dense]:
                kind = self.table.type_of(name)
                raise DataError(f"{self.path}: column '{name}' is {kind}, not categorical")
        self.ids()
        for first_row, batch in self.table.batches(["user_id", *columns], batch_size):
            user_ids = self.table.ids(batch, "user_id", first_row)
            yield UserBatch(first_row, user_ids, {name: batch.column(name) for name in columns})


def timestamps(table: ParquetTable, batch: pa.RecordBatch, first_row: int, unit: str) -> np.ndarray:
    """The column ``timestamp`` of a batch as int64 [N], seconds.

    Raises:
        DataError: on a null, or times that cannot be of the unit; names the row.
    """
    table.check_no_null(batch, "timestamp", first_row)
    try:
        return seconds(batch.column("timestamp"), unit)
    except ValueError as error:
        raise DataError(f"{table.at('timestamp', first_row)} and after: {error}") from None


def open_events(
    data: str | Path | DataFolder | Any, tasks: tuple[str, ...] = (), schema: DataSchema | None = None
) -> Events:
    """Opens the events of a data folder and checks their columns (the values are checked as they are read).

    Args:
        data: the data folder; or a file, folder of parts, glob or frame of events.
        tasks: label columns to read, and numbers, as ``--tasks`` names them; none named means ``label``, if there is one.
        schema: of their columns, where a data folder does not say.

    Raises:
        DataError: if the events are missing, broken or empty, or a column is missing or of the wrong type.
    """
    table, schema = open_table(data, "events", schema)
    return events_of(table, tasks, schema)


def events_of(table: ParquetTable, tasks: tuple[str, ...] = (), schema: DataSchema | None = None) -> Events:
    """The events of a table; see ``open_events``."""
    check_event_ids(table)
    if not tasks and DEFAULT_TASKS[0] in table.schema.names:
        tasks = DEFAULT_TASKS
    tasks, regressions = split_tasks(tasks)
    for target in regressions:
        if not is_number(kind := table.type_of(target.column, what="column to predict")):
            raise DataError(
                f"{table.path}: column '{table.own_name(target.column)}' is {kind}; a regression predicts numbers"
            )
    for task in tasks:
        kind = table.type_of(task, what="label column")
        if not is_label(kind):
            raise DataError(f"{table.path}: column '{table.own_name(task)}' is {kind}; labels are 0 and 1, or booleans")
    schema = schema or DataSchema()
    features = tuple(FeatureName.parse(text) for text in (*schema.event_features, *schema.history_features))
    for named in features:
        named.is_dense(table)  # refuses what it cannot be
        if named.column in tasks:
            raise DataError(
                f"{table.path}: column '{table.own_name(named.column)}' is a label to predict, which histories have anyway; leave "
                "it out of the features"
            )
    for named in features[: len(schema.event_features)]:
        if named.column in [target.column for target in regressions]:
            raise DataError(
                f"{table.path}: column '{table.own_name(named.column)}' is a number to predict; what is known only afterwards may be a "
                "history feature, and no event feature"
            )
    weight = schema.event_weight
    if weight and not is_number(kind := table.type_of(weight, what="column of weights")):
        raise DataError(f"{table.path}: column '{table.own_name(weight)}' is {kind}; weights are numbers")
    return Events(table, tasks, schema.time_unit or "s", features, len(schema.event_features), weight, regressions)


def check_event_ids(table: ParquetTable) -> None:
    """Raises DataError unless users, items and times are there, and can be what they are called."""
    for column in ("user_id", "item_id"):
        table.require_ids(column)
    kind = table.type_of("timestamp", what="required column")
    if not is_time(kind):
        raise DataError(
            f"{table.path}: column '{table.own_name('timestamp')}' is {kind}; times are Arrow timestamps, dates or numbers: "
            "cast it when writing the file"
        )


def open_users(data: str | Path | DataFolder | Any, schema: DataSchema | None = None) -> Users | None:
    """Opens the users of a data folder, or of a file, folder of parts, glob or frame; None if a data folder has none.

    Args:
        data: where they are.
        schema: of their columns, where a data folder does not say.

    Raises:
        DataError: if they are broken or empty, or have no ``user_id``.
    """
    if is_data_folder(data) and not DataFolder.of(data).has("users"):
        return None
    table, schema = open_table(data, "users", schema)
    return users_of(table, schema)


def users_of(table: ParquetTable, schema: DataSchema | None = None) -> Users:
    """The users of a table; see ``open_users``."""
    table.require_ids("user_id")
    chosen = [FeatureName.parse(text) for text in (schema or DataSchema()).user_columns]
    if not chosen:
        fields = [field for field in table.schema if field.name != "user_id" and not is_index(field.name)]
        single = tuple(field.name for field in fields if is_categorical(field.type) and not is_list(field.type))
        return Users(table, single)
    dense = tuple(named for named in chosen if named.is_dense(table, what="user column", may_be_list=True))
    categorical = tuple(named.column for named in chosen if named not in dense)
    return Users(table, categorical, are_chosen=True, dense=dense)
