"""What is in a log, counted share by share: shares know nothing of each other, and are added up in the order of the log."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sidrec_torchrec.data.events import EventBatch, Events
from sidrec_torchrec.data.ids import IdIndex, shown
from sidrec_torchrec.data.items import ItemRows
from sidrec_torchrec.data.policy import EventCounts, EventPolicy, goes_back
from sidrec_torchrec.data.target_counts import TargetCounts
from sidrec_torchrec.engines.base import Engine
from sidrec_torchrec.errors import DataError

_PER_SHARE = 1 << 22  # events
_FEW = 1 << 22  # that one process has counted before others have started
_EVER = np.iinfo(np.int64).min


def tally_events(events: Events, rows: ItemRows | None, policy: EventPolicy, engine: Engine) -> "Tally":
    """Counts a log.

    Args:
        events: the log.
        rows: of the item file; None if that cannot be read.
        policy: what may be wrong.
        engine: that counts the shares.

    Raises:
        DataError: on bad events, or what the policy refuses; names file, column and row.
    """
    shares = max(1, min(events.num_events // _PER_SHARE, events.table.num_row_groups))
    whole = Tally.of(events)
    is_met_I = np.zeros(0 if rows is None else len(rows), bool)
    working = engine if events.num_events >= _FEW else engine.for_little()
    for its in working.map(_Share(events, rows, policy, shares), range(shares)):
        is_met_I[its.items] = True
        whole.merge(its)
        if whole.back is not None and not policy.sort:
            row, user, before, after = whole.back
            raise goes_back(events.table.at("timestamp", row), user, before, after)
        if its.error is not None:
            raise its.error
    whole.items = np.flatnonzero(is_met_I)
    whole.targets.check(events.path, events.tasks, events.num_events)
    whole.check(events, rows, policy)
    return whole


@dataclass
class Tally:
    """What some consecutive events hold; U users. Made by ``Tally.of``.

    Args:
        users: of the events.
        counts_U: int64, events of each user, and room for more.
        first_U, first_row_U: likewise, the first event's time, and its row of the file.
        last_U: likewise, the last event's time.
        labels_K3: int64, how many labels are 0, 1 and UNKNOWN, by task.
        targets: whether there is something to learn.
        met: what the policy is about.
        items: rows of the items that occur, sorted.
        unknown: the first event whose item is not there: its row, and the item as messages show it.
        back: the first event that is earlier than its user's last: its row, the user as messages show it, and both times.
        error: what the events behind these have wrong.
    """

    users: IdIndex
    counts_U: np.ndarray
    first_U: np.ndarray
    first_row_U: np.ndarray
    last_U: np.ndarray
    labels_K3: np.ndarray
    targets: TargetCounts
    met: EventCounts
    items: np.ndarray
    unknown: tuple[int, str] | None = None
    back: tuple[int, str, int, int] | None = None
    error: DataError | None = None

    @staticmethod
    def of(events: Events) -> "Tally":
        """Of no event yet."""
        return Tally(
            users=IdIndex(),
            counts_U=np.zeros(0, np.int64),
            first_U=np.zeros(0, np.int64),
            first_row_U=np.zeros(0, np.int64),
            last_U=np.zeros(0, np.int64),
            labels_K3=np.zeros((len(events.tasks), 3), np.int64),
            targets=TargetCounts.of(events.tasks, events.regressions),
            met=EventCounts(),
            items=np.zeros(0, np.int64),
        )

    def add(self, batch: EventBatch) -> None:
        """Counts labels and users of a batch; ``targets`` has been told of it."""
        self.labels_K3 += (batch.labels[:, :, None] == np.arange(3)).sum(0)
        number_N = self.users.add(batch.user_ids)
        self._make_room()
        order = np.argsort(number_N, kind="stable")
        user_N, time_N = number_N[order], batch.timestamps[order]
        starts = np.flatnonzero(np.r_[True, user_N[1:] != user_N[:-1]])
        user_S, ends = user_N[starts], np.r_[starts[1:], len(user_N)]
        before_N = np.r_[time_N[:1], time_N[:-1]]
        before_N[starts] = self.last_U[user_S]
        self._go_back(batch, order, before_N, time_N)
        is_new_S = self.counts_U[user_S] == 0
        self.first_U[user_S[is_new_S]] = time_N[starts[is_new_S]]
        self.first_row_U[user_S[is_new_S]] = batch.first_row + order[starts[is_new_S]]
        self.counts_U[user_S] += ends - starts
        self.last_U[user_S] = time_N[ends - 1]

    def merge(self, its: "Tally") -> None:
        """Takes what the events right behind hold; all but ``items``, of which there may be many."""
        number_V = self.users.add(its.users.ids)
        self._make_room()
        count = len(its.users)
        its_first_V, its_row_V = its.first_U[:count], its.first_row_U[:count]
        before_V = self.last_U[number_V]
        back = np.flatnonzero(its_first_V < before_V)
        self.met.unsorted += len(back)
        first = its.back
        if len(back):
            at = back[np.argmin(its_row_V[back])]
            if first is None or its_row_V[at] < first[0]:
                first = int(its_row_V[at]), shown(its.users.ids, at), int(before_V[at]), int(its_first_V[at])
        self.back, self.unknown = self.back or first, self.unknown or its.unknown
        new = self.counts_U[number_V] == 0
        self.first_U[number_V[new]], self.first_row_U[number_V[new]] = its_first_V[new], its_row_V[new]
        self.counts_U[number_V] += its.counts_U[:count]
        self.last_U[number_V] = its.last_U[:count]
        self.labels_K3 += its.labels_K3
        self.targets.merge(its.targets)
        self.met.add(its.met)

    def labels(self, events: Events) -> dict[str, dict[str, Any]]:
        """Rate of positives, and how many are missing, by task; of regressions mean and deviation instead of a rate."""
        rates = {
            task: {"rate": float(positives / (negatives + positives)), "missing": int(missing)}
            for task, (negatives, positives, missing) in zip(events.tasks, self.labels_K3, strict=True)
        }
        return rates | {
            own.named.column: {
                "mean": own.mean,
                "deviation": own.deviation,
                "is_log": own.named.is_log,
                "missing": events.num_events - own.count,
            }
            for own in self.targets.moments
        }

    def check(self, events: Events, rows: ItemRows | None, policy: EventPolicy) -> None:
        """Counts users of few events; raises DataError if there were unknown items, and they are to be refused."""
        self.met.short_users = int((self.counts_U[: len(self.users)] < policy.min_events).sum())
        if rows is not None and self.unknown is not None and policy.unknown_items == "refuse":
            row, item = self.unknown
            raise DataError(
                f"{events.table.at('item_id', row)}: item_id {item} is not in {rows.path}; {self.met.unknown_items} of "
                f"{events.num_events} events name items that are not there: add the items, or say what to do with such events: "
                "--unknown-items drop, or keep"
            )

    def _go_back(self, batch: EventBatch, order: np.ndarray, before_N: np.ndarray, time_N: np.ndarray) -> None:
        """Counts events that are earlier than the ones before them; of the batch in that order."""
        back = np.flatnonzero(time_N < before_N)
        self.met.unsorted += len(back)
        if len(back) and self.back is None:
            at = back[np.argmin(order[back])]
            user = shown(batch.user_ids, order[at])
            self.back = batch.first_row + int(order[at]), user, int(before_N[at]), int(time_N[at])

    def _make_room(self) -> None:
        """For users that have been added."""
        more = len(self.users) - len(self.counts_U)
        if more <= 0:
            return
        more = max(more, len(self.counts_U))
        for name in ("counts_U", "first_U", "first_row_U"):
            setattr(self, name, np.append(getattr(self, name), np.zeros(more, np.int64)))
        self.last_U = np.append(self.last_U, np.full(more, _EVER))


@dataclass(frozen=True)
class _Share:
    """Counts a share of a log, as far as it is right."""

    events: Events
    rows: ItemRows | None
    policy: EventPolicy
    shares: int

    def __call__(self, share: int) -> Tally:
        tally = Tally.of(self.events)
        is_met_I = np.zeros(0 if self.rows is None else len(self.rows), bool)
        try:
            for batch in self.events.batches(share=(share, self.shares), met=tally.targets):
                if self.rows is not None:
                    self._find(batch, self.rows, tally, is_met_I)
                tally.add(batch)
                if tally.back is not None and not self.policy.sort:
                    break
        except DataError as error:
            tally.error = error
        tally.items = np.flatnonzero(is_met_I)
        return tally

    def _find(self, batch: EventBatch, rows: ItemRows, tally: Tally, is_met_I: np.ndarray) -> None:
        item_N = rows.find(batch.item_ids, self.events.table, batch.first_row)
        is_met_I[item_N[item_N >= 0]] = True
        unknown = np.flatnonzero(item_N < 0)
        if len(unknown) and tally.unknown is None:
            tally.unknown = batch.first_row + int(unknown[0]), shown(batch.item_ids, unknown[0])
        tally.met.unknown_items += len(unknown)
