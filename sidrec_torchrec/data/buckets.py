"""Events grouped by user in bounded memory: cut into buckets on disk by a hash of the user, then read bucket by bucket."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.features import Draft, Feature
from sidrec_torchrec.data.format import Events, Items, Users
from sidrec_torchrec.data.ids import IdIndex, canonical, keys
from sidrec_torchrec.data.items import ItemRows
from sidrec_torchrec.data.policy import EventCounts, EventPolicy, goes_back, item_rows, repeats
from sidrec_torchrec.data.tasks import RegressionName, action_of
from sidrec_torchrec.data.user_lists import Lists, encode_users
from sidrec_torchrec.errors import DataError

EVENTS_PER_BUCKET = 1 << 22  # about 100 MB in memory
_WEIGHT = "weight"
_FEATURE, _VALUE = "raw_", "value_"
_EVENT_COLUMNS = {"item": pa.int32(), "timestamp": pa.int64(), "action": pa.int8()}


@dataclass(frozen=True)
class UserEvents:
    """All events of one user, in order; N events.

    Args:
        user_id: whose.
        codes: int32 [F], code of each user feature; 0 where missing, else 1 + the class in its vocabulary.
        lists: codes of each user feature that is a list, int16; see ``data.user_lists``.
        item: int32 [N], rows of the item file; ``NO_ITEM`` of an event whose item it does not have.
        timestamp: int64 [N], seconds, never decreasing.
        action: int8 [N], the labels; see ``data.tasks``. 1 where the log has no labels.
        features: float64 [N, F], not coded yet; see ``Draft.raw``.
        weight: float64 [N], how much each counts; None where all count alike.
        values: float64 [N, R], of tasks of regression; NaN where missing.
    """

    user_id: int | str | bytes
    codes: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    action: np.ndarray
    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    weight: np.ndarray | None = None
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    lists: tuple[np.ndarray, ...] = ()

    def take(self, places: np.ndarray) -> "UserEvents":
        """The events at these places."""
        names = [*_EVENT_COLUMNS, "features", "values", *(["weight"] if self.weight is not None else [])]
        return replace(self, **{name: getattr(self, name)[places] for name in names})


class EventBuckets:
    """A log cut by user. Made by ``EventBuckets.write``.

    Args:
        path: of the log that the buckets were cut from.
        tasks: its label columns; none if it has no labels.
        regressions: numbers to be predicted.
        id_type: canonical type of its users' ids.
        files: bucket files of events, and of users where there are any.
        num_features: user features F that are no lists.
        num_raw: features of events.
        is_weighted: whether events have weights.
        policy: what was, and is, done about events that cannot be read as they are.
        unknown_items: events on items that the item file does not have.
    """

    def __init__(
        self,
        path: Path,
        tasks: tuple[str, ...],
        regressions: tuple[RegressionName, ...],
        id_type: pa.DataType,
        files: list[tuple[Path, Path]],
        num_features: int,
        num_raw: int,
        is_weighted: bool,
        policy: EventPolicy,
        unknown_items: int,
    ) -> None:
        self.path = path
        self.tasks = tasks
        self.regressions = regressions
        self.id_type = id_type
        self.policy = policy
        self.counts = EventCounts(unknown_items)
        self._files = files
        self._num_features = num_features
        self._columns = {
            "features": _numbered_names(_FEATURE, num_raw),
            "values": _numbered_names(_VALUE, len(regressions)),
        }
        self._weight = [_WEIGHT] * is_weighted

    @staticmethod
    def write(
        folder: Path,
        events: Events,
        items: Items,
        users: Users | None,
        user_features: Sequence[Feature],
        policy: EventPolicy,
        drafts: Sequence[Draft] = (),
        *,
        to_learn: bool = True,
    ) -> "EventBuckets":
        """Cuts ``events`` into files under ``folder``.

        Args:
            folder: new folder for the buckets.
            events: the log.
            items: the item file.
            users: the user file, if any; a user who is not in it has missing features.
            user_features: whose codes users get.
            policy: what to do about events that cannot be read as they are.
            drafts: of the features of events.
            to_learn: whether both labels of each task must occur.

        Raises:
            DataError: on bad events; names file, column and row.
        """
        folder.mkdir(parents=True)
        num_buckets = -(-events.num_events // EVENTS_PER_BUCKET)
        files = [(folder / f"events-{i}.arrow", folder / f"users-{i}.arrow") for i in range(num_buckets)]
        id_type = events.user_id_type
        weight = [_WEIGHT] if events.weight else []
        values = _numbered_names(_VALUE, len(events.regressions))
        raw_columns = [(name, pa.float64()) for name in (*_numbered_names(_FEATURE, len(drafts)), *values, *weight)]
        event_schema = pa.schema([("user_id", id_type), *_EVENT_COLUMNS.items(), *raw_columns])
        kinds = [(f.name, pa.list_(pa.int16()) if f.is_list else pa.int32()) for f in user_features]
        user_schema = pa.schema([("user_id", id_type), *kinds])
        counts = EventCounts()
        with ExitStack() as stack:
            event_writers = [stack.enter_context(pa.ipc.new_file(path, event_schema)) for path, _ in files]
            user_writers = [stack.enter_context(pa.ipc.new_file(path, user_schema)) for _, path in files]
            rows = ItemRows(items)
            for batch in events.batches(to_learn=to_learn):
                item_N = item_rows(rows, batch.item_ids, events.table, batch.first_row, policy, counts)
                action_N = action_of(batch.labels) if events.tasks else np.ones(len(batch), np.int8)
                raw = [draft.raw(batch.features[draft.named.column]) for draft in drafts]
                raw += [*batch.values.T, *([] if batch.weights is None else [batch.weights])]
                columns = [batch.user_ids, item_N, batch.timestamps, action_N, *raw]
                kept = np.flatnonzero(item_N >= 0) if policy.unknown_items == "drop" else None
                _scatter(event_writers, event_schema, columns, kept)
            for user_batch in (
                users.batches(columns=[feature.name for feature in user_features]) if users is not None else ()
            ):
                codes, lists = encode_users(user_features, user_batch.columns)
                user_ids = _of_type(user_batch.user_ids, users, events)
                _scatter(user_writers, user_schema, [user_ids, *codes, *(own.to_arrow() for own in lists)])
        sizes = sum(not feature.is_list for feature in user_features), len(drafts), bool(weight)
        unknown = counts.unknown_items
        return EventBuckets(events.path, events.tasks, events.regressions, id_type, files, *sizes, policy, unknown)

    @property
    def is_labeled(self) -> bool:
        """Whether the log says what is to be predicted; else negatives are to be sampled."""
        return bool(self.tasks or self.regressions)

    def users(self) -> Iterator[UserEvents]:
        """Each user with all their events in order of time, ties as the log has them; bucket by bucket, there by user_id.

        ``counts`` is of the last pass.

        Raises:
            DataError: if a user's timestamps go backwards, and are not to be sorted.
        """
        self.counts = EventCounts(self.counts.unknown_items)
        for event_file, user_file in self._files:
            table, users = _read(event_file), _read(user_file)
            user_ids, user_N = _numbered(table.column("user_id"))
            columns = {name: table.column(name).to_numpy() for name in _EVENT_COLUMNS}
            columns |= {name: table.column(name).to_numpy() for name in self._weight}
            for name, places in self._columns.items():
                raw = [table.column(place).to_numpy() for place in places]
                columns[name] = np.stack(raw, axis=1) if raw else np.zeros((len(table), 0))
            of_codes, of_lists = users.columns[1:][: self._num_features], users.columns[1:][self._num_features :]
            codes_UF = np.stack([c.to_numpy() for c in of_codes] or [np.zeros(len(users), np.int32)], axis=1)
            lists = [Lists.of_arrow(column) for column in of_lists]
            code_row_U = (
                IdIndex(canonical(users.column("user_id"))).find(user_ids)
                if len(users) and len(users.columns) > 1
                else None
            )
            no_codes, no_list = np.zeros(self._num_features, np.int32), np.zeros(0, np.int16)
            order = np.argsort(user_N, kind="stable")
            columns = {name: column[order] for name, column in columns.items()}  # a user's events are then a slice
            ends = np.searchsorted(user_N[order], np.arange(len(user_ids)), side="right").tolist()
            for number, (user_id, begin, end) in enumerate(zip(user_ids.to_pylist(), [0, *ends], ends, strict=False)):
                row = -1 if code_row_U is None else code_row_U[number]
                user = UserEvents(
                    user_id=user_id,
                    codes=no_codes if row < 0 else codes_UF[row, : self._num_features],
                    lists=tuple(no_list if row < 0 else own[row] for own in lists),
                    **{name: column[begin:end] for name, column in columns.items()},
                )
                user = self._mended(user)
                if len(user.item) >= self.policy.min_events:
                    yield user
                else:
                    self.counts.short_users += 1

    def _mended(self, user: UserEvents) -> UserEvents:
        """The user's events as the policy wants them."""
        step_N = user.timestamp[1:] - user.timestamp[:-1]
        least = step_N.min(initial=1)
        if least < 0:
            back = np.flatnonzero(step_N < 0)
            if not self.policy.sort:
                before, after = user.timestamp[back[0]], user.timestamp[back[0] + 1]
                where = f"{self.path}: column 'timestamp', event {back[0] + 1} of the user"
                raise goes_back(where, repr(user.user_id), before, after)
            self.counts.unsorted += len(back)
            user = user.take(np.argsort(user.timestamp, kind="stable"))
        if least <= 0:  # there may be ties
            # two items that are not known are not known to be one
            is_repeat_N = repeats(user.timestamp, user.item, user.action) & (user.item >= 0)
            self.counts.duplicates += int(is_repeat_N.sum())
            if self.policy.drop_duplicates:
                user = user.take(np.flatnonzero(~is_repeat_N))
        return user


def _numbered_names(kind: str, count: int) -> list[str]:
    return [f"{kind}{number}" for number in range(count)]


def _of_type(user_ids: pa.Array, users: Users | None, events: Events) -> pa.Array:
    """Ids of users in the type that the log has them in."""
    if pa.types.is_integer(user_ids.type) == pa.types.is_integer(events.user_id_type):
        with suppress(pa.ArrowInvalid):  # a number beyond the other type
            return user_ids.cast(events.user_id_type)
    raise DataError(
        f"{users.path if users else ''}: column 'user_id' holds {user_ids.type}, in {events.path} it holds "
        f"{events.user_id_type}; write both with one type"
    )


def _scatter(writers: list, schema: pa.Schema, columns: list, kept: np.ndarray | None = None) -> None:
    """Appends each row, or those of ``kept``, to the writer of its user's bucket, in order; users come first."""
    # Fibonacci hashing: consecutive user ids spread over all buckets.
    hashed_N = (keys(columns[0]).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)
    bucket_N = (hashed_N % np.uint64(len(writers))).astype(np.int64)
    if kept is not None:
        dropped_N = np.ones(len(bucket_N), bool)
        dropped_N[kept] = False
        bucket_N[dropped_N] = -1
    arrays = [
        pa.array(c, field.type) if isinstance(c, np.ndarray) else c for c, field in zip(columns, schema, strict=True)
    ]
    rows = pa.RecordBatch.from_arrays(arrays, schema=schema)
    for bucket, writer in enumerate(writers):
        chosen = np.flatnonzero(bucket_N == bucket)
        if len(chosen):
            writer.write_batch(rows.take(pa.array(chosen)))


def _numbered(user_ids: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """The distinct ids in their order, and the number of each row's among them, int64 [N]."""
    codes = canonical(user_ids).dictionary_encode()
    order = pc.sort_indices(codes.dictionary).to_numpy()
    number_D = np.empty(len(order), np.int64)
    number_D[order] = np.arange(len(order))
    return codes.dictionary.take(pa.array(order)), number_D[codes.indices.to_numpy()]


def _read(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
