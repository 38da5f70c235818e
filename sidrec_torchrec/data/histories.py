"""Events by user and users' features, in memory: what requests are joined with."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.columns import record_batch
from sidrec_torchrec.data.features import Feature, Features, encode
from sidrec_torchrec.data.format import Events, Users
from sidrec_torchrec.data.ids import IdIndex, shown
from sidrec_torchrec.data.items import ItemRows
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.policy import EventCounts, EventPolicy, item_rows, repeats
from sidrec_torchrec.data.tasks import action_of
from sidrec_torchrec.data.user_lists import Lists, encode_users
from sidrec_torchrec.errors import DataError


@dataclass(frozen=True)
class Histories:
    """N events of U users. Made by ``Histories.read``.

    They stand user by user, those of a user in the order of prepared sequences. Holds 21 bytes an event, 2 a feature of it, and
    24 a user; while it is read, about 45 an event.

    Args:
        users: whose they are.
        first_U1: int64 [U + 1], where each user's events begin; the last is N.
        row_N: int64, rows of the event file.
        item_N: int32, rows of the item file.
        timestamp_N: int64, never decreasing within a user.
        action_N: int8, the labels; see ``data.tasks``. 1 where the log has no labels.
        features_NF: int16, codes; see ``data.features``.
    """

    users: IdIndex
    first_U1: np.ndarray
    row_N: np.ndarray
    item_N: np.ndarray
    timestamp_N: np.ndarray
    action_N: np.ndarray
    features_NF: np.ndarray

    def __len__(self) -> int:
        return len(self.item_N)

    @staticmethod
    def read(
        events: Events, rows: ItemRows, policy: EventPolicy | None = None, features: Features | None = None
    ) -> "Histories":
        """Reads a log once.

        Args:
            events: the log.
            rows: of the item file.
            policy: what to do about events that cannot be read as they are, None to refuse them; all users are kept, of however many events.
            features: whose codes events get; the log must have their columns.

        Raises:
            DataError: on bad events, or what the policy refuses; names file, column and row.
        """
        policy, features = policy or EventPolicy(), features or Features()
        batches = coded_events(events, rows, policy, features)
        return Histories.of(batches, events.num_events, len(features.of_log), policy, events.table)

    @staticmethod
    def of(
        batches: Iterable[pa.RecordBatch], num_events: int, num_features: int, policy: EventPolicy, table: ParquetTable
    ) -> "Histories":
        """All events of some users.

        Args:
            batches: as ``coded_events`` gives them, in the order of the log.
            num_events: in all batches.
            num_features: of the log.
            policy: as ``read`` has it.
            table: the log, to name its rows.

        Raises:
            DataError: if a user's time goes backwards, and is not to be sorted; names the row.
        """
        users = IdIndex()
        user_N, time_N, place_N = (np.empty(num_events, np.int64) for _ in range(3))
        item_N, action_N = np.empty(num_events, np.int32), np.empty(num_events, np.int8)
        features_NF = np.empty((num_events, num_features), np.int16)
        end = 0
        for batch in batches:
            part, end = slice(end, end + len(batch)), end + len(batch)
            columns = [column.to_numpy() for column in batch.columns[1:]]
            user_N[part] = users.add(batch.column(0))
            place_N[part], item_N[part], time_N[part], action_N[part] = columns[:4]
            for f, code_N in enumerate(columns[4:]):
                features_NF[part, f] = code_N
        row_N = np.lexsort((time_N, user_N)) if policy.sort else np.argsort(user_N, kind="stable")
        if policy.unknown_items == "drop":
            row_N = row_N[item_N[row_N] >= 0]
        if policy.drop_duplicates:
            row_N = row_N[~repeats(user_N, time_N, item_N, action_N)[row_N] | (item_N[row_N] < 0)]
        user_N, time_N = user_N[row_N], time_N[row_N]
        back = np.flatnonzero((time_N[1:] < time_N[:-1]) & (user_N[1:] == user_N[:-1]))
        if len(back):
            place = back[0] + 1
            raise DataError(
                f"{table.at('timestamp', place_N[row_N[place]])}: goes backwards for user_id {shown(users.ids, user_N[place])}, "
                f"{time_N[place]} after {time_N[place - 1]}; sort each user's events by time"
            )
        first_U1 = np.searchsorted(user_N, np.arange(len(users) + 1))
        return Histories(users, first_U1, place_N[row_N], item_N[row_N], time_N, action_N[row_N], features_NF[row_N])

    def before(self, user_ids: pa.Array, timestamps_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A user's events strictly before a time: from where to where, int64 [R] each; equal where there are none.

        Raises:
            TypeError: if users' ids are numbers here and text there.
        """
        user_R = self.users.find(user_ids)
        begin_R = np.where(user_R >= 0, self.first_U1[user_R], 0)
        low_R, high_R = begin_R, np.where(user_R >= 0, self.first_U1[user_R + 1], 0)
        while (open_R := low_R < high_R).any():  # all requests' binary searches at once
            middle_R = (low_R + high_R) // 2
            is_before_R = open_R & (self.timestamp_N[np.where(open_R, middle_R, 0)] < timestamps_R)
            low_R = np.where(is_before_R, middle_R + 1, low_R)
            high_R = np.where(open_R & ~is_before_R, middle_R, high_R)
        return begin_R, low_R

    def newest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each user's last ``count`` events those that have an item, in the order of the file.

        Returns:
            Where the user's events begin, and where the event stands, int64 [M] each: what is between came before it.
        """
        counts_U = np.diff(self.first_U1)
        begin_N = np.repeat(self.first_U1[:-1], counts_U)
        place_M = np.flatnonzero(np.arange(len(self)) >= np.repeat(self.first_U1[1:] - count, counts_U))
        place_M = place_M[self.item_N[place_M] >= 0]
        place_M = place_M[np.argsort(self.row_N[place_M])]
        return begin_N[place_M], place_M


def event_schema(user_ids: pa.DataType, num_features: int) -> pa.Schema:
    """Of what ``coded_events`` gives: users' ids of that type, row of the log, row of the item file, time, labels and features."""
    columns = [("user_id", user_ids), ("row", pa.int64()), ("item", pa.int32()), ("timestamp", pa.int64())]
    return pa.schema([*columns, ("action", pa.int8()), *((f"feature_{f}", pa.int16()) for f in range(num_features))])


def coded_events(
    events: Events, rows: ItemRows, policy: EventPolicy, features: Features, share: tuple[int, int] = (0, 1)
) -> Iterator[pa.RecordBatch]:
    """A log as ``Histories.of`` takes it, batch by batch; see there for what the arguments are.

    Args:
        share: which share of the file to read, and of how many.

    Raises:
        DataError: on bad events, or an unknown item that is to be refused; names file, column and row.
    """
    schema, counts = event_schema(events.user_id_type, len(features.of_log)), EventCounts()
    for batch in events.batches(to_learn=False, share=share):
        row_N = np.arange(batch.first_row, batch.first_row + len(batch))
        item_N = item_rows(rows, batch.item_ids, events.table, batch.first_row, policy, counts)
        action_N = action_of(batch.labels) if events.tasks else np.ones(len(batch), np.int8)
        codes_NF = encode(features.of_log, batch.features, len(batch), events.table)
        columns = [batch.user_ids, row_N, item_N, batch.timestamps, action_N, *np.ascontiguousarray(codes_NF.T)]
        yield record_batch(columns, schema)


@dataclass(frozen=True)
class UserCodes:
    """Features of U users, in memory: 8 bytes a user, 4 a feature, and 8 a list with 2 for each of its values. Made by ``UserCodes.read``.

    Args:
        users: whose they are.
        codes_UF: int32 [U + 1, F], of the features that are no lists; the last row is that of anybody else.
        lists: of each feature that is one, likewise U + 1.
    """

    users: IdIndex
    codes_UF: np.ndarray
    lists: tuple[Lists, ...] = ()

    @staticmethod
    def read(users: Users | None, values: Mapping[str, Any]) -> "UserCodes":
        """Reads a user file once; a value that is not among ``values`` counts as missing.

        Args:
            users: the file; None only without features.
            values: by feature, what its codes stand for; see ``Prepared.user_values``.

        Raises:
            DataError: if a feature's column is missing or of another type; names file and column.
        """
        features = [Feature.of_codes(name, value) for name, value in values.items()]
        num_users = 0 if users is None else users.num_users
        codes_UF = np.zeros((num_users + 1, sum(not feature.is_list for feature in features)), np.int32)
        parts: list[list[Lists]] = []
        if users is None or not num_users:
            return UserCodes(IdIndex(), codes_UF, tuple(Lists.empty(1) for feature in features if feature.is_list))
        for name in values:
            users.table.type_of(name, what="user feature")
        for batch in users.batches(columns=tuple(values)):
            try:
                codes, lists = encode_users(features, batch.columns)
            except DataError as error:
                raise DataError(f"{users.path}: {error}; keep the type it was trained with") from None
            for f, code_R in enumerate(codes):
                codes_UF[batch.first_row : batch.first_row + len(batch), f] = code_R
            parts.append(lists)
        joined = (Lists.joined([*own, Lists.empty(1)]) for own in zip(*parts, strict=True))
        return UserCodes(IdIndex(users.ids()), codes_UF, tuple(joined))

    def of(self, user_ids: pa.Array) -> tuple[np.ndarray, tuple[Lists, ...]]:
        """Codes of users, int32 [R, F], 0 where a user or a value is missing or unknown; and their lists, R of each feature."""
        row_R = self.users.find(user_ids)  # -1 is the last row
        return self.codes_UF[row_R], tuple(own.take(row_R) for own in self.lists)
