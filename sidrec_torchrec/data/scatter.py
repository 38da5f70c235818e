"""A log and its users cut into buckets on disk by a hash of the user; share by share, in bounded memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.buckets import EventBuckets
from sidrec_torchrec.data.columns import record_batch
from sidrec_torchrec.data.features import Draft, Feature
from sidrec_torchrec.data.format import Events, Items, Users
from sidrec_torchrec.data.ids import keys
from sidrec_torchrec.data.items import ItemRows
from sidrec_torchrec.data.policy import EventCounts, EventPolicy, item_rows
from sidrec_torchrec.data.target_counts import TargetCounts
from sidrec_torchrec.data.tasks import action_of
from sidrec_torchrec.data.user_lists import encode_users
from sidrec_torchrec.engines.base import Engine
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import read_object, sync_to_disk, write_json

EVENTS_PER_BUCKET = 1 << 22  # at most: about 100 MB in memory
_LEAST_PER_BUCKET, _BUCKETS = 1 << 18, 8  # smaller logs are cut too, so that several processes can work on them
_EVENTS_PER_SHARE = 1 << 21


def scatter(
    folder: Path,
    events: Events,
    items: Items,
    users: Users | None,
    user_features: Sequence[Feature],
    policy: EventPolicy,
    drafts: Sequence[Draft],
    engine: Engine,
    *,
    to_learn: bool = True,
) -> tuple[EventBuckets, EventCounts]:
    """Cuts a log into files under ``folder``; gives the buckets, and how many events were on unknown items.

    Args:
        folder: for the buckets; shares that an earlier call has cut into it, of the same log, are not cut again.
        events: the log.
        items: the item file.
        users: the user file, if any; a user who is not in it has missing features.
        user_features: whose codes users get; lists come last.
        policy: what to do about events that cannot be read as they are.
        drafts: of the features of events.
        engine: that cuts the shares.
        to_learn: whether both labels of each task must occur.

    Raises:
        DataError: on bad events; names file, column and row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    per_bucket = min(max(events.num_events // _BUCKETS, _LEAST_PER_BUCKET), EVENTS_PER_BUCKET)
    buckets = EventBuckets(
        path=events.path,
        folder=folder,
        count=-(-events.num_events // per_bucket),
        shares=max(1, min(events.num_events // _EVENTS_PER_SHARE, events.table.num_row_groups)),
        tasks=events.tasks,
        regressions=events.regressions,
        id_type=events.user_id_type,
        num_features=sum(not feature.is_list for feature in user_features),
        num_lists=sum(feature.is_list for feature in user_features),
        num_raw=len(drafts),
        is_weighted=bool(events.weight),
        policy=policy,
    )
    counts, targets = EventCounts(), TargetCounts.of(events.tasks, events.regressions)
    for _ in engine.map(_Share(EventCoder(buckets, items, tuple(drafts)), events), range(buckets.shares)):
        pass
    for share in range(buckets.shares):
        known = read_object(buckets.known_file(share))
        counts.unknown_items += known["unknown_items"]
        targets.merge(TargetCounts.from_json(events.regressions, known["targets"]))
    if to_learn:
        targets.check(events.path, events.tasks, events.num_events)
    _scatter_users(buckets, users, user_features, events)
    return buckets, counts


@dataclass(frozen=True)
class EventCoder:
    """Makes events what ``EventBuckets.users_of`` takes: items by their row, labels as an action. Can be pickled.

    Args:
        buckets: says what is made.
        items: the item file.
        drafts: of the features of events.
    """

    buckets: EventBuckets
    items: Items
    drafts: tuple[Draft, ...] = ()

    def __call__(
        self,
        events: Events,
        *,
        share: tuple[int, int] = (0, 1),
        counts: EventCounts | None = None,
        targets: TargetCounts | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Batches of ``EventBuckets.event_schema``, in the order of the log; without events that the policy drops.

        Args:
            events: the log, or some of it.
            share: which share of it to read, and of how many.
            counts: counts what the policy meets.
            targets: counts what there is to learn.

        Raises:
            DataError: on bad events; names file, column and row.
        """
        policy, schema = self.buckets.policy, self.buckets.event_schema
        counts = EventCounts() if counts is None else counts
        targets = TargetCounts.of(events.tasks, events.regressions) if targets is None else targets
        for batch in events.batches(share=share, met=targets):
            item_N = item_rows(self._rows, batch.item_ids, events.table, batch.first_row, policy, counts)
            action_N = action_of(batch.labels) if events.tasks else np.ones(len(batch), np.int8)
            raw = [draft.raw(batch.features[draft.named.column]) for draft in self.drafts]
            raw += [*batch.values.T, *([] if batch.weights is None else [batch.weights])]
            columns = [batch.user_ids, item_N, batch.timestamps, action_N, *raw]
            coded = record_batch(columns, schema)
            yield coded.filter(pa.array(item_N >= 0)) if policy.unknown_items == "drop" else coded

    @cached_property
    def _rows(self) -> ItemRows:
        return ItemRows(self.items)


@dataclass(frozen=True)
class _Share:
    """Cuts one share of the log, if that has not been done."""

    coder: EventCoder
    events: Events

    def __call__(self, share: int) -> None:
        buckets, events = self.coder.buckets, self.events
        files = [buckets.event_file(bucket, share) for bucket in range(buckets.count)]
        if self._is_cut(share, files):
            return
        counts, targets = EventCounts(), TargetCounts.of(events.tasks, events.regressions)
        with ExitStack() as stack:
            writers = [stack.enter_context(pa.ipc.new_file(file, buckets.event_schema)) for file in files]
            for batch in self.coder(events, share=(share, buckets.shares), counts=counts, targets=targets):
                write_by_user(writers, batch)
        for file in files:
            sync_to_disk(file)
        known = {"unknown_items": counts.unknown_items, "targets": targets.to_json(), "bytes": _sizes(files)}
        write_json(buckets.known_file(share), known, sealed=True)

    def _is_cut(self, share: int, files: Sequence[Path]) -> bool:
        """Whether all that the share has for the buckets is there."""
        path = self.coder.buckets.known_file(share)
        return path.exists() and read_object(path)["bytes"] == _sizes(files)


def _sizes(files: Sequence[Path]) -> list[int | None]:
    return [file.stat().st_size if file.is_file() else None for file in files]


def _scatter_users(
    buckets: EventBuckets, users: Users | None, user_features: Sequence[Feature], events: Events
) -> None:
    with ExitStack() as stack:
        files = [buckets.user_file(bucket) for bucket in range(buckets.count)]
        writers = [stack.enter_context(pa.ipc.new_file(file, buckets.user_schema)) for file in files]
        if users is None:
            return
        for batch in users.batches(columns=[feature.name for feature in user_features]):
            codes, lists = encode_users(user_features, batch.columns)
            user_ids = _of_type(batch.user_ids, users, events)
            columns = [user_ids, *map(pa.array, codes), *(own.to_arrow() for own in lists)]
            arrays = [column.cast(field.type) for column, field in zip(columns, buckets.user_schema, strict=True)]
            write_by_user(writers, pa.RecordBatch.from_arrays(arrays, schema=buckets.user_schema))


def _of_type(user_ids: pa.Array, users: Users, events: Events) -> pa.Array:
    """Ids of users in the type that the log has them in."""
    if pa.types.is_integer(user_ids.type) == pa.types.is_integer(events.user_id_type):
        with suppress(pa.ArrowInvalid):  # a number beyond the other type
            return user_ids.cast(events.user_id_type)
    raise DataError(
        f"{users.path}: column 'user_id' holds {user_ids.type}, in {events.path} it holds "
        f"{events.user_id_type}; write both with one type"
    )


def write_by_user(writers: list, rows: pa.RecordBatch) -> None:
    """Appends each row to the writer of its user's bucket, in order; the first column is users' ids."""
    bucket_N = bucket_of(rows.column(0), len(writers))
    for bucket, writer in enumerate(writers):
        chosen = np.flatnonzero(bucket_N == bucket)
        if len(chosen):
            writer.write_batch(rows.take(pa.array(chosen)))


def bucket_of(user_ids: pa.Array, count: int) -> np.ndarray:
    """Which of so many buckets each user belongs to, int64 [N]; ids are canonical."""
    # Fibonacci hashing: consecutive user ids spread over all buckets.
    hashed_N = (keys(user_ids).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    return (hashed_N % np.uint64(count)).astype(np.int64)
