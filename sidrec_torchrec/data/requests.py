"""Requests: who is asked about which item, and when; read from Parquet, from a table, or the newest events of a log."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.events import EVENT_IDS
from sidrec_torchrec.data.histories import Histories, UserCodes
from sidrec_torchrec.data.items import ItemRows, Items
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.sequences import Sequence
from sidrec_torchrec.errors import DataError

EVENT_ROW = "event_row"  # of a request that is an event: its row of the event file
_BATCH = 1 << 14  # requests held at once
_REMEDY = "leave its requests out, or add the item there, encode it, prepare again and name that folder with --prepared"


@dataclass(frozen=True)
class RequestBatch:
    """R requests, each with where its history stands in ``Histories``.

    Args:
        columns: what they are written with.
        user_ids: int64 [R].
        codes: int32 [R, F], of the users' features.
        items: int32 [R], rows of the item file.
        timestamps: int64 [R].
        begins, ends: int64 [R]; the user's events before the request are begin .. end - 1.
    """

    columns: pa.RecordBatch
    user_ids: np.ndarray
    codes: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    begins: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.user_ids)

    def rows(self, most: int) -> list[np.ndarray]:
        """Places of the requests that share a history, int64, at most so many of them together; every request once."""
        order = np.lexsort((self.timestamps, self.ends, self.user_ids))
        is_other = np.diff(self.user_ids[order]).astype(bool) | np.diff(self.ends[order]).astype(bool)
        groups = np.split(order, np.flatnonzero(is_other) + 1) if len(order) else []
        return [group[first : first + most] for group in groups for first in range(0, len(group), most)]

    def sequence(self, places: np.ndarray, histories: Histories, max_history: int) -> Sequence:
        """Requests that share a history as the targets of one row, with the last ``max_history`` events before them.

        The labels of targets, which nothing reads but a loss, are 0.
        """
        first, count = places[0], len(places)
        end = int(self.ends[first])
        before = end - int(self.begins[first])
        length = min(before, max_history)
        events = slice(end - length, end)
        return Sequence(
            user_id=int(self.user_ids[first]),
            user_codes=self.codes[first],
            item=np.concatenate([histories.item_N[events], self.items[places]]),
            action=np.concatenate([histories.action_N[events], np.zeros(count, np.int8)]),
            timestamp=np.concatenate([histories.timestamp_N[events], self.timestamps[places]]),
            order=np.minimum(np.arange(before - length, before + count, dtype=np.int32), before),
            visible=np.arange(length + count) < length,
            num_targets=count,
        )


@dataclass(frozen=True)
class Known:
    """What requests are joined with.

    Args:
        items: rows of the item file.
        histories: events by user.
        users: their features.
    """

    items: ItemRows
    histories: Histories
    users: UserCodes


class Requests(Protocol):
    """Something to read requests from, batch by batch, in an order that stays."""

    @property
    def schema(self) -> pa.Schema:
        """Of their columns."""
        ...

    @property
    def num_requests(self) -> int:
        """In all batches."""
        ...

    def batches(self, known: Known) -> Iterator[RequestBatch]:
        """Reads them in order, holding one batch in memory."""
        ...


@dataclass(frozen=True)
class GivenRequests:
    """Rows of tables of ``user_id``, ``item_id``, ``timestamp`` and whatever else, one request each.

    Args:
        tables: of the same columns.

    Raises:
        DataError: on a missing column, or one of the wrong or another type; names file and column.
    """

    tables: tuple[ParquetTable, ...]

    def __post_init__(self) -> None:
        for table in self.tables:
            for column in EVENT_IDS:
                table.require_int64(column)
            for name in self.schema.names:
                kind, first = table.type_of(name), self.schema.field(name).type
                if kind != first:
                    raise DataError(
                        f"{table.path}: column '{name}' is {kind}, in {self.tables[0].path} it is {first}; write all parts "
                        "with the same types"
                    )
            for name in table.schema.names:
                self.tables[0].type_of(name)

    @staticmethod
    def open(path: Path) -> "GivenRequests":
        """A Parquet file, or a folder of them, which are read in the order of their names; each may be without rows.

        Raises:
            DataError: if it is missing or broken, or as the class does.
        """
        path = Path(path)
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith((".", "_")))
            if not files:
                raise DataError(f"{path}: no file *.parquet in this folder; write the requests there, or name a file")
        return GivenRequests(tuple(ParquetTable.open(file, may_be_empty=True) for file in files))

    @property
    def schema(self) -> pa.Schema:
        return self.tables[0].schema

    @property
    def num_requests(self) -> int:
        return sum(table.num_rows for table in self.tables)

    def batches(self, known: Known) -> Iterator[RequestBatch]:
        """See ``Requests``.

        Raises:
            DataError: on a null, a time below 0, or an unknown item; names file, column and row.
        """
        for table in self.tables:
            for first_row, columns in table.batches(self.schema.names, _BATCH):
                user_ids_R, item_ids_R, timestamps_R = (table.int64(columns, name, first_row) for name in EVENT_IDS)
                if (timestamps_R < 0).any():
                    bad = int(np.argmax(timestamps_R < 0))
                    raise DataError(
                        f"{table.path}: column 'timestamp', row {first_row + bad}: {timestamps_R[bad]} is below 0; "
                        "give seconds, as events.parquet does"
                    )
                begins_R, ends_R = known.histories.before(user_ids_R, timestamps_R)
                yield RequestBatch(
                    columns=columns.select(self.schema.names),
                    user_ids=user_ids_R,
                    codes=known.users.of(user_ids_R),
                    items=known.items.find(item_ids_R, table.path, first_row, _REMEDY),
                    timestamps=timestamps_R,
                    begins=begins_R,
                    ends=ends_R,
                )


@dataclass(frozen=True)
class NewestEvents:
    """Each user's last events as requests, in the order of the event file; what came before one is its history.

    Args:
        items: the item file.
        histories: the events.
        count: of events a user.
    """

    items: Items
    histories: Histories
    count: int

    @property
    def schema(self) -> pa.Schema:
        return pa.schema([(name, pa.int64()) for name in (*EVENT_IDS, EVENT_ROW)])

    @property
    def num_requests(self) -> int:
        return int(np.minimum(np.diff(self.histories.first_U1), self.count).sum())

    def batches(self, known: Known) -> Iterator[RequestBatch]:
        """See ``Requests``; holds 16 bytes a request."""
        log = self.histories
        item_ids_I = self.items.ids()
        begin_M, place_M = log.newest(self.count)
        for first in range(0, len(place_M), _BATCH):
            begins_R, places_R = begin_M[first : first + _BATCH], place_M[first : first + _BATCH]
            user_ids_R = log.user_U[np.searchsorted(log.first_U1, places_R, side="right") - 1]
            items_R, timestamps_R = log.item_N[places_R], log.timestamp_N[places_R]
            columns = [user_ids_R, item_ids_I[items_R], timestamps_R, log.row_N[places_R]]
            yield RequestBatch(
                columns=pa.RecordBatch.from_arrays(list(map(pa.array, columns)), schema=self.schema),
                user_ids=user_ids_R,
                codes=known.users.of(user_ids_R),
                items=items_R,
                timestamps=timestamps_R,
                begins=begins_R,
                ends=places_R,
            )
