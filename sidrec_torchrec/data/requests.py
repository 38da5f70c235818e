"""Requests: who is asked about which item, and when; read from Parquet, from a table, or the newest events of a log."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.events import check_event_ids, timestamps
from sidrec_torchrec.data.features import Features, encode
from sidrec_torchrec.data.folder import DataSchema
from sidrec_torchrec.data.histories import Histories, UserCodes
from sidrec_torchrec.data.items import ItemRows, Items
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.sequences import Sequence
from sidrec_torchrec.data.user_lists import Lists
from sidrec_torchrec.errors import DataError

EVENT_ROW = "event_row"  # of a request that is an event: its row of the event file
_BATCH = 1 << 14  # requests held at once
_REMEDY = "leave its requests out, or add the item there, encode it, prepare again and name that folder with --prepared"


@dataclass(frozen=True)
class RequestBatch:
    """R requests, each with where its history stands in ``Histories``.

    Args:
        columns: what they are written with.
        user_ids: canonical [R]; see ``data.ids``.
        codes: int32 [R, F], of the users' features that are no lists.
        lists: those of the users' features that are, R of each.
        items: int32 [R], rows of the item file.
        timestamps: int64 [R].
        features: int16 [R, E], codes of ``Features.event``.
        begins, ends: int64 [R]; the user's events before the request are begin .. end - 1.
        num_values: tasks of regression, whose values are not known.
    """

    columns: pa.RecordBatch
    user_ids: pa.Array
    codes: np.ndarray
    lists: tuple[Lists, ...]
    items: np.ndarray
    timestamps: np.ndarray
    features: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    num_values: int = 0

    def __len__(self) -> int:
        return len(self.user_ids)

    def rows(self, most: int) -> list[np.ndarray]:
        """Places of the requests that share a history, int64, at most so many of them together; every request once."""
        user_R = self.user_ids.dictionary_encode().indices.to_numpy()
        order = np.lexsort((self.timestamps, self.ends, user_R))
        is_other = np.diff(user_R[order]).astype(bool) | np.diff(self.ends[order]).astype(bool)
        groups = np.split(order, np.flatnonzero(is_other) + 1) if len(order) else []
        return [group[first : first + most] for group in groups for first in range(0, len(group), most)]

    def sequence(self, places: np.ndarray, histories: Histories, max_history: int) -> Sequence:
        """Requests that share a history as the targets of one row, with the last ``max_history`` events before them.

        The labels of targets, which nothing reads but a loss, are 0; and so are features that are known only afterwards.
        """
        features_NF = np.zeros((len(places), histories.features_NF.shape[1]), np.int16)
        features_NF[:, : self.features.shape[1]] = self.features[places]
        first, count = places[0], len(places)
        end = int(self.ends[first])
        before = end - int(self.begins[first])
        length = min(before, max_history)
        events = slice(end - length, end)
        return Sequence(
            user_id=self.user_ids[int(first)].as_py(),
            user_codes=self.codes[first],
            user_lists=tuple(own[int(first)] for own in self.lists),
            item=np.concatenate([histories.item_N[events], self.items[places]]),
            action=np.concatenate([histories.action_N[events], np.zeros(count, np.int8)]),
            timestamp=np.concatenate([histories.timestamp_N[events], self.timestamps[places]]),
            order=np.minimum(np.arange(before - length, before + count, dtype=np.int32), before),
            visible=np.arange(length + count) < length,
            features=np.concatenate([histories.features_NF[events], features_NF]),
            weight=np.ones(length + count, np.float32),
            values=np.full((length + count, self.num_values), np.nan, np.float32),
            num_targets=count,
        )


@dataclass(frozen=True)
class Known:
    """What requests are joined with.

    Args:
        items: rows of the item file.
        histories: events by user.
        users: their features.
        features: of events and requests.
        num_values: tasks of regression.
    """

    items: ItemRows
    histories: Histories
    users: UserCodes
    features: Features = field(default_factory=Features)
    num_values: int = 0


@dataclass(frozen=True)
class AskedBatch:
    """R requests before they are joined with what is known of their users.

    Args:
        columns, user_ids, items, timestamps, features: as ``RequestBatch`` has them.
        where: the first one's place, as messages name it.
    """

    columns: pa.RecordBatch
    user_ids: pa.Array
    items: np.ndarray
    timestamps: np.ndarray
    features: np.ndarray
    where: str

    def joined(self, known: Known) -> RequestBatch:
        """With their users' histories and features.

        Raises:
            DataError: if users are numbers here and text there.
        """
        try:
            begins_R, ends_R = known.histories.before(self.user_ids, self.timestamps)
            codes_RF, lists = known.users.of(self.user_ids)
        except TypeError as error:
            raise DataError(f"{self.where}: {error}: write users alike everywhere") from None
        return RequestBatch(
            columns=self.columns,
            user_ids=self.user_ids,
            codes=codes_RF,
            lists=lists,
            items=self.items,
            timestamps=self.timestamps,
            features=self.features,
            begins=begins_R,
            ends=ends_R,
            num_values=known.num_values,
        )


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
    """Rows of a table of ``user_id``, ``item_id``, ``timestamp`` and whatever else, one request each.

    Args:
        table: the requests.
        time_unit: of timestamps that are plain numbers.

    Raises:
        DataError: on a missing column, or one of the wrong type; names file and column.
    """

    table: ParquetTable
    time_unit: str = "s"

    def __post_init__(self) -> None:
        check_event_ids(self.table)

    @staticmethod
    def open(path: Path, schema: DataSchema | None = None) -> "GivenRequests":
        """A Parquet file, a folder of them, which are read in the order of their paths, or a glob; each may be without rows.

        Args:
            path: the requests.
            schema: what the columns are called, and the unit of their times.

        Raises:
            DataError: if they are missing or broken, or as the class does.
        """
        schema = schema or DataSchema()
        table = ParquetTable.open(path, may_be_empty=True, names=schema.names)
        return GivenRequests(table, schema.time_unit or "s")

    @property
    def schema(self) -> pa.Schema:
        fields = [field.with_name(self.table.own_name(field.name)) for field in self.table.schema]
        return pa.schema(fields, self.table.schema.metadata)

    @property
    def num_requests(self) -> int:
        return self.table.num_rows

    def batches(self, known: Known) -> Iterator[RequestBatch]:
        """See ``Requests``.

        Raises:
            DataError: on a null, a time below 0, or an unknown item; names file, column and row. On a missing column of a
                feature that is known of a target.
        """
        return (asked.joined(known) for _, asked in self.asked(known.items, known.features))

    def asked(
        self, rows: ItemRows, features: Features, share: tuple[int, int] | None = None
    ) -> Iterator[tuple[int, AskedBatch]]:
        """Reads them without any histories; gives each batch with its first row.

        Args:
            rows: of the item file.
            features: of events and requests.
            share: which share of the table to read, and of how many; None for all of it.

        Raises:
            DataError: as ``batches``.
        """
        for feature in features.event:
            self.table.type_of(feature.name, what="feature of requests")
        for first_row, columns in self.table.batches(self.table.schema.names, _BATCH, share=share):
            user_ids, item_ids = (self.table.ids(columns, name, first_row) for name in ("user_id", "item_id"))
            timestamps_R = timestamps(self.table, columns, first_row, self.time_unit)
            if (timestamps_R < 0).any():
                bad = int(np.argmax(timestamps_R < 0))
                raise DataError(
                    f"{self.table.at('timestamp', first_row + bad)}: {timestamps_R[bad]} is below 0; give seconds since 1970, "
                    "as events do"
                )
            named = dict(zip(columns.schema.names, columns.columns, strict=True))
            yield (
                first_row,
                AskedBatch(
                    columns=self._written(columns),
                    user_ids=user_ids,
                    items=rows.find_all(item_ids, self.table, first_row, _REMEDY),
                    timestamps=timestamps_R,
                    features=encode(features.event, named, len(columns), self.table),
                    where=self.table.at("user_id", first_row),
                ),
            )

    def columns(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """First row and columns of each of ``batches``, as they are written."""
        for first_row, columns in self.table.batches(self.table.schema.names, _BATCH):
            yield first_row, self._written(columns)

    def _written(self, columns: pa.RecordBatch) -> pa.RecordBatch:
        arrays = [array.cast(kind.type) for array, kind in zip(columns.columns, self.schema, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema.remove_metadata())


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
        return newest_schema(self.histories.users.ids.type, self.items.ids().type)

    @property
    def num_requests(self) -> int:
        return len(self.histories.newest(self.count)[0])

    def batches(self, known: Known) -> Iterator[RequestBatch]:
        """See ``Requests``; holds 16 bytes a request."""
        log = self.histories
        item_ids = self.items.ids()
        begin_M, place_M = log.newest(self.count)
        for first in range(0, len(place_M), _BATCH):
            begins_R, places_R = begin_M[first : first + _BATCH], place_M[first : first + _BATCH]
            user_R = np.searchsorted(log.first_U1, places_R, side="right") - 1
            user_ids = log.users.ids.take(pa.array(user_R))
            items_R, timestamps_R = log.item_N[places_R], log.timestamp_N[places_R]
            numbers = map(pa.array, (timestamps_R, log.row_N[places_R]))
            columns = [user_ids, item_ids.take(pa.array(items_R)), *numbers]
            codes_RF, lists = known.users.of(user_ids)
            yield RequestBatch(
                columns=pa.RecordBatch.from_arrays(columns, schema=self.schema),
                user_ids=user_ids,
                codes=codes_RF,
                lists=lists,
                items=items_R,
                timestamps=timestamps_R,
                features=log.features_NF[places_R, : len(known.features.event)],
                begins=begins_R,
                ends=places_R,
                num_values=known.num_values,
            )


def newest_schema(user_ids: pa.DataType, item_ids: pa.DataType) -> pa.Schema:
    """Of ``NewestEvents``, whose ids are of these types."""
    return pa.schema([("user_id", user_ids), ("item_id", item_ids), ("timestamp", pa.int64()), (EVENT_ROW, pa.int64())])
