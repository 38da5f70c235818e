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
from sidrec_torchrec.data.events import Events, Users, open_events, open_users, timestamps
from sidrec_torchrec.data.features import Draft, FeatureName
from sidrec_torchrec.data.folder import DataFolder
from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.data.items import ItemRows, Items, open_items
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.tally import tally_events
from sidrec_torchrec.data.tasks import RegressionName
from sidrec_torchrec.data.unread import Unread, unread_events, unread_items, unread_users
from sidrec_torchrec.data.vocabulary import UnfitColumn, Vocabulary
from sidrec_torchrec.engines.base import Engine, Inline
from sidrec_torchrec.errors import DataError

_PER_SHARE = 1 << 18  # items
_FEW_ITEMS = 1 << 20  # that one process has read before others have started


def validate(
    data: str | Path | DataFolder,
    tasks: tuple[str, ...] = (),
    policy: EventPolicy | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Reads all files of a data folder and checks everything that can be wrong with them.

    Holds one batch, the ids of items and users, and a few numbers for each of them.

    Args:
        data: the data folder; it may have items alone.
        tasks: columns of labels; none named means ``label``, if there is one.
        policy: what may be wrong with events; None for nothing.
        engine: that works on shares of large files; None for this process alone. It changes nothing of the result.

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
    wrong, engine = Problems(), engine or Inline()
    items = wrong.collect(lambda: open_items(folder))
    users = wrong.collect(lambda: open_users(folder))
    unread: dict[str, Unread] = {}
    summary = {} if items is None else _check_items(items, wrong, unread, engine)
    if users is not None:
        unread["users"] = unread_users(users, [*_user_features(users, wrong), *(named.column for named in users.dense)])
    for named in map(FeatureName.parse, folder.schema.item_features if items is not None else ()):
        wrong.collect(partial(Draft.of, items, named))
        unread.get("items", {}).pop(named.column, None)
    summary |= _check_events(folder, tasks, policy or EventPolicy(), items, users, wrong, unread, engine)
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


def _check_items(items: Items, wrong: Problems, unread: dict[str, Unread], engine: Engine) -> dict[str, Any]:
    found = len(wrong.messages)
    summary = wrong.collect(lambda: _summarize_items(items, engine))
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


def _summarize_items(items: Items, engine: Engine) -> dict[str, Any]:
    items.ids()  # read once, for all shares
    shares = max(1, min(items.num_items // _PER_SHARE, items.table.num_row_groups))
    working = engine if items.num_items >= _FEW_ITEMS else engine.for_little()
    missing = dict.fromkeys((*items.source_dims, *items.categorical), 0)
    for its in working.map(_ItemShare(items, shares), range(shares)):
        missing = {name: count + its[name] for name, count in missing.items()}
    return {
        "items": items.num_items,
        "sources": {name: {"dim": dim, "missing": missing[name]} for name, dim in items.source_dims.items()},
        "missing_categories": {name: missing[name] for name in items.categorical},
    }


@dataclass(frozen=True)
class _ItemShare:
    """Reads a share of the items; counts what is missing, by source and categorical column."""

    items: Items
    shares: int

    def __call__(self, share: int) -> dict[str, int]:
        missing = dict.fromkeys((*self.items.source_dims, *self.items.categorical), 0)
        for batch in self.items.batches(share=(share, self.shares)):
            for name, present_N in batch.present.items():
                missing[name] += int((~present_N).sum())
            for name, column in batch.targets.items():
                missing[name] += _count_missing(column)
        return missing


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
    engine: Engine,
) -> dict[str, Any]:
    if not folder.has("events") and not tasks:
        return dict(_NO_EVENTS)
    events = wrong.collect(lambda: open_events(folder, tasks))
    rows = None if items is None else wrong.collect(lambda: ItemRows(items))
    if events is None:
        return {}
    found = len(wrong.messages)
    summary = wrong.collect(lambda: _summarize_events(events, rows, policy, users, engine))
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
    events: Events, rows: ItemRows | None, policy: EventPolicy, users: Users | None, engine: Engine
) -> dict[str, Any]:
    tally = tally_events(events, rows, policy, engine)
    counts_U = tally.counts_U[: len(tally.users)]
    without_row = None if users is None else _count_without_row(users, tally.users.ids)
    return {
        "items_without_events": None if rows is None else len(rows) - len(tally.items),
        "events": events.num_events,
        "met": tally.met.to_json(policy),
        "labels": tally.labels(events),
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
