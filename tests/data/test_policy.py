"""Policies: a log with faults, read by a policy, gives what the mended log gives; and the faults are counted."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.batches import SequenceBatches
from sidrec_torchrec.data.format import open_events, open_items, validate
from sidrec_torchrec.data.histories import Histories
from sidrec_torchrec.data.items import ItemRows
from sidrec_torchrec.data.policy import EventPolicy, repeats
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.sequences import from_table
from sidrec_torchrec.data.splits import SPLITS
from sidrec_torchrec.errors import DataError

N, USERS, LENGTH = 40, 30, 20
T0 = 1_700_000_000


def log(rng: np.random.Generator) -> dict[str, np.ndarray]:
    time = T0 + np.cumsum(rng.integers(1, 100_000, (USERS, LENGTH)), 1)
    return {
        "user_id": np.repeat(np.arange(USERS), LENGTH),
        "item_id": rng.integers(0, N, USERS * LENGTH),
        "timestamp": time.ravel(),
        "label": rng.integers(0, 2, USERS * LENGTH).astype(np.int8),
    }


def write(folder: Path, events: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"item_id": np.arange(N), "tag": np.arange(N) % 3}), folder / "items.parquet")
    pq.write_table(pa.table(events), folder / "events.parquet")
    return folder


def prepared(data: Path, **policy) -> Prepared:
    config = PrepareConfig(policy=EventPolicy(**policy), max_history=8, targets_per_row=6)
    return prepare(data, data / "prepared", config)


def rows_of(done: Prepared) -> dict[str, list[dict]]:
    names = ("user_id", "item", "action", "timestamp", "order", "visible")
    return {
        split: [
            {name: np.asarray(getattr(row, name)).tolist() for name in names}
            for row in from_table(pq.read_table(done.path(split)))
        ]
        for split in SPLITS
    }


def counted(done: Prepared) -> dict[str, int]:
    return {name: met["count"] for name, met in done.met.items() if met["count"]}


def test_dropping_is_as_if_the_events_were_not_there(tmp_path):
    events = log(np.random.default_rng(0))
    gone = np.random.default_rng(1).random(USERS * LENGTH) < 0.1
    faulty = events | {"item_id": np.where(gone, events["item_id"] + 1000, events["item_id"])}
    with pytest.raises(
        DataError, match=rf"row {np.argmax(gone)}: item_id \d+ is not in .*--unknown-items drop, or keep"
    ):
        prepared(write(tmp_path / "a", faulty))
    done = prepared(write(tmp_path / "b", faulty), unknown_items="drop")
    assert counted(done) == {"unknown_items": gone.sum()}
    mended = prepared(write(tmp_path / "c", {name: column[~gone] for name, column in events.items()}))
    assert rows_of(done) == rows_of(mended)
    assert done.counts == mended.counts
    assert (done.seen() == mended.seen()).all()
    with pytest.raises(DataError, match=f"{gone.sum()} of 600 events name items that are not there: .*--unknown-items"):
        validate(tmp_path / "a")
    assert (
        validate(tmp_path / "a", policy=EventPolicy(unknown_items="drop"))["met"]["unknown_items"]["count"]
        == gone.sum()
    )


def test_kept_events_are_history_without_an_item_and_never_targets(tmp_path):
    events = log(np.random.default_rng(0))
    gone = np.random.default_rng(1).random(USERS * LENGTH) < 0.2
    gone[:LENGTH] = True  # nothing of the first user is a target
    faulty = events | {"item_id": np.where(gone, events["item_id"] + 1000, events["item_id"])}
    done = prepared(write(tmp_path / "b", faulty), unknown_items="keep")
    assert counted(done) == {"unknown_items": gone.sum()}
    test = from_table(pq.read_table(done.path("test")))
    expected = {
        user: (~gone[LENGTH * user + 16 : LENGTH * (user + 1)]).sum() for user in range(USERS)
    }  # of the last fifth
    scored = {user: 0 for user in range(USERS)}
    for row in test:
        scored[row.user_id] += row.num_scored()
        places = [np.flatnonzero(events["timestamp"][events["user_id"] == row.user_id] == t)[0] for t in row.timestamp]
        of_user = gone[LENGTH * row.user_id :][:LENGTH]
        np.testing.assert_array_equal(row.item < 0, of_user[places])
    assert scored == expected
    assert 0 not in {row.user_id for row in test}
    assert done.counts["test"]["targets"] == sum(expected.values())
    assert done.training_events().sum() == done.counts["train"]["targets"]
    for batch in SequenceBatches(done, "test", _NoFeatures(), batch_events=64):
        assert int(batch.global_targets) == _targets(batch)


class _NoFeatures:
    keys = ()

    def values(self, item_N):
        return {}


def _targets(batch) -> int:
    ends = batch.lengths_B.cumsum(0)
    return sum(
        int(batch.has_item_N[end - count : end].sum()) for end, count in zip(ends, batch.num_targets_B, strict=True)
    )


def test_negatives_are_drawn_for_events_with_an_item_alone(tmp_path):
    events = log(np.random.default_rng(0))
    del events["label"]
    gone = np.random.default_rng(1).random(USERS * LENGTH) < 0.2
    faulty = events | {"item_id": np.where(gone, events["item_id"] + 1000, events["item_id"])}
    done = prepared(write(tmp_path / "b", faulty), unknown_items="keep")
    for split in SPLITS:
        for row in from_table(pq.read_table(done.path(split))):
            assert row.visible[row.item < 0].all()
            for order in row.order[row.item < 0]:
                assert (row.order == order).sum() == 1
    assert done.counts["test"]["targets"] > 0


def test_sorting_is_as_if_the_log_were_sorted(tmp_path):
    events = log(np.random.default_rng(0))
    shuffled = np.random.default_rng(2).permutation(USERS * LENGTH)
    mixed = {name: column[shuffled] for name, column in events.items()}
    with pytest.raises(DataError, match="time of user_id .* goes back from .*--sort"):
        prepared(write(tmp_path / "a", mixed))
    done = prepared(write(tmp_path / "b", mixed), sort=True)
    user, time = mixed["user_id"], mixed["timestamp"]
    unsorted = sum((np.diff(time[user == u]) < 0).sum() for u in range(USERS))
    assert counted(done) == {"unsorted": unsorted}
    assert validate(tmp_path / "b", policy=EventPolicy(sort=True))["met"]["unsorted"]["count"] == unsorted
    assert rows_of(done) == rows_of(prepared(write(tmp_path / "c", events)))


def test_duplicates_are_counted_and_dropped(tmp_path):
    events = log(np.random.default_rng(0))
    again = np.sort(np.append(np.arange(USERS * LENGTH), [3, 3, 77, 400]))
    twice = {name: column[again] for name, column in events.items()}
    kept = prepared(write(tmp_path / "a", twice))
    assert counted(kept) == {"duplicates": 4}
    assert sum(len(r["item"]) for r in rows_of(kept)["test"]) > 0
    done = prepared(write(tmp_path / "b", twice), drop_duplicates=True)
    assert counted(done) == {"duplicates": 4}
    assert rows_of(done) == rows_of(prepared(write(tmp_path / "c", events)))


def test_short_users_are_left_out(tmp_path):
    events = log(np.random.default_rng(0))
    keep = ~((events["user_id"] < 5) & (np.arange(USERS * LENGTH) % LENGTH >= 7))
    done = prepared(write(tmp_path / "a", {n: c[keep] for n, c in events.items()}), min_events=8)
    assert counted(done) == {"short_users": 5}
    longer = events["user_id"] >= 5
    assert rows_of(done) == rows_of(prepared(write(tmp_path / "b", {n: c[longer] for n, c in events.items()})))


def test_histories_follow_the_policy(tmp_path):
    """Those of predictions are those of training."""
    events = log(np.random.default_rng(0))
    order = np.random.default_rng(2).permutation(USERS * LENGTH)
    faulty = {name: column[order] for name, column in events.items()}
    gone = np.random.default_rng(1).random(USERS * LENGTH) < 0.1
    faulty["item_id"] = np.where(gone, 1000, faulty["item_id"])
    data = write(tmp_path / "a", faulty)
    rows = ItemRows(open_items(data))
    log_of = {
        policy: Histories.read(open_events(data), rows, EventPolicy(unknown_items=policy, sort=True))
        for policy in ("drop", "keep")
    }
    for policy, histories in log_of.items():
        for user in range(USERS):
            of_user = np.flatnonzero((faulty["user_id"] == user) & ((policy == "keep") | ~gone))
            of_user = of_user[np.argsort(faulty["timestamp"][of_user])]
            number = histories.users.ids.to_pylist().index(user)
            own = slice(histories.first_U1[number], histories.first_U1[number + 1])
            assert histories.row_N[own].tolist() == of_user.tolist()
            np.testing.assert_array_equal(histories.item_N[own] < 0, gone[of_user])


def test_repeats_against_a_set():
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, 3, 200) for _ in range(3)]
    met, expected = set(), []
    for row in zip(*(c.tolist() for c in columns), strict=True):
        expected.append(row in met)
        met.add(row)
    assert repeats(*columns).tolist() == expected
    assert repeats(np.zeros(0), np.zeros(0)).tolist() == []


@pytest.mark.parametrize("kind", ["string", "binary"])
def test_text_ids_give_the_sequences_that_numbers_give(kind, tmp_path):
    """All but the draws, which are of the id itself."""
    events = log(np.random.default_rng(0))

    def named(values):
        return pa.array([f"{v:06d}".encode() if kind == "binary" else f"{v:06d}" for v in values])

    folder = tmp_path / "named"
    folder.mkdir()
    pq.write_table(pa.table({"item_id": named(range(N)), "tag": np.arange(N) % 3}), folder / "items.parquet")
    table = pa.table(events | {"item_id": named(events["item_id"]), "user_id": named(events["user_id"])})
    pq.write_table(table, folder / "events.parquet")
    users = pa.table({"user_id": named(range(USERS - 3)), "age": np.arange(USERS - 3) % 4})
    pq.write_table(users, folder / "users.parquet")
    done = prepared(folder)
    plain = write(tmp_path / "plain", events)
    pq.write_table(
        pa.table({"user_id": np.arange(USERS - 3), "age": np.arange(USERS - 3) % 4}), plain / "users.parquet"
    )
    numbers = prepared(plain)
    first = {row["user_id"]: row for row in rows_of(numbers)["test"]}
    for row in rows_of(done)["test"]:
        assert row | {"user_id": int(row["user_id"])} == first[int(row["user_id"])]
    codes = {int(r.user_id): r.user_codes.tolist() for r in from_table(pq.read_table(done.path("test")))}
    assert codes == {u: [u % 4 + 1 if u < USERS - 3 else 0] for u in range(USERS)}
    cold = pq.read_table(done.folder / "cold_items.parquet")["item_id"].to_pylist()
    assert [int(c) for c in cold] == pq.read_table(numbers.folder / "cold_items.parquet")["item_id"].to_pylist()
