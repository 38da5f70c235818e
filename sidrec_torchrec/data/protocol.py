"""The protocol: which of a user's events train, validate and test, and which items are kept out of training.

For every user, in the order of their events:

- with the split ``share`` the last ``test_fraction`` of the events are test targets; with ``time`` all from ``test_from`` on,
  up to ``test_until``. A test target may read every earlier event of its user, those of the test period too;
- the events before are training targets, with ``train_from`` those since then: older ones are history alone;
- a random ``cold_fraction`` of the items is removed from training altogether, as targets and as history;
- a random ``validation_fraction`` of the users is left out of training; their training events choose the best epoch;
- of the other users a random ``train_fraction`` is trained on; all users are tested.

An item is *seen* if it occurs in a training sequence; test targets on other items are *cold*.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np

from sidrec_torchrec.data.buckets import UserEvents
from sidrec_torchrec.data.ids import seed_of
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.tasks import check_tasks
from sidrec_torchrec.errors import DataError, check_at_least, check_share

SHARE, TIME = "share", "time"
NEVER = np.iinfo(np.int64).max  # the first time of an item without events; the end of a test without one
EVER = np.iinfo(np.int64).min
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How logs become sequences.

    Args:
        split: ``share``: the last ``test_fraction`` of each user's events are tested on; ``time``: all events from
            ``test_from`` on.
        test_fraction: share of each user's events, the last ones, that are tested on; for ``share`` alone.
        test_from: when the test begins: a date or date-time such as 2026-10-01 or 2026-10-01T12:00, in UTC where it does not
            say, or a whole number of the log's seconds; for ``time`` alone, as the next two.
        test_until: when the test ends: events then and later are left out; none given: it goes on to the end of the log.
        train_from: when training targets begin: older events are history alone; none given: all train.
        cold_fraction: share of the items, drawn at random, that are removed from training; none given: 0.25 for ``share``, and
            0 for ``time``, where items that are new in the test are cold anyway.
        validation_fraction: share of the users whose training events choose the best epoch instead.
        train_fraction: share of the other users that is trained on, to see what less data does; above 0.
        test_only: whether nothing trains or validates: to test a ranker that was trained before; for ``time`` alone, and only
            with sequences that these are like.
        tasks: columns of labels to predict, four at most; none named means ``label``, or, without such a column, whether
            an event is one or a sampled negative. ``dwell:regression`` is a number to predict, ``dwell:log`` one of many sizes, of
            which log(1 + y) is learned.
        negatives: sampled negatives per event, for logs without labels.
        max_history: most context events of a row.
        targets_per_row: most targets of a row.
        seed: of the cold items, the validation users and the negatives.
        policy: what becomes of events that a log should not have.
    """

    split: str = SHARE
    test_fraction: float = 0.2
    test_from: str | int | None = None
    test_until: str | int | None = None
    train_from: str | int | None = None
    cold_fraction: float | None = None
    validation_fraction: float = 0.05
    train_fraction: float = 1.0
    test_only: bool = False
    tasks: tuple[str, ...] = ()
    negatives: int = 1
    max_history: int = 512
    targets_per_row: int = 256
    seed: int = 0
    policy: EventPolicy = field(default_factory=EventPolicy)

    def __post_init__(self) -> None:
        check_share(self, "test_fraction", "validation_fraction")
        if self.cold_fraction is not None:
            check_share(self, "cold_fraction")
        check_at_least(self, 1, "negatives", "max_history", "targets_per_row")
        check_at_least(self, 0, "seed")
        check_tasks(self.tasks)
        if not self.test_fraction:
            raise ValueError("test_fraction must be above 0: nothing would be tested")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction must be above 0 and at most 1, got {self.train_fraction}")
        self._check_split()

    def _check_split(self) -> None:
        dates = {name: getattr(self, name) for name in ("train_from", "test_from", "test_until")}
        dates = {name: value for name, value in dates.items() if value is not None}
        if self.split not in (SHARE, TIME):
            raise ValueError(f"split must be {SHARE} or {TIME}, got {self.split}")
        if self.split == SHARE and dates:
            raise ValueError(f"{next(iter(dates))} needs split {TIME}; {SHARE} tests each user's last events")
        if self.split == SHARE:
            if self.test_only:
                raise ValueError(f"test_only needs split {TIME}: a ranker is tested on what came after its training")
            return
        if self.test_only and self.train_from is not None:
            raise ValueError("test_only trains nothing: leave train_from out")
        if self.test_from is None:
            raise ValueError(f"split {TIME} needs test_from: the date from which events are tested on")
        if self.test_fraction != PrepareConfig.test_fraction:
            raise ValueError(f"test_fraction is of split {SHARE}; with {TIME} test_from says what is tested")
        for name, value in dates.items():
            object.__setattr__(self, name, str(value))  # so that run folders know it again, however it was given
        seconds = [_seconds(name, str(value)) for name, value in dates.items()]
        if sorted(set(seconds)) != seconds:
            raise ValueError(f"need {' < '.join(dates)}, got {', '.join(map(str, dates.values()))}")

    @property
    def cold_share(self) -> float:
        """Share of the items that is drawn to be cold."""
        if self.cold_fraction is not None:
            return self.cold_fraction
        return 0.25 if self.split == SHARE else 0.0

    @property
    def period(self) -> tuple[int, int, int]:
        """Of the split ``time``: when training targets begin, when the test does, and when it ends, in seconds."""
        given = (("train_from", EVER), ("test_from", NEVER), ("test_until", NEVER))
        begin, test, end = (
            default if getattr(self, name) is None else _seconds(name, str(getattr(self, name)))
            for name, default in given
        )
        return begin, test, end

    def words(self) -> str:
        """Which events are tested and which train, for a report."""
        cold = f"{self.cold_share:.0%} of the items, drawn at random, are kept out of training (cold)."
        if self.split == SHARE:
            text = f"Per user, the last {self.test_fraction:.0%} of events are the test targets and read every earlier event; {cold}"
        else:
            until = "" if self.test_until is None else f" and before {self.test_until}"
            since = "" if self.train_from is None else f" since {self.train_from} (older ones are history alone)"
            text = (
                f"The events from {self.test_from} on{until} (UTC) are the test targets and read every earlier event of their "
                f"user; earlier events{since} train. Items that training does not have are cold"
            )
            text += f"; {cold}" if self.cold_share else "."
        if self.train_fraction < 1:
            text += f" {self.train_fraction:.0%} of the users, drawn at random, are trained on; all are tested."
        return text


class Splitter:
    """A protocol at work on a log.

    Args:
        config: the protocol.
        num_items: items in the item file.

    Attributes:
        drawn_I: bool [num_items], the items drawn to be cold.
    """

    def __init__(self, config: PrepareConfig, num_items: int) -> None:
        self.config = config
        self._period = config.period
        self.drawn_I = np.zeros(num_items, bool)
        shuffled = np.random.default_rng([config.seed, 0]).permutation(num_items)
        self.drawn_I[shuffled[: int(config.cold_share * num_items)]] = True

    def split(self, user: UserEvents) -> Iterator[tuple[str, np.ndarray, int]]:
        """(split, places of the events that belong to it, how many of those precede the first target)."""
        first_train, first_test, end = self._cut(user.timestamp)
        item = user.item[:first_test]
        kept = np.flatnonzero((item < 0) | ~self.drawn_I[item])
        before = int(np.searchsorted(kept, first_train))
        if before < len(kept) and not self.config.test_only:
            # a draw takes longer than cutting a user's events
            validates, trains = self.config.validation_fraction, self.config.train_fraction
            if validates and self._draw(1, user.user_id) < validates:
                yield "validation", kept, before
            elif trains == 1 or self._draw(2, user.user_id) < trains:
                yield "train", kept, before
        if first_test < end:
            yield "test", np.arange(end), first_test

    def is_cold(self, first_event_I: np.ndarray) -> np.ndarray:
        """Items that nothing may be trained on, bool [num_items]: those that are drawn, and those that are new in the test.

        Args:
            first_event_I: int64 [num_items], time of each item's first event; ``NEVER`` without events.
        """
        if self.config.split == SHARE:
            return self.drawn_I
        return self.drawn_I | ((first_event_I >= self._period[1]) & (first_event_I < NEVER))

    def check_dates(self, path: Path, first: int, last: int, *, trains: bool, tests: bool) -> None:
        """Refuses dates that leave nothing to train or test on.

        Args:
            path: of the log.
            first: time of its first event.
            last: of its last.
            trains: whether any event trains.
            tests: whether any is tested on.

        Raises:
            DataError: names the log's first and last day.
        """
        config = self.config
        if config.split != TIME:
            return
        log = f"the log runs from {_day(first)} to {_day(last)}"
        test_from = f"test_from {config.test_from} ({_day(self._period[1])})"
        if not (config.test_only or first < self._period[1]) or self._period[1] > last:
            side = "at or after" if self._period[1] > last else "before"
            raise DataError(f"{path}: no event {side} {test_from}: {log}; choose a date within it")
        if not trains and config.train_from is not None:
            raise DataError(f"{path}: nothing to train on from train_from {config.train_from} to {test_from}: {log}")
        if not tests and config.test_until is not None:
            raise DataError(f"{path}: no event from {test_from} to test_until {config.test_until}: {log}")

    def _cut(self, time_N: np.ndarray) -> tuple[int, int, int]:
        """Places of the first training target, of the first test target, and of the first event that is left out."""
        if self.config.split == TIME:
            first_train, first_test, end = np.searchsorted(time_N, self._period).tolist()
            return first_train, first_test, end
        return 0, len(time_N) - round(self.config.test_fraction * len(time_N)), len(time_N)

    def _draw(self, what: int, user_id: int | str | bytes) -> float:
        """A number in [0, 1), the same for a user whatever the others."""
        return np.random.default_rng([self.config.seed, what, seed_of(user_id)]).random()


def _seconds(name: str, text: str) -> int:
    """The first whole second that is not before the date, since 1970."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    try:
        moment = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text))
    except ValueError:
        raise ValueError(
            f"{name} must be a date such as 2026-10-01 or 2026-10-01T12:00, or a whole number of seconds, got '{text}'"
        ) from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return -((_EPOCH - moment) // timedelta(seconds=1))


def _day(time: int) -> str:
    """The day, and the log's own number."""
    try:
        return f"{(_EPOCH + timedelta(seconds=time)).date()}, {time}"
    except OverflowError:
        return str(time)
