"""Batches: every target once, the same global batches for any world size, resumable."""

from collections import Counter

import numpy as np
import pytest
import torch

from sidrec_torchrec.data import batches as batches_module
from sidrec_torchrec.data.batches import RankBatch, SequenceBatches
from sidrec_torchrec.data.prepare import PrepareConfig, Prepared, prepare
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
    monkeypatch.setattr(batches_module, "_SHUFFLE_ROWS", 50)
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
