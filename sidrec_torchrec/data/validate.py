"""Every check on a data folder in one streaming pass over each file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.events import EventBatch, Events, Users, open_events, open_users
from sidrec_torchrec.data.items import Items, open_items
from sidrec_torchrec.data.parquet import is_multi_label
from sidrec_torchrec.errors import DataError


def validate(folder: str | Path, tasks: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads all files of a data folder and checks everything that can be wrong with them.

    Holds one batch, the ids of items and users, and two numbers for each of them.

    Args:
        folder: the data folder.
        tasks: columns of labels; none named means ``label``, if there is one.

    Returns:
        JSON-ready counts: ``items``, ``sources`` (``dim`` and ``missing`` by name), ``missing_categories`` (by name),
        ``items_without_events``, ``events``, ``labels`` (``rate`` and ``missing`` by name), ``users``, ``history``
        (``p50``, ``p90`` and ``max`` events of a user), ``users_without_row`` (None without users.parquet).

    Raises:
        DataError: on the first thing wrong; beyond what the readers check: an event whose item is not in the items
            file, and time running backwards within a user.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give the folder that holds items.parquet and events.parquet")
    items, events, users = open_items(folder), open_events(folder, tasks), open_users(folder)
    summary = _summarize_items(items)
    tally = _Tally.of(items, events)
    for batch in events.batches():
        tally.add(batch)
    tally.check()
    return summary | {
        "items_without_events": int((tally.item_counts == 0).sum()),
        "events": events.num_events,
        "labels": tally.labels(),
        "users": len(tally.user_ids),
        "history": {
            "p50": int(np.percentile(tally.user_counts, 50)),
            "p90": int(np.percentile(tally.user_counts, 90)),
            "max": int(tally.user_counts.max()),
        },
        "users_without_row": _count_without_row(users, tally.user_ids),
    }


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


def _count_without_row(users: Users | None, user_ids: np.ndarray) -> int | None:
    if users is None:
        return None
    return len(np.setdiff1d(user_ids, users.ids(), assume_unique=True))


@dataclass
class _Tally:
    """What is known after some batches of events; the arrays of users are aligned, users ascending."""

    events: Events
    items: Items
    item_ids: np.ndarray
    item_counts: np.ndarray
    user_ids: np.ndarray
    user_counts: np.ndarray
    last_times: np.ndarray
    labels_K3: np.ndarray  # how many are 0, 1 and UNKNOWN
    unknown: int = 0
    first_unknown: tuple[int, int] | None = None

    @staticmethod
    def of(items: Items, events: Events) -> "_Tally":
        none = np.empty(0, np.int64)
        item_ids = np.sort(items.ids())
        labels_K3 = np.zeros((len(events.tasks), 3), np.int64)
        return _Tally(events, items, item_ids, np.zeros(len(item_ids), np.int64), none, none, none, labels_K3)

    def add(self, batch: EventBatch) -> None:
        self.labels_K3 += (batch.labels[:, :, None] == np.arange(3)).sum(0)
        self._add_items(batch)
        self._add_users(batch)

    def labels(self) -> dict[str, dict[str, Any]]:
        return {
            task: {"rate": float(positives / (negatives + positives)), "missing": int(missing)}
            for task, (negatives, positives, missing) in zip(self.events.tasks, self.labels_K3, strict=True)
        }

    def check(self) -> None:
        if self.first_unknown is None:
            return
        row, item_id = self.first_unknown
        raise DataError(
            f"{self.events.path}: column 'item_id', row {row}: item_id {item_id} is not in {self.items.path}; "
            f"{self.unknown} of {self.events.num_events} events name items that are not there: add the items or drop "
            "the events"
        )

    def _add_items(self, batch: EventBatch) -> None:
        place_N = np.minimum(np.searchsorted(self.item_ids, batch.item_ids), len(self.item_ids) - 1)
        known_N = self.item_ids[place_N] == batch.item_ids
        np.add.at(self.item_counts, place_N[known_N], 1)
        if not known_N.all():
            if self.first_unknown is None:
                row = int(np.argmin(known_N))
                self.first_unknown = (batch.first_row + row, int(batch.item_ids[row]))
            self.unknown += int((~known_N).sum())

    def _add_users(self, batch: EventBatch) -> None:
        new = np.setdiff1d(batch.user_ids, self.user_ids)
        places = np.searchsorted(self.user_ids, new)
        self.user_ids = np.insert(self.user_ids, places, new)
        self.user_counts = np.insert(self.user_counts, places, 0)
        self.last_times = np.insert(self.last_times, places, np.iinfo(np.int64).min)

        order = np.argsort(batch.user_ids, kind="stable")
        user_N, time_N = batch.user_ids[order], batch.timestamps[order]
        starts = np.flatnonzero(np.r_[True, user_N[1:] != user_N[:-1]])
        place = np.searchsorted(self.user_ids, user_N[starts])
        before_N = np.r_[time_N[:1], time_N[:-1]]
        before_N[starts] = self.last_times[place]
        backwards = order[time_N < before_N]
        if backwards.size:
            row = int(backwards.min())
            before = int(before_N[np.flatnonzero(order == row)[0]])
            raise DataError(
                f"{self.events.path}: column 'timestamp', row {batch.first_row + row}: time of user_id "
                f"{batch.user_ids[row]} goes back from {before} to {batch.timestamps[row]}; sort the "
                "events of each user"
            )
        ends = np.r_[starts[1:], len(user_N)]
        self.user_counts[place] += ends - starts
        self.last_times[place] = time_N[ends - 1]
