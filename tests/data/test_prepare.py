"""The protocol: what trains, what tests, what is cold; negatives; errors."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data import scatter
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import Prepared, open_prepared
from sidrec_torchrec.data.sequences import Sequence, from_table
from sidrec_torchrec.data.splits import SPLITS
from sidrec_torchrec.errors import DataError

NUM_ITEMS = 40


def write_corpus(folder: Path, *, users: int = 30, labels: bool = True, seed: int = 0) -> pa.Table:
    """Users of 1 to 60 events, interleaved in the file, item ids 100, 110, ... in shuffled file order."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    item_ids = rng.permutation(NUM_ITEMS) * 10 + 100
    pq.write_table(pa.table({"item_id": pa.array(item_ids, pa.int64())}), folder / "items.parquet")
    user_N = np.repeat(np.arange(users), rng.integers(1, 61, users))
    rng.shuffle(user_N)
    columns = {
        "user_id": user_N.astype(np.int64) - 3,  # some ids below zero
        "item_id": rng.choice(item_ids, len(user_N)).astype(np.int64),
        "timestamp": np.arange(len(user_N), dtype=np.int64) * 7,
    }
    if labels:
        columns["label"] = rng.integers(0, 2, len(user_N)).astype(np.int8)
    events = pa.table(columns)
    pq.write_table(events, folder / "events.parquet", row_group_size=100)
    users_table = pa.table({"user_id": np.arange(users - 2, dtype=np.int64) - 3, "kind": ["a", "b"] * (users // 2 - 1)})
    pq.write_table(users_table, folder / "users.parquet")
    return events


def rows_of(prepared: Prepared, split: str) -> list[Sequence]:
    return from_table(pq.read_table(prepared.path(split)))


def targets_of(row: Sequence) -> slice:
    return slice(len(row) - row.num_targets, len(row))


def test_every_last_fifth_is_tested_once_with_all_that_came_before(tmp_path):
    events = write_corpus(tmp_path / "data")
    config = PrepareConfig(max_history=1000, targets_per_row=4, cold_fraction=0.25)
    prepared = prepare(tmp_path / "data", tmp_path / "out", config)
    item_ids = pq.read_table(tmp_path / "data" / "items.parquet")["item_id"].to_numpy()
    tested: dict[int, list[int]] = {}
    for row in rows_of(prepared, "test"):
        tested.setdefault(row.user_id, []).extend(row.timestamp[targets_of(row)])
        # the row begins with the user's first event and misses none
        own = events.filter(pa.compute.equal(events["user_id"], row.user_id))
        np.testing.assert_array_equal(row.timestamp, own["timestamp"].to_numpy()[: len(row)])
        np.testing.assert_array_equal(item_ids[row.item], own["item_id"].to_numpy()[: len(row)])
        np.testing.assert_array_equal(row.action, own["label"].to_numpy()[: len(row)])
    for user, count in Counter(events["user_id"].to_pylist()).items():
        times = events.filter(pa.compute.equal(events["user_id"], user))["timestamp"].to_numpy()
        assert tested.get(user, []) == list(times[count - round(0.2 * count) :])


def test_cold_items_never_train_and_seen_tells_them(tmp_path):
    write_corpus(tmp_path / "data")
    prepared = prepare(tmp_path / "data", tmp_path / "out", PrepareConfig(cold_fraction=0.25))
    trained = np.concatenate([row.item for row in rows_of(prepared, "train")])
    assert set(trained) == set(np.flatnonzero(prepared.seen()))
    assert len(set(trained)) <= NUM_ITEMS * 3 // 4
    tested = np.concatenate([row.item[targets_of(row)] for row in rows_of(prepared, "test")])
    assert not prepared.seen()[tested].all()
    cold_ids = pq.read_table(prepared.folder / "cold_items.parquet")["item_id"].to_pylist()
    item_ids = pq.read_table(tmp_path / "data" / "items.parquet")["item_id"].to_numpy()
    assert len(cold_ids) == NUM_ITEMS // 4
    assert not set(cold_ids) & set(item_ids[trained])


@pytest.mark.parametrize("labels", [True, False])
def test_training_events_are_those_of_training_users_before_their_test(labels, tmp_path):
    events = write_corpus(tmp_path / "data", labels=labels).to_pylist()
    config = PrepareConfig(max_history=8, targets_per_row=5, validation_fraction=0.3, cold_fraction=0.25)
    prepared = prepare(tmp_path / "data", tmp_path / "out", config)
    training = {row.user_id for row in rows_of(prepared, "train")}
    cold = set(pq.read_table(prepared.folder / "cold_items.parquet")["item_id"].to_pylist())
    expected: Counter = Counter()
    for user in training:
        own = [event["item_id"] for event in events if event["user_id"] == user]
        expected.update(item for item in own[: len(own) - round(0.2 * len(own))] if item not in cold)
    item_ids = pq.read_table(tmp_path / "data" / "items.parquet")["item_id"].to_pylist()
    assert prepared.training_events().tolist() == [expected[item] for item in item_ids]


def test_validation_users_do_not_train(tmp_path):
    write_corpus(tmp_path / "data")
    prepared = prepare(tmp_path / "data", tmp_path / "out", PrepareConfig(validation_fraction=0.4))
    training, validating = ({row.user_id for row in rows_of(prepared, split)} for split in ("train", "validation"))
    assert training and validating and not training & validating


def test_a_share_of_the_users_trains_and_all_are_tested(tmp_path):
    write_corpus(tmp_path / "data")
    whole = prepare(tmp_path / "data", tmp_path / "whole", PrepareConfig())
    half = prepare(tmp_path / "data", tmp_path / "half", PrepareConfig(train_fraction=0.5))
    of_whole, of_half = (
        {split: {row.user_id for row in rows_of(prepared, split)} for split in ("train", "validation", "test")}
        for prepared in (whole, half)
    )
    assert of_half["test"] == of_whole["test"] and of_half["validation"] == of_whole["validation"]
    assert of_half["train"] < of_whole["train"]
    assert 0.25 < len(of_half["train"]) / len(of_whole["train"]) < 0.75


def test_result_does_not_depend_on_buckets(tmp_path, monkeypatch):
    write_corpus(tmp_path / "data", labels=False)
    one = prepare(tmp_path / "data", tmp_path / "one", PrepareConfig())
    monkeypatch.setattr(scatter, "EVENTS_PER_BUCKET", 100)
    many = prepare(tmp_path / "data", tmp_path / "many", PrepareConfig())
    for split in SPLITS:
        tables = [pq.read_table(p.path(split)).sort_by("user_id") for p in (one, many)]
        assert tables[0].num_rows and tables[0] == tables[1]


def test_rows_are_bounded_and_overlap_only_in_context(tmp_path):
    write_corpus(tmp_path / "data")
    prepared = prepare(tmp_path / "data", tmp_path / "out", PrepareConfig(max_history=8, targets_per_row=5))
    for split in SPLITS:
        seen_targets = set()
        for row in rows_of(prepared, split):
            assert 1 <= row.num_targets <= 5 and len(row) <= 8 + row.num_targets
            keys = {(row.user_id, t) for t in row.timestamp[targets_of(row)]}
            assert not keys & seen_targets
            seen_targets |= keys


def test_user_codes(tmp_path):
    write_corpus(tmp_path / "data")
    prepared = prepare(tmp_path / "data", tmp_path / "out", PrepareConfig())
    assert prepared.user_features == {"kind": 3}
    codes = {row.user_id: row.user_codes.tolist() for row in rows_of(prepared, "test")}
    assert all(code == ([0] if user >= 25 else [1 + (user + 3) % 2]) for user, code in codes.items())


def test_negatives_match_popularity_and_are_never_history(tmp_path):
    write_corpus(tmp_path / "data", users=300, labels=False)
    prepared = prepare(tmp_path / "data", tmp_path / "out", PrepareConfig(negatives=2, cold_fraction=0.25))
    assert prepared.sampled_negatives
    seen = prepared.seen()
    for split in ("train", "test"):
        positives, negatives = Counter(), Counter()
        for row in rows_of(prepared, split):
            real = row.item[row.visible]
            assert not set(row.item[~row.visible]) & set(real)  # never an item the user has met
            np.testing.assert_array_equal(row.action, row.visible)
            last = targets_of(row)
            positives.update(row.item[last][row.visible[last]])
            negatives.update(row.item[last][~row.visible[last]])
            # each target is followed by its negatives, at its own order
            assert all(o in set(row.order[row.visible]) for o in row.order[last])
        share = sum(negatives.values()) / sum(positives.values())
        assert 1.5 < share <= 2
        for kind in (True, False):
            pos = sum(n for item, n in positives.items() if seen[item] == kind)
            neg = sum(n for item, n in negatives.items() if seen[item] == kind)
            assert neg == 0 if pos == 0 else abs(neg / share - pos) < 0.1 * pos + 10


def test_one_event_users_and_no_users_file(tmp_path):
    write_corpus(tmp_path / "data")
    (tmp_path / "data" / "users.parquet").unlink()
    prepared = prepare(tmp_path / "data", tmp_path / "out", PrepareConfig())
    assert prepared.user_features == {}
    assert open_prepared(tmp_path / "out") == prepared


def test_errors_name_the_place(tmp_path):
    events = write_corpus(tmp_path / "data")
    path = tmp_path / "data" / "events.parquet"
    ids = events["item_id"].to_numpy().copy()
    ids[123] = 7
    pq.write_table(events.set_column(1, "item_id", pa.array(ids)), path)
    with pytest.raises(
        DataError, match=r"events\.parquet: column 'item_id', row 123: item_id 7 is not in .*items\.parq"
    ):
        prepare(tmp_path / "data", tmp_path / "out", PrepareConfig())
    assert not (tmp_path / "out").exists()
    pq.write_table(events.set_column(2, "timestamp", pa.array(-events["timestamp"].to_numpy())), path)
    with pytest.raises(DataError, match="'timestamp', event .* of the user: time of user_id"):
        prepare(tmp_path / "data", tmp_path / "out", PrepareConfig())
    pq.write_table(events.slice(0, 3), path)
    with pytest.raises(DataError, match="no (train|test) targets|is . in all 3 rows"):
        prepare(tmp_path / "data", tmp_path / "out", PrepareConfig())
    with pytest.raises(DataError, match=r"prepared\.json: not found"):
        open_prepared(tmp_path / "out")


@pytest.mark.parametrize("change", [{"cold_fraction": 1.0}, {"test_fraction": 0.0}, {"max_history": 0}])
def test_config_is_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PrepareConfig(**change)
