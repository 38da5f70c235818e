"""The split by date, against its definition event by event; dates that are refused; what is kept of items."""

import itertools
import tempfile
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.data.buckets import UserEvents
from sidrec_torchrec.data.census import take_census
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.protocol import Splitter
from sidrec_torchrec.data.sequences import from_table
from sidrec_torchrec.data.splits import SPLITS
from sidrec_torchrec.engines.base import Inline
from sidrec_torchrec.errors import DataError

ITEMS = 8
DAY = 86_400
START = 1_790_812_800  # 2026-10-01


def write_log(folder: Path, events: list[tuple[int, int, int]], *, label: bool = True) -> None:
    """Events are (user, item row, time); item ids are 10 times the row."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"item_id": pa.array(np.arange(ITEMS) * 10, pa.int64())}), folder / "items.parquet")
    user_N, item_N, time_N = np.array(events, np.int64).T
    columns = {"user_id": user_N, "item_id": item_N * 10, "timestamp": time_N}
    if label:
        columns["label"] = (np.arange(len(events)) % 2).astype(np.int8)
    pq.write_table(pa.table(columns), folder / "events.parquet")


def split_by_time(**changes) -> PrepareConfig:
    return PrepareConfig(**{"split": "time", "cold_fraction": 0.0, "validation_fraction": 0.0} | changes)


def read_targets(prepared: Prepared, split: str) -> list[tuple]:
    """(user, (item, time) of the target, those of all events it reads), in the order of users and time."""
    found = []
    for row in from_table(pq.read_table(prepared.path(split))):
        events = list(zip(row.item.tolist(), row.timestamp.tolist(), strict=True))
        for place in range(len(row) - row.num_targets, len(row)):
            reads = [events[i] for i in range(place) if row.visible[i] and row.order[i] < row.order[place]]
            found.append((row.user_id, events[place], reads))
    return sorted(found, key=lambda target: target[0])


def by_definition(events: list[tuple[int, int, int]], first: int, last: int, cold: set[int]) -> list[tuple]:
    """Of events from ``first`` to before ``last``, each with all the same user's earlier ones; but for items of ``cold``."""
    found = []
    for user in sorted({user for user, _, _ in events}):
        own = [(item, time) for other, item, time in events if other == user and item not in cold]
        found += [(user, event, own[:n]) for n, event in enumerate(own) if first <= event[1] < last]
    return found


@st.composite
def logs(draw):
    times = sorted(draw(st.lists(st.integers(0, 30), min_size=6, max_size=60)))
    users = draw(st.lists(st.integers(-2, 3), min_size=len(times), max_size=len(times)))
    items = draw(st.lists(st.integers(0, ITEMS - 1), min_size=len(times), max_size=len(times)))
    dates = draw(st.lists(st.integers(0, 31), min_size=3, max_size=3, unique=True).map(sorted))
    return list(zip(users, items, times, strict=True)), dates


@settings(max_examples=60, deadline=None)
@given(logs(), st.booleans(), st.booleans(), st.sampled_from([0.0, 0.3]))
def test_split_by_time_is_its_definition(log, begins, ends, cold_fraction):
    events, (train_from, test_from, test_until) = log
    dates = {"test_from": test_from}
    dates |= {"train_from": train_from} if begins else {}
    dates |= {"test_until": test_until} if ends else {}
    first = train_from if begins else -1
    last = test_until if ends else 99
    config = split_by_time(**dates, cold_fraction=cold_fraction, targets_per_row=3, max_history=1000)
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder), events)
        # each item's first event; those that come in the test alone are no item of training's
        began = {item: min(time for _, i, time in events if i == item) for _, item, _ in events}
        new = {item for item, time in began.items() if time >= test_from}
        splitter = Splitter(config, ITEMS)
        drawn = set(np.flatnonzero(splitter.drawn_I).tolist())
        assert len(drawn) == int(cold_fraction * ITEMS)
        training = by_definition(events, first, test_from, drawn)
        tested = by_definition(events, test_from, last, set())
        if not training or not tested:
            with pytest.raises(DataError, match="no event|no train targets|nothing to train on"):
                prepare(Path(folder), Path(folder) / "out", config)
            assert not (Path(folder) / "out").exists()
            return
        prepared = prepare(Path(folder), Path(folder) / "out", config)
        assert read_targets(prepared, "train") == training
        assert read_targets(prepared, "test") == tested
        assert read_targets(prepared, "validation") == []
        counts = Counter(item for _, (item, _), _ in training)
        assert prepared.training_events().tolist() == [counts[item] for item in range(ITEMS)]
        read = {item for _, target, reads in training for item, _ in [target, *reads]}
        assert set(np.flatnonzero(prepared.seen())) == read
        never = np.iinfo(np.int64).max
        assert prepared.first_events().tolist() == [began.get(item, never) for item in range(ITEMS)]
        assert prepared.last_training_event == max(time for _, (_, time), _ in training)
        cold = pq.read_table(prepared.folder / "cold_items.parquet")["item_id"].to_numpy() // 10
        assert set(cold.tolist()) == drawn | new


def test_validation_users_and_shares_hold_with_dates(tmp_path):
    rng = np.random.default_rng(0)
    events = [(int(user), int(rng.integers(ITEMS)), time) for time, user in enumerate(rng.integers(100, size=2000))]
    write_log(tmp_path, events)
    config = split_by_time(test_from=1500, validation_fraction=0.3, train_fraction=0.5)
    prepared = prepare(tmp_path, tmp_path / "out", config)
    users = {split: {user for user, _, _ in read_targets(prepared, split)} for split in SPLITS}
    assert not users["train"] & users["validation"]
    assert 20 <= len(users["validation"]) <= 40 and 25 <= len(users["train"]) <= 45
    for split in ("train", "validation"):
        expected = [t for t in by_definition(events, 0, 1500, set()) if t[0] in users[split]]
        assert read_targets(prepared, split) == expected


def test_sampled_negatives_of_the_test_are_items_of_the_test(tmp_path):
    """Of an item that training has alone in histories before ``train_from``, too: it is seen, and so are its negatives."""
    rng = np.random.default_rng(0)
    old, recent, new = [0, 1], [2, 3, 4], [5, 6, 7]
    events = [
        *((user, int(rng.choice(old)), 10) for user in range(200)),
        *((user, int(rng.choice(recent)), 50) for user in range(200)),
        *((user, int(rng.choice([*old, *recent, *new])), 90) for user in range(200)),
    ]
    write_log(tmp_path, events, label=False)
    config = split_by_time(train_from=40, test_from=80)
    prepared = prepare(tmp_path, tmp_path / "out", config)
    assert np.flatnonzero(prepared.seen()).tolist() == [*old, *recent]
    assert np.flatnonzero(prepared.training_events()).tolist() == recent
    positives, negatives = Counter(), Counter()
    for row in from_table(pq.read_table(prepared.path("test"))):
        targets = slice(len(row) - row.num_targets, len(row))
        item, real = row.item[targets].tolist(), row.visible[targets].tolist()
        for chosen, drawn in itertools.pairwise(zip(item, real, strict=True)):
            if chosen[1] and not drawn[1]:
                positives[chosen[0] in new] += 1
                negatives[drawn[0] in new] += 1
    assert positives == negatives and all(positives[kind] > 20 for kind in (True, False))


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("2026-10-01", START),
        ("2026-10-01T12:00", START + DAY // 2),
        ("2026-10-01 12:00:00", START + DAY // 2),
        ("2026-10-01T12:00:00Z", START + DAY // 2),
        ("2026-10-01T14:00:00+02:00", START + DAY // 2),
        ("2026-10-01T00:00:00.250000", START + 1),  # the first whole second that is not before it
        (str(START), START),
        (START, START),
        ("-5", -5),
        (datetime(2026, 10, 1, tzinfo=timezone.utc), START),
    ],
)
def test_dates_are_utc_and_numbers_are_seconds(given, seconds):
    config = split_by_time(test_from=given, test_until=str(START + 9 * DAY))
    assert config.period[1:] == (seconds, START + 9 * DAY)
    assert split_by_time(test_from=str(given), test_until=START + 9 * DAY) == config


def test_dates_outside_the_log_are_refused(tmp_path):
    write_log(tmp_path, [(1, n % 3, START + n * DAY) for n in range(30)])
    log = r"the log runs from 2026-10-01, 1790812800 to 2026-10-30, 1793318400"
    for changes, words in (
        ({"test_from": "2026-10-01"}, rf"events\.parquet: no event before test_from 2026-10-01 .*: {log}; choose"),
        ({"test_from": "2026-10-31"}, rf"no event at or after test_from 2026-10-31 .*: {log}"),
        ({"test_from": "20261010"}, rf"no event before test_from 20261010 \(1970-08-23, 20261010\): {log}"),
        (
            {"test_from": "2026-10-10T01:00", "test_until": "2026-10-10T02:00"},
            rf"no event from test_from 2026-10-10T01:00 .* to test_until 2026-10-10T02:00: {log}",
        ),
        (
            {"train_from": "2026-10-09T01:00", "test_from": "2026-10-09T02:00"},
            rf"nothing to train on from train_from 2026-10-09T01:00 to test_from .*: {log}",
        ),
    ):
        with pytest.raises(DataError, match=words):
            prepare(tmp_path, tmp_path / "out", split_by_time(**changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "date"}, "split must be share or time, got date"),
        ({"split": "time"}, "split time needs test_from"),
        ({"test_from": "2026-10-01"}, "test_from needs split time"),
        ({"train_from": 5}, "train_from needs split time"),
        ({"split": "time", "test_from": "1.10.2026"}, "test_from must be a date such as 2026-10-01 .*got '1.10.2026'"),
        ({"split": "time", "test_from": 5, "test_fraction": 0.1}, "test_fraction is of split share"),
        ({"split": "time", "test_from": 5, "test_until": 5}, "need test_from < test_until, got 5, 5"),
        ({"split": "time", "test_from": 5, "train_from": 6}, "need train_from < test_from, got 6, 5"),
        ({"split": "time", "test_from": 5, "cold_fraction": 1.0}, "cold_fraction must lie in"),
    ],
)
def test_config_is_checked(changes, words):
    with pytest.raises(ValueError, match=words):
        PrepareConfig(**changes)


def test_items_are_drawn_to_be_cold_where_nothing_else_is_said():
    assert PrepareConfig().cold_share == 0.25 and split_by_time(test_from=5, cold_fraction=None).cold_share == 0.0
    assert split_by_time(test_from=5, cold_fraction=0.1).cold_share == 0.1


def test_the_protocol_in_words():
    words = split_by_time(test_from="2026-10-01", test_until="2026-10-08", train_from="2026-09-01").words()
    assert words == (
        "The events from 2026-10-01 on and before 2026-10-08 (UTC) are the test targets and read every earlier event of their "
        "user; earlier events since 2026-09-01 (older ones are history alone) train. Items that training does not have are "
        "cold."
    )
    assert PrepareConfig(train_fraction=0.5).words().startswith("Per user, the last 20% of events are the test targets")


def test_events_without_an_item_are_kept_and_counted_nowhere():
    """Row -1: an event on an item that is not in the item file, kept in the history."""
    item_N, time_N = np.array([0, -1, 1, -1, 2], np.int32), np.arange(5)
    user = UserEvents(user_id=1, codes=np.zeros(0, np.int32), item=item_N, timestamp=time_N, action=np.ones(5, np.int8))

    class Buckets:
        path, count = Path("events.parquet"), 1

        def users(self, bucket, counts):
            yield user

    splitter = Splitter(
        split_by_time(test_from=4, cold_fraction=0.5), 4
    )  # the last item may be drawn: not row -1 with it
    splitter.drawn_I[:] = [False, False, False, True]
    (train, test) = splitter.split(user)
    assert train[1].tolist() == [0, 1, 2, 3] and test[1].tolist() == [0, 1, 2, 3, 4]
    census, _ = take_census(Buckets(), splitter, Inline())
    assert census.training_I.tolist() == [1, 1, 0, 0] and census.seen_I.tolist() == [True, True, False, False]
    assert census.first_event_I.tolist()[:3] == [0, 2, 4]
