"""Events grouped by user in bounded memory: cut into buckets on disk by a hash of the user, then read bucket by bucket."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.format import Events, Items, Users, Vocabulary
from sidrec_torchrec.data.items import ItemRows
from sidrec_torchrec.data.tasks import action_of
from sidrec_torchrec.errors import DataError

EVENTS_PER_BUCKET = 1 << 22  # about 100 MB in memory
_EVENT_SCHEMA = pa.schema(
    [("user_id", pa.int64()), ("item", pa.int32()), ("timestamp", pa.int64()), ("action", pa.int8())]
)


@dataclass(frozen=True)
class UserEvents:
    """All events of one user, in order; N events.

    Args:
        user_id: whose.
        codes: int32 [F], code of each user feature; 0 where missing, else 1 + the class in its vocabulary.
        item: int32 [N], rows of the item file.
        timestamp: int64 [N], never decreasing.
        action: int8 [N], the labels; see ``data.tasks``. 1 where the log has no labels.
    """

    user_id: int
    codes: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    action: np.ndarray


class EventBuckets:
    """A log cut by user. Made by ``EventBuckets.write``.

    Args:
        path: the event file the buckets were cut from.
        tasks: its label columns; none if it has no labels.
        files: bucket files of events, and of users where there are any.
        num_features: user features F.
    """

    def __init__(self, path: Path, tasks: tuple[str, ...], files: list[tuple[Path, Path]], num_features: int) -> None:
        self.path = path
        self.tasks = tasks
        self._files = files
        self._num_features = num_features

    @staticmethod
    def write(
        folder: Path, events: Events, items: Items, users: Users | None, vocabularies: dict[str, Vocabulary]
    ) -> "EventBuckets":
        """Cuts ``events`` into files under ``folder``.

        Args:
            folder: new folder for the buckets.
            events: the log.
            items: the item file; every event's item must be in it.
            users: the user file, if any; a user who is not in it has missing features.
            vocabularies: of the user features, by column.

        Raises:
            DataError: on bad events, or an event of an unknown item; names file, column and row.
        """
        folder.mkdir(parents=True)
        num_buckets = -(-events.num_events // EVENTS_PER_BUCKET)
        files = [(folder / f"events-{i}.arrow", folder / f"users-{i}.arrow") for i in range(num_buckets)]
        user_schema = pa.schema([("user_id", pa.int64()), *((name, pa.int32()) for name in vocabularies)])
        with ExitStack() as stack:
            event_writers = [stack.enter_context(pa.ipc.new_file(path, _EVENT_SCHEMA)) for path, _ in files]
            user_writers = [stack.enter_context(pa.ipc.new_file(path, user_schema)) for _, path in files]
            rows = ItemRows(items)
            for batch in events.batches():
                item_N = rows.find(batch.item_ids, events.path, batch.first_row)
                action_N = action_of(batch.labels) if events.tasks else np.ones(len(batch), np.int8)
                columns = [batch.user_ids, item_N, batch.timestamps, action_N]
                _scatter(event_writers, _EVENT_SCHEMA, batch.user_ids, columns)
            for user_batch in users.batches(columns=tuple(vocabularies)) if users is not None else ():
                codes = [v.encode(user_batch.columns[name])[0] + 1 for name, v in vocabularies.items()]
                _scatter(user_writers, user_schema, user_batch.user_ids, [user_batch.user_ids, *codes])
        return EventBuckets(events.path, events.tasks, files, len(vocabularies))

    def users(self) -> Iterator[UserEvents]:
        """Each user with all their events in file order, bucket by bucket; within a bucket by user_id.

        Raises:
            DataError: if a user's timestamps go backwards.
        """
        for event_file, user_file in self._files:
            user_N, item_N, time_N, action_N = _read(event_file)
            user_ids_U, *codes = _read(user_file)
            codes_UF = np.stack(codes, axis=1) if codes else np.zeros((len(user_ids_U), 0), np.int32)
            code_rows = {int(user): row for row, user in enumerate(user_ids_U)}
            no_codes = np.zeros(self._num_features, np.int32)
            order = np.argsort(user_N, kind="stable")
            starts = np.flatnonzero(np.diff(user_N[order], prepend=user_N[order[:1]] - 1))
            for events in np.split(order, starts[1:]) if len(order) else ():
                user_id = int(user_N[events[0]])
                row = code_rows.get(user_id)
                user = UserEvents(
                    user_id=user_id,
                    codes=no_codes if row is None else codes_UF[row],
                    item=item_N[events],
                    timestamp=time_N[events],
                    action=action_N[events],
                )
                self._check_order(user)
                yield user

    def _check_order(self, user: UserEvents) -> None:
        back = np.flatnonzero(np.diff(user.timestamp) < 0)
        if len(back):
            before, after = user.timestamp[back[0]], user.timestamp[back[0] + 1]
            raise DataError(
                f"{self.path}: column 'timestamp' goes backwards for user_id {user.user_id}: {after} after {before}, "
                f"at the user's event {back[0] + 1}; sort each user's events by time"
            )


def _scatter(writers: list, schema: pa.Schema, user_ids_N: np.ndarray, columns: list[np.ndarray]) -> None:
    """Appends each row to the writer of its user's bucket, in order."""
    # Fibonacci hashing: consecutive user ids spread over all buckets.
    hashed_N = (user_ids_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    bucket_N = (hashed_N % np.uint64(len(writers))).astype(np.int64)
    for bucket, writer in enumerate(writers):
        chosen = np.flatnonzero(bucket_N == bucket)
        if len(chosen):
            arrays = [pa.array(c[chosen], field.type) for c, field in zip(columns, schema, strict=True)]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))


def _read(path: Path) -> list[np.ndarray]:
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all()
        return [column.to_numpy() for column in table.columns]
