"""Every check on a data folder in one streaming pass over each file; all that is wrong is said at once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.columns import is_multi_label
from sidrec_torchrec.data.events import EventBatch, Events, Users, open_events, open_users, timestamps
from sidrec_torchrec.data.features import Draft, FeatureName
from sidrec_torchrec.data.folder import DataFolder
from sidrec_torchrec.data.ids import IdIndex, shown
from sidrec_torchrec.data.items import ItemRows, Items, open_items
from sidrec_torchrec.data.policy import EventCounts, EventPolicy, goes_back
from sidrec_torchrec.data.regression import Moments
from sidrec_torchrec.data.tasks import RegressionName
from sidrec_torchrec.data.unread import Unread, unread_events, unread_items, unread_users
from sidrec_torchrec.data.vocabulary import UnfitColumn, Vocabulary
from sidrec_torchrec.errors import DataError


def validate(
    data: str | Path | DataFolder, tasks: tuple[str, ...] = (), policy: EventPolicy | None = None
) -> dict[str, Any]:
    """Reads all files of a data folder and checks everything that can be wrong with them.

    Holds one batch, the ids of items and users, and a few numbers for each of them.

    Args:
        data: the data folder; it may have items alone.
        tasks: columns of labels; none named means ``label``, if there is one.
        policy: what may be wrong with events; None for nothing.

    Returns:
        JSON-ready counts: ``items``, ``sources`` (``dim`` and ``missing`` by name), ``missing_categories`` (by name),
        ``unread`` (by file and column: type and reason) and, of events, None without any: ``items_without_events``,
        ``events``, ``met`` (see ``EventCounts.to_json``), ``labels`` (``rate``, or ``mean``, ``deviation`` and whether of log(1 + y), and ``missing`` by name), ``users``,
        ``history`` (``p50``, ``p90`` and ``max`` events of a user), ``users_without_row`` (None without users).

    Raises:
        DataError: on all that is wrong, one line each: of every column the first row. Beyond what the readers check: an
            event whose item is not in the items file, and time running backwards within a user.
    """
    folder = DataFolder.of(data)
    if not folder.path.is_dir():
        raise DataError(f"{folder.path}: no such folder; give the folder that holds items.parquet and events.parquet")
    wrong = Problems()
    items = wrong.collect(lambda: open_items(folder))
    users = wrong.collect(lambda: open_users(folder))
    unread: dict[str, Unread] = {}
    summary = {} if items is None else _check_items(items, wrong, unread)
    if users is not None:
        unread["users"] = unread_users(users, [*_user_features(users, wrong), *(named.column for named in users.dense)])
    for named in map(FeatureName.parse, folder.schema.item_features if items is not None else ()):
        wrong.collect(partial(Draft.of, items, named))
        unread.get("items", {}).pop(named.column, None)
    summary |= _check_events(folder, tasks, policy or EventPolicy(), items, users, wrong, unread)
    wrong.check()
    return summary | {"unread": unread}


@dataclass
class Problems:
    """What is wrong, in the order in which it was found.

    Args:
        messages: one each.
    """

    messages: list[str] = field(default_factory=list)

    def collect(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives; None if it raised a DataError, whose message is kept."""
        try:
            return work()
        except DataError as error:
            if str(error) not in self.messages:
                self.messages.append(str(error))
            return None

    def check(self) -> None:
        """Raises DataError if anything is wrong."""
        if len(self.messages) > 1:
            raise DataError("\n  ".join([f"{len(self.messages)} problems:", *self.messages]))
        if self.messages:
            raise DataError(self.messages[0])


def _check_items(items: Items, wrong: Problems, unread: dict[str, Unread]) -> dict[str, Any]:
    found = len(wrong.messages)
    summary = wrong.collect(lambda: _summarize_items(items))
    if len(wrong.messages) > found:  # of each column its first row, where one alone stopped the pass
        for source in items.source_dims:
            wrong.collect(partial(_read_all, items, source))
        return {}
    large: Unread = {}
    for name in items.categorical:
        try:
            Vocabulary.scan(items, name)
        except UnfitColumn as error:
            large[name] = f"{items.table.type_of(name)}: {str(error).partition(': ')[2]}"
        except DataError as error:
            wrong.messages.append(str(error))
    missing = {name: count for name, count in summary["missing_categories"].items() if name not in large}
    unread["items"] = unread_items(items) | large
    return summary | {"missing_categories": missing}


def _read_all(items: Items, source: str) -> None:
    for _ in items.batches(sources=(source,), targets=()):
        pass


def _summarize_items(items: Items) -> dict[str, Any]:
    missing_vectors = dict.fromkeys(items.source_dims, 0)
    missing_categories = dict.fromkeys(items.categorical, 0)
    for batch in items.batches():
        for name, present_N in batch.present.items():
            missing_vectors[name] += int((~present_N).sum())
        for name, column in batch.targets.items():
            missing_categories[name] += _count_missing(column)
    return {
        "items": items.num_items,
        "sources": {name: {"dim": dim, "missing": missing_vectors[name]} for name, dim in items.source_dims.items()},
        "missing_categories": missing_categories,
    }


def _count_missing(column: pa.Array) -> int:
    if not is_multi_label(column.type):
        return column.null_count
    lengths_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    return int((lengths_N == 0).sum())


def _user_features(users: Users, wrong: Problems) -> dict[str, Vocabulary]:
    """Those that ``prepare`` would read."""
    features = {}
    for name in users.categorical:
        try:
            features[name] = Vocabulary.scan(users, name)
        except UnfitColumn as error:
            if users.are_chosen:
                wrong.messages.append(str(error))
        except DataError as error:
            wrong.messages.append(str(error))
    return features


_NO_EVENTS = dict.fromkeys(("items_without_events", "events", "met", "labels", "users", "history", "users_without_row"))


def _check_events(
    folder: DataFolder,
    tasks: tuple[str, ...],
    policy: EventPolicy,
    items: Items | None,
    users: Users | None,
    wrong: Problems,
    unread: dict[str, Unread],
) -> dict[str, Any]:
    if not folder.has("events") and not tasks:
        return dict(_NO_EVENTS)
    events = wrong.collect(lambda: open_events(folder, tasks))
    rows = None if items is None else wrong.collect(lambda: ItemRows(items))
    if events is None:
        return {}
    found = len(wrong.messages)
    summary = wrong.collect(lambda: _summarize_events(events, rows, policy, users))
    if len(wrong.messages) > found:
        _check_columns(events, wrong)
        return {}
    for named in events.features:
        wrong.collect(partial(Draft.of, events, named))
    unread["events"] = unread_events(events)
    return summary


def _check_columns(events: Events, wrong: Problems) -> None:
    """Of each column its first bad row."""
    table = events.table
    checks: dict[str, Callable[[pa.RecordBatch, int], Any]] = {
        "user_id": lambda batch, row: table.ids(batch, "user_id", row),
        "item_id": lambda batch, row: table.ids(batch, "item_id", row),
        "timestamp": lambda batch, row: timestamps(table, batch, row, events.time_unit),
    }
    if events.weight:
        checks[events.weight] = lambda batch, row: events.weights(batch, row)
    checks |= {task: partial(_check_labels, events, task) for task in events.tasks}
    checks |= {named.column: partial(_check_values, events, named) for named in events.regressions}
    for column, check in checks.items():
        wrong.collect(partial(_check_column, events, column, check))


def _check_labels(events: Events, task: str, batch: pa.RecordBatch, first_row: int) -> None:
    events.labels(batch, task, first_row)


def _check_values(events: Events, named: RegressionName, batch: pa.RecordBatch, first_row: int) -> None:
    events.values(batch, named, first_row)


def _check_column(events: Events, column: str, check: Callable[[pa.RecordBatch, int], Any]) -> None:
    for first_row, batch in events.table.batches([column], 1 << 18):
        check(batch, first_row)


def _summarize_events(
    events: Events, rows: ItemRows | None, policy: EventPolicy, users: Users | None
) -> dict[str, Any]:
    tally = _Tally(events, rows, policy)
    for batch in events.batches():
        tally.add(batch)
    tally.check()
    counts_U = tally.counts_U[: len(tally.users)]
    without_row = None if users is None else _count_without_row(users, tally.users.ids)
    return {
        "items_without_events": None if rows is None else len(rows) - int(tally.is_met_I.sum()),
        "events": events.num_events,
        "met": tally.met.to_json(policy),
        "labels": tally.labels(),
        "users": len(tally.users),
        "history": {
            "p50": int(np.percentile(counts_U, 50)),
            "p90": int(np.percentile(counts_U, 90)),
            "max": int(counts_U.max()),
        },
        "users_without_row": without_row,
    }


def _count_without_row(users: Users, user_ids: pa.Array) -> int:
    try:
        return int((IdIndex(users.ids()).find(user_ids) < 0).sum())
    except TypeError:
        raise DataError(
            f"{users.path}: column 'user_id' holds {users.ids().type}, events have {user_ids.type}; write both with one type"
        ) from None


class _Tally:
    """What is known after some batches of events.

    Args:
        events: the log.
        rows: of the item file; None if that cannot be read.
        policy: what may be wrong.
    """

    def __init__(self, events: Events, rows: ItemRows | None, policy: EventPolicy) -> None:
        self.events = events
        self.rows = rows
        self.policy = policy
        self.met = EventCounts()
        self.users = IdIndex()
        self.counts_U = np.zeros(1024, np.int64)  # of each user, and room for more
        self.last_U = np.full(1024, np.iinfo(np.int64).min)
        self.labels_K3 = np.zeros((len(events.tasks), 3), np.int64)  # how many are 0, 1 and UNKNOWN
        self.moments = [Moments(named) for named in events.regressions]
        self.is_met_I = np.zeros(0 if rows is None else len(rows), bool)
        self.first_unknown = ""

    def add(self, batch: EventBatch) -> None:
        """Counts a batch.

        Raises:
            DataError: if a user's time goes backwards, and is not to be sorted.
        """
        self.labels_K3 += (batch.labels[:, :, None] == np.arange(3)).sum(0)
        for r, own in enumerate(self.moments):
            own.add(batch.values[:, r])
        if self.rows is not None:
            self._add_items(batch, self.rows)
        self._add_users(batch)

    def labels(self) -> dict[str, dict[str, Any]]:
        """Rate of positives, and how many are missing, by task; of regressions mean and deviation instead of a rate."""
        rates = {
            task: {"rate": float(positives / (negatives + positives)), "missing": int(missing)}
            for task, (negatives, positives, missing) in zip(self.events.tasks, self.labels_K3, strict=True)
        }
        num_events = self.events.num_events
        return rates | {
            own.named.column: {
                "mean": own.mean,
                "deviation": own.deviation,
                "is_log": own.named.is_log,
                "missing": num_events - own.count,
            }
            for own in self.moments
        }

    def check(self) -> None:
        """Raises DataError if there were unknown items, and they are to be refused."""
        self.met.short_users = int((self.counts_U[: len(self.users)] < self.policy.min_events).sum())
        if self.first_unknown and self.policy.unknown_items == "refuse":
            raise DataError(
                f"{self.first_unknown}; {self.met.unknown_items} of {self.events.num_events} events name items that are not "
                "there: add the items, or say what to do with such events: --unknown-items drop, or keep"
            )

    def _add_items(self, batch: EventBatch, rows: ItemRows) -> None:
        item_N = rows.find(batch.item_ids, self.events.table, batch.first_row)
        self.is_met_I[item_N[item_N >= 0]] = True
        unknown = np.flatnonzero(item_N < 0)
        if len(unknown) and not self.first_unknown:
            where = self.events.table.at("item_id", batch.first_row + int(unknown[0]))
            self.first_unknown = f"{where}: item_id {shown(batch.item_ids, unknown[0])} is not in {rows.path}"
        self.met.unknown_items += len(unknown)

    def _add_users(self, batch: EventBatch) -> None:
        number_N = self.users.add(batch.user_ids)
        if (more := len(self.users) - len(self.counts_U)) > 0:
            more = max(more, len(self.counts_U))
            self.counts_U = np.append(self.counts_U, np.zeros(more, np.int64))
            self.last_U = np.append(self.last_U, np.full(more, np.iinfo(np.int64).min))
        order = np.argsort(number_N, kind="stable")
        user_N, time_N = number_N[order], batch.timestamps[order]
        starts = np.flatnonzero(np.r_[True, user_N[1:] != user_N[:-1]])
        before_N = np.r_[time_N[:1], time_N[:-1]]
        before_N[starts] = self.last_U[user_N[starts]]
        backwards = order[time_N < before_N]
        if backwards.size and not self.policy.sort:
            row = int(backwards.min())
            before = int(before_N[np.flatnonzero(order == row)[0]])
            where = self.events.table.at("timestamp", batch.first_row + row)
            raise goes_back(where, shown(batch.user_ids, row), before, int(batch.timestamps[row]))
        self.met.unsorted += backwards.size
        ends = np.r_[starts[1:], len(user_N)]
        self.counts_U[user_N[starts]] += ends - starts
        self.last_U[user_N[starts]] = time_N[ends - 1]
