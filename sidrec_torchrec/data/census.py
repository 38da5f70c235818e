"""A log read once under a protocol: what trains, what is tested, and which items training has."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.buckets import EventBuckets
from sidrec_torchrec.data.policy import EventCounts
from sidrec_torchrec.data.protocol import EVER, NEVER, Splitter
from sidrec_torchrec.engines.base import Engine


@dataclass(frozen=True, kw_only=True)
class Census:
    """What a log holds under a protocol; I items.

    Args:
        training_I: int64, training targets on each item.
        test_I: int64, test targets on each item.
        seen_I: bool, whether training has it, as a target or as history.
        first_event_I: int64, the time of its first event in the whole log; ``NEVER`` without events.
        last_training_event: time of the last training target; None if nothing trains.
    """

    training_I: np.ndarray
    test_I: np.ndarray
    seen_I: np.ndarray
    first_event_I: np.ndarray
    last_training_event: int | None


def take_census(buckets: EventBuckets, splitter: Splitter, engine: Engine) -> tuple[Census, EventCounts]:
    """Reads the log once; gives the census, and what the policy met.

    Raises:
        DataError: if a user's timestamps go backwards, or the protocol's dates leave nothing to train or test on.
    """
    num_items = len(splitter.drawn_I)
    targets = {split: np.zeros(num_items, np.int64) for split in ("train", "validation", "test")}
    seen_I, first_event_I = np.zeros(num_items, bool), np.full(num_items, NEVER)
    first, last, last_training, counts = NEVER, EVER, EVER, EventCounts()
    for its in engine.map(_Bucket(buckets, splitter), range(buckets.count)):
        for split, (item_M, count_M) in its.targets.items():
            targets[split][item_M] += count_M
        seen_I[its.seen] = True
        item_M, time_M = its.first_events
        first_event_I[item_M] = np.minimum(first_event_I[item_M], time_M)
        first, last = min(first, its.first), max(last, its.last)
        last_training = max(last_training, its.last_training)
        counts.add(its.counts)
    splitter.check_dates(
        buckets.path, first, last, trains=bool(targets["train"].any()), tests=bool(targets["test"].any())
    )
    census = Census(
        training_I=targets["train"],
        test_I=targets["test"],
        seen_I=seen_I,
        first_event_I=first_event_I,
        last_training_event=last_training if last_training > EVER else None,
    )
    return census, counts


@dataclass
class _BucketCensus:
    """What one bucket holds: by split, and of first events, items and their numbers; small, whatever the number of items."""

    targets: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    first_events: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.int32), np.zeros(0, np.int64))
    first: int = NEVER
    last: int = EVER
    last_training: int = EVER
    counts: EventCounts = field(default_factory=EventCounts)


@dataclass(frozen=True)
class _Bucket:
    """Takes the census of a bucket."""

    buckets: EventBuckets
    splitter: Splitter

    def __call__(self, bucket: int) -> _BucketCensus:
        census, max_history = _BucketCensus(), self.splitter.config.max_history
        targets: dict[str, list[np.ndarray]] = {}
        items, times, seen = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        for user in self.buckets.users(bucket, census.counts):
            known = user.item >= 0
            items.append(user.item[known])
            times.append(user.timestamp[known])
            census.first = min(census.first, int(user.timestamp[0]))
            census.last = max(census.last, int(user.timestamp[-1]))
            for split, events, first_target in self.splitter.split(user):
                targets.setdefault(split, []).append(_known(user.item[events[first_target:]]))
                if split == "train":
                    seen.append(_known(user.item[events[max(0, first_target - max_history) :]]))
                    census.last_training = max(census.last_training, int(user.timestamp[events[-1]]))
        for split, met in targets.items():
            census.targets[split] = np.unique(np.concatenate(met), return_counts=True)
        census.seen = np.unique(np.concatenate(seen))
        events = pa.table({"item": np.concatenate(items), "time": np.concatenate(times)})
        first = events.group_by("item", use_threads=False).aggregate([("time", "min")])
        census.first_events = first["item"].to_numpy(), first["time_min"].to_numpy()
        return census


def _known(item_N: np.ndarray) -> np.ndarray:
    """Without events on items that are not in the item file."""
    return item_N[item_N >= 0]
