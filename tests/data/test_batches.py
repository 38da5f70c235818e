"""Batches: every target once, the same global batches for any world size, resumable."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.data import batch_plan, scatter, sequence_files
from sidrec_torchrec.data.batch_plan import pools
from sidrec_torchrec.data.batches import RankBatch, SequenceBatches
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.sequence_files import open_sequences
from sidrec_torchrec.errors import DataError
from tests.data.test_prepare import rows_of, write_corpus


class TwoFeatures:
    """A key of width 1 and one of width 3, both made from the item's row."""

    keys = ("row", "wide")

    def values(self, item_N):
        item_N = torch.from_numpy(item_N.astype(np.int64))
        return {"row": item_N, "wide": torch.stack([item_N, item_N + 100, item_N + 200], dim=1)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    folder = tmp_path_factory.mktemp("batches")
    write_corpus(folder / "data", users=80)
    return prepare(folder / "data", folder / "out", PrepareConfig(max_history=16, targets_per_row=8))


def make_batches(prepared, split="train", **changes) -> SequenceBatches:
    return SequenceBatches(prepared, split, TwoFeatures(), **{"batch_events": 200} | changes)


def events_of(batch: RankBatch) -> list[tuple]:
    """(item, timestamp) of every target that counts."""
    events, first = [], 0
    item_N = batch.items["row"].values()
    for length, targets, weight in zip(
        batch.lengths_B.tolist(), batch.num_targets_B.tolist(), batch.weight_B.tolist(), strict=True
    ):
        last = range(first + length - targets, first + length)
        events += [(int(item_N[n]), int(batch.timestamp_N[n])) for n in last if weight]
        first += length
    return events


def all_targets(prepared, split):
    rows = rows_of(prepared, split)
    return Counter(
        (int(i), int(t)) for r in rows for i, t in zip(r.item[-r.num_targets :], r.timestamp[-r.num_targets :])
    )


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_target_counts_once(prepared, split, world_size):
    seen = Counter()
    for rank in range(world_size):
        for batch in make_batches(prepared, split, rank=rank, world_size=world_size, shuffle=True):
            seen.update(events_of(batch))
    assert seen == all_targets(prepared, split)


def test_global_batches_do_not_depend_on_the_world_size(prepared):
    whole = list(make_batches(prepared, shuffle=True))
    shares = [list(make_batches(prepared, shuffle=True, rank=r, world_size=2)) for r in range(2)]
    assert len(whole) == len(shares[0]) == len(shares[1])
    for batch, *parts in zip(whole, *shares, strict=True):
        assert Counter(events_of(batch)) == sum((Counter(events_of(part)) for part in parts), Counter())
        assert all(float(part.global_targets) == len(events_of(batch)) for part in parts)


def test_more_processes_than_rows(prepared):
    """A process without a row gets one of weight 0, so that all take the same number of steps."""
    shares = [list(make_batches(prepared, batch_events=20, rank=r, world_size=4)) for r in range(4)]
    assert len({len(share) for share in shares}) == 1
    assert any(not batch.weight_B.any() for share in shares for batch in share)


def test_order_is_drawn_by_seed_and_epoch(prepared):
    def order(seed, epoch):
        data = make_batches(prepared, shuffle=True, seed=seed)
        data.start_at(epoch)
        return [events_of(batch) for batch in data]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


def test_start_in_the_middle(prepared):
    data = make_batches(prepared, shuffle=True)
    data.start_at(1)
    whole = [events_of(batch) for batch in data]
    data.start_at(1, 3)
    assert [events_of(batch) for batch in data] == whole[3:]
    data.start_at(1)
    assert [events_of(batch) for batch in data] == whole


def test_padding_fits_the_budget(prepared, monkeypatch):
    monkeypatch.setattr(batch_plan, "HANDS", 4)  # several pools
    monkeypatch.setattr(batch_plan, "_POOL_ROWS", 50)
    for batch in make_batches(prepared, shuffle=True, batch_events=100):
        assert len(batch.lengths_B) == 1 or len(batch.lengths_B) * int(batch.lengths_B.max()) <= 100


def test_content(prepared):
    rows = {(r.user_id, int(r.timestamp[0]), len(r)): r for r in rows_of(prepared, "test")}
    by_place = {(int(r.timestamp[0]), len(r)): r for r in rows.values()}
    for batch in make_batches(prepared, "test"):
        ends = batch.lengths_B.cumsum(0)
        for b, (end, length) in enumerate(zip(ends.tolist(), batch.lengths_B.tolist(), strict=True)):
            part = slice(end - length, end)
            row = by_place[int(batch.timestamp_N[part.start]), length]
            np.testing.assert_array_equal(batch.items["row"].values()[part], row.item)
            wide_N3 = batch.items["wide"].values().view(-1, 3)[part]
            np.testing.assert_array_equal(wide_N3, row.item[:, None] + [0, 100, 200])
            assert int(batch.items["wide"].lengths()[b]) == 3 * length
            for name in ("action", "order", "visible"):
                np.testing.assert_array_equal(getattr(batch, f"{name}_N")[part], getattr(row, name))
            np.testing.assert_array_equal(batch.item_N[part], row.item)
            assert int(batch.users["kind"].values()[b]) == row.user_codes[0]


def test_moves_whole(prepared):
    batch = next(iter(make_batches(prepared)))
    moved = batch.to(torch.device("cpu"))
    assert events_of(moved) == events_of(batch)


@pytest.fixture(scope="module")
def long_log(tmp_path_factory) -> Prepared:
    """Rows of many lengths, several deals, two parts."""
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    lengths_U = rng.integers(2, 120, 3000)
    user_N = np.repeat(np.arange(len(lengths_U)), lengths_U)
    events = {
        "user_id": user_N,
        "item_id": rng.integers(0, 50, len(user_N)),
        "timestamp": np.arange(len(user_N)),
        "label": rng.integers(0, 2, len(user_N)).astype(np.int8),
    }
    pq.write_table(pa.table({"item_id": np.arange(50)}), folder / "items.parquet")
    pq.write_table(pa.table(events), folder / "events.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter, "EVENTS_PER_BUCKET", 90_000)
        patch.setattr(scatter, "_LEAST_PER_BUCKET", 90_000)
        patch.setattr(sequence_files, "_DEAL_EVENTS", 30_000)
        return prepare(folder, folder / "out", PrepareConfig(max_history=64, targets_per_row=32, cold_fraction=0.0))


def planned(prepared: Prepared, batch_events: int, shuffle: bool = True):
    """Of each batch, the pool it is of and its plan."""
    with open_sequences(prepared.path("train")) as files:
        rng = np.random.default_rng(0) if shuffle else None
        return [(pool, batch) for pool in pools(files, rng) for batch in pool.batches(batch_events, rng)]


def test_a_deal_gives_every_group_as_many_rows_of_the_same_lengths(long_log):
    with open_sequences(long_log.path("train")) as files:
        looks = [files.look(group) for group in range(files.num_groups)]
        assert files.num_groups >= 4 * sequence_files.HANDS
        for group in (0, 70, files.num_groups - 1):  # the index says what the rows are
            rows, look = files.rows(group), looks[group]
            assert [len(row) for row in rows] == look.events_R.tolist()
            assert [row.num_scored() for row in rows] == look.targets_R.tolist()
            np.testing.assert_array_equal(np.stack([row.label_weights(1) for row in rows]), look.labels_RK)
    deal = looks[: sequence_files.HANDS]
    counts, events = [len(look.events_R) for look in deal], [int(look.events_R.sum()) for look in deal]
    assert max(counts) - min(counts) <= 1
    assert max(events) <= 1.25 * min(events)  # of 5 or 6 rows each


def lengths_of(pool, batch) -> np.ndarray:
    return np.array([pool.looks[p].events_R[r] for p, r in zip(batch.place_B, batch.row_B, strict=True)])


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_processes_have_as_many_events(long_log, world_size):
    """In a batch as in all: a process that has more keeps the others waiting."""
    rng = np.random.default_rng(0)
    dealt, drawn = [], []  # by batch, events of each process: as they are, and if rows were drawn
    for pool, batch in planned(long_log, batch_events=8 * 96 * world_size):
        owner_B = np.array([next(r for r in range(world_size) if p in pool.own(r, world_size)) for p in batch.place_B])
        for events, its_B in ((dealt, owner_B), (drawn, rng.integers(world_size, size=len(owner_B)))):
            events.append(np.bincount(its_B, weights=lengths_of(pool, batch), minlength=world_size))
    excess, by_chance = (np.mean([e.max() / e.mean() - 1 for e in events]) for events in (dealt, drawn))
    assert excess <= by_chance / 2
    total = np.sum(dealt, axis=0)
    assert total.max() <= 1.15 * total.mean()  # groups of the last deal are smaller


def test_batches_are_of_like_length(long_log):
    """About as much so as if all rows of the split were sorted."""
    batches = [lengths_of(*its) for its in planned(long_log, batch_events=2000)]
    lengths_R = np.concatenate(batches)
    jittered = np.argsort(lengths_R + np.random.default_rng(0).uniform(0, 16, len(lengths_R)))
    best = [lengths_R[cut] for cut in batch_plan.cut_by_length(lengths_R, 2000, jittered)]
    padded, least = (sum(its.max() * len(its) for its in each) for each in (batches, best))
    assert padded <= 1.05 * least


def test_a_process_reads_its_own_groups(long_log, monkeypatch):
    read: list[int] = []
    table = sequence_files.SequenceFiles.table

    def counted(files, group, columns=None):
        read.append(group)
        return table(files, group, columns)

    monkeypatch.setattr(sequence_files.SequenceFiles, "table", counted)
    shares = []
    for rank in range(4):
        read.clear()
        for _ in make_batches(long_log, batch_events=4000, rank=rank, world_size=4, shuffle=True):
            pass
        assert len(read) == len(set(read))
        shares.append(set(read))
    groups = set().union(*shares)
    assert sum(map(len, shares)) == len(groups)  # each group by one process
    assert max(map(len, shares)) <= 1.1 * len(groups) / 4


def test_parts_of_another_run_are_refused(long_log, tmp_path):
    for name in ("part-00000.parquet", "_index.arrow"):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes((long_log.path("train") / name).read_bytes())
    with open_sequences(tmp_path / "train") as files:
        assert len(files.rows(3)) == len(files.look(3).events_R)
    table = pq.read_table(tmp_path / "train" / "part-00000.parquet")
    pq.write_table(table, tmp_path / "train" / "part-00000.parquet", row_group_size=5)
    with (
        pytest.raises(
            DataError, match=r"train: .*part-00000.parquet: not the part that the index is of; prepare again"
        ),
        open_sequences(tmp_path / "train") as files,
    ):
        files.rows(3)
