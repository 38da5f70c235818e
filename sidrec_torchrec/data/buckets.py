"""A log cut by user: buckets on disk by a hash of the user, read one by one. ``data/scatter.py`` cuts it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.ids import IdIndex, canonical
from sidrec_torchrec.data.policy import EventCounts, EventPolicy, goes_back, repeats
from sidrec_torchrec.data.tasks import RegressionName
from sidrec_torchrec.data.user_lists import Lists

EVENT_COLUMNS = {"item": pa.int32(), "timestamp": pa.int64(), "action": pa.int8()}
_WEIGHT, _FEATURE, _VALUE = "weight", "raw_", "value_"


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
        names = [*EVENT_COLUMNS, "features", "values", *(["weight"] if self.weight is not None else [])]
        return replace(self, **{name: getattr(self, name)[places] for name in names})


@dataclass(frozen=True)
class EventBuckets:
    """A log cut by user. Made by ``data.scatter.scatter``; can be pickled, for processes that read its folder.

    Args:
        path: of the log that the buckets were cut from.
        folder: of the buckets.
        count: how many there are.
        shares: pieces of each, in the order of the log.
        tasks: the log's label columns; none if it has no labels.
        regressions: numbers to be predicted.
        id_type: canonical type of its users' ids.
        num_features: user features F that are no lists.
        num_lists: those that are.
        num_raw: features of events.
        is_weighted: whether events have weights.
        policy: what was, and is, done about events that cannot be read as they are.
    """

    path: Path
    folder: Path
    count: int
    shares: int
    tasks: tuple[str, ...]
    regressions: tuple[RegressionName, ...]
    id_type: pa.DataType
    num_features: int
    num_lists: int
    num_raw: int
    is_weighted: bool
    policy: EventPolicy

    @property
    def is_labeled(self) -> bool:
        """Whether the log says what is to be predicted; else negatives are to be sampled."""
        return bool(self.tasks or self.regressions)

    @cached_property
    def event_schema(self) -> pa.Schema:
        """Of the events of a bucket."""
        weight = [_WEIGHT] * self.is_weighted
        raw = [*_numbered_names(_FEATURE, self.num_raw), *_numbered_names(_VALUE, len(self.regressions)), *weight]
        return pa.schema([("user_id", self.id_type), *EVENT_COLUMNS.items(), *((name, pa.float64()) for name in raw)])

    @cached_property
    def user_schema(self) -> pa.Schema:
        """Of its users, where there are any."""
        kinds = [pa.int32()] * self.num_features + [pa.list_(pa.int16())] * self.num_lists
        return pa.schema([("user_id", self.id_type), *((f"feature_{f}", kind) for f, kind in enumerate(kinds))])

    def event_file(self, bucket: int, share: int) -> Path:
        """What a share of the log has for a bucket."""
        return self.folder / f"events-{bucket}-{share}.arrow"

    def known_file(self, share: int) -> Path:
        """What is known of a share's events; it is there when all the share has for the buckets is."""
        return self.folder / f"share-{share}.json"

    def user_file(self, bucket: int) -> Path:
        """The users of a bucket."""
        return self.folder / f"users-{bucket}.arrow"

    def users(self, bucket: int, counts: EventCounts | None = None) -> Iterator[UserEvents]:
        """Each user of a bucket with all their events in order of time, ties as the log has them; by user_id.

        Args:
            bucket: which.
            counts: counts what the policy meets.

        Raises:
            DataError: if a user's timestamps go backwards, and are not to be sorted.
        """
        table = pa.concat_tables([_read(self.event_file(bucket, share)) for share in range(self.shares)])
        yield from self.users_of(table, _read(self.user_file(bucket)), counts)

    def users_of(self, events: pa.Table, users: pa.Table, counts: EventCounts | None = None) -> Iterator[UserEvents]:
        """As ``users``, of tables of ``event_schema`` and ``user_schema``, wherever they come from."""
        if not len(events):
            return
        counts = EventCounts() if counts is None else counts
        user_ids, user_N = _numbered(events.column("user_id"))
        order = np.argsort(user_N, kind="stable")
        columns = {name: column[order] for name, column in self._columns(events).items()}  # a user's events are a slice
        row_U = IdIndex(canonical(users.column("user_id"))).find(user_ids) if len(users) else np.full(len(user_ids), -1)
        of_codes, of_lists = users.columns[1:][: self.num_features], users.columns[1:][self.num_features :]
        codes_UF = np.stack([c.to_numpy() for c in of_codes] or [np.zeros(len(users), np.int32)], axis=1)
        lists = [Lists.of_arrow(column) for column in of_lists]
        no_codes, no_list = np.zeros(self.num_features, np.int32), np.zeros(0, np.int16)
        ends = np.searchsorted(user_N[order], np.arange(len(user_ids)), side="right").tolist()
        slices = zip(user_ids.to_pylist(), row_U.tolist(), [0, *ends], ends, strict=False)
        for user_id, row, begin, end in slices:
            user = UserEvents(
                user_id=user_id,
                codes=no_codes if row < 0 else codes_UF[row, : self.num_features],
                lists=tuple(no_list if row < 0 else own[row] for own in lists),
                **{name: column[begin:end] for name, column in columns.items()},
            )
            user = self._mended(user, counts)
            if len(user.item) >= self.policy.min_events:
                yield user
            else:
                counts.short_users += 1

    def _columns(self, events: pa.Table) -> dict[str, np.ndarray]:
        columns = {name: events.column(name).to_numpy() for name in EVENT_COLUMNS}
        if self.is_weighted:
            columns["weight"] = events.column(_WEIGHT).to_numpy()
        for name, kind, count in (("features", _FEATURE, self.num_raw), ("values", _VALUE, len(self.regressions))):
            raw = [events.column(place).to_numpy() for place in _numbered_names(kind, count)]
            columns[name] = np.stack(raw, axis=1) if raw else np.zeros((len(events), 0))
        return columns

    def _mended(self, user: UserEvents, counts: EventCounts) -> UserEvents:
        """The user's events as the policy wants them."""
        step_N = user.timestamp[1:] - user.timestamp[:-1]
        least = step_N.min(initial=1)
        if least < 0:
            back = np.flatnonzero(step_N < 0)
            if not self.policy.sort:
                before, after = user.timestamp[back[0]], user.timestamp[back[0] + 1]
                where = f"{self.path}: column 'timestamp', event {back[0] + 1} of the user"
                raise goes_back(where, repr(user.user_id), before, after)
            counts.unsorted += len(back)
            user = user.take(np.argsort(user.timestamp, kind="stable"))
        if least <= 0:  # there may be ties
            # two items that are not known are not known to be one
            is_repeat_N = repeats(user.timestamp, user.item, user.action) & (user.item >= 0)
            counts.duplicates += int(is_repeat_N.sum())
            if self.policy.drop_duplicates:
                user = user.take(np.flatnonzero(~is_repeat_N))
        return user


def _numbered_names(kind: str, count: int) -> list[str]:
    return [f"{kind}{number}" for number in range(count)]


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
