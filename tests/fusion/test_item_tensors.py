"""The item stream: the right items, in the right part, in any order asked for, none lost and none twice."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.data.format import Vocabulary
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.fusion import item_tensors
from sidrec_torchrec.fusion.item_tensors import ItemStream

NUM_ITEMS = 1_000
KIND = Vocabulary("kind", ("a", "b"), multi_label=False)  # the file also holds "c"
TAGS = Vocabulary("tags", ("p", "q"), multi_label=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Items 0, 3, 6, ...: the vector of item i is [i + 1, 1]; every fifth has none."""
    folder = tmp_path_factory.mktemp("items")
    ids = [3 * i for i in range(NUM_ITEMS)]
    vectors = [None if i % 5 == 0 else [float(i + 1), 1.0] for i in ids]
    table = {
        "item_id": pa.array(ids, pa.int64()),
        "x": pa.array(vectors, pa.list_(pa.float32())),
        "kind": pa.array([None if i % 7 == 0 else "abc"[i % 3 if i % 2 else 1] for i in range(NUM_ITEMS)]),
        "tags": pa.array([[], ["p"], ["q", "p"], None][i % 4] for i in range(NUM_ITEMS)),
    }
    pq.write_table(pa.table(table), folder / "items.parquet", row_group_size=90)
    return folder


def make_stream(data: Path, **changes) -> ItemStream:
    return ItemStream.open(data, ("x",), {"kind": KIND, "tags": TAGS}, **changes)


def ids_of(stream: ItemStream) -> list[int]:
    return [i for ids, _ in stream.blocks(64) for i in ids.to_pylist()]


def test_blocks_hold_what_the_file_holds(data):
    rows = pq.read_table(data / "items.parquet").to_pylist()
    place = 0
    for ids, items in make_stream(data).blocks(64):
        assert 0 < len(items) == len(ids) <= 64
        for i, item_id in enumerate(ids.to_pylist()):
            row = rows[place + i]
            assert row["item_id"] == item_id
            assert bool(items.present["x"][i]) == (row["x"] is not None)
            assert items.sources["x"][i].tolist() == (row["x"] or [0.0, 0.0])
            known = row["kind"] in KIND.values
            assert bool(items.labelled["kind"][i]) == known
            assert int(items.labels["kind"][i]) == (KIND.values.index(row["kind"]) if known else -1)
            assert bool(items.labelled["tags"][i]) == bool(row["tags"])
            assert items.labels["tags"][i].tolist() == [float(tag in (row["tags"] or ())) for tag in TAGS.values]
        place += len(ids)
    assert place == NUM_ITEMS


def test_parts_split_the_items_that_are_not_excluded(data, tmp_path):
    pq.write_table(pa.table({"item_id": pa.array([300, 0, 9, 10**15], pa.int64())}), tmp_path / "cold.parquet")
    train, validation, everything = (
        ids_of(make_stream(data, exclude=tmp_path / "cold.parquet", validation_fraction=0.2, part=part))
        for part in ("train", "validation", "all")
    )
    assert sorted(train + validation) == everything == sorted(set(range(0, 3_000, 3)) - {300, 0, 9})
    assert 150 < len(validation) < 250
    # an item's part does not depend on which others there are
    whole = ids_of(make_stream(data, validation_fraction=0.2, part="validation"))
    assert validation == [i for i in whole if i in everything]


def test_nothing_is_held_back_by_a_fraction_of_zero(data):
    assert ids_of(make_stream(data, part="validation")) == []
    assert len(ids_of(make_stream(data, part="train"))) == NUM_ITEMS


def test_share_of_an_id_is_splitmix64():
    """Against the published first outputs of SplitMix64 for the seeds 0 and 1234567; in [0, 1), and spread evenly."""
    published = np.array([0xE220A8397B1DCDAF, 6457827717110365317], np.uint64)
    drawn = item_tensors._uniform(np.array([0, 1234567]))
    np.testing.assert_allclose(drawn, published / 2.0**64, rtol=1e-15)
    drawn = item_tensors._uniform(np.arange(-50_000, 50_000))
    assert 0 <= drawn.min() and drawn.max() < 1
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    assert abs(counts - 10_000).max() < 500  # five standard deviations


@pytest.mark.parametrize(("sample_items", "batch_size"), [(32_768, 300), (100, 30), (100, 150)])
def test_shuffled_gives_every_item_once(sample_items, batch_size, data, monkeypatch):
    """In memory, streamed through a buffer of 200 items, and with batches larger than half the buffer."""
    monkeypatch.setattr(item_tensors, "_SAMPLE_ITEMS", sample_items)
    stream = make_stream(data, validation_fraction=0.3, part="train")
    expected = torch.cat([items.sources["x"] for _, items in stream.blocks()])
    drawn = {}
    for seed in (0, 0, 1):
        batches = list(stream.shuffled(batch_size, seed))
        assert {len(batch) for batch in batches[:-1]} == {batch_size} and 0 < len(batches[-1]) <= batch_size
        x_ND = torch.cat([batch.sources["x"] for batch in batches])
        assert sorted(x_ND.tolist()) == sorted(expected.tolist())
        if seed in drawn:
            assert torch.equal(x_ND, drawn[seed])
        drawn[seed] = x_ND
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], expected)


def test_streamed_shuffle_mixes_row_groups(data, monkeypatch):
    """The first batch of a buffered shuffle comes from several row groups, not from the head of the file."""
    monkeypatch.setattr(item_tensors, "_SAMPLE_ITEMS", 100)
    first = next(make_stream(data).shuffled(64, 5))
    values = first.sources["x"][first.present["x"], 0]
    assert len({int((v - 1) // 3 // 90) for v in values}) >= 2
    heads = [next(make_stream(data).shuffled(64, seed)).sources["x"].max().item() for seed in range(6)]
    assert max(heads) > 2_000


def test_sample_is_drawn_from_the_whole_file(data, monkeypatch):
    monkeypatch.setattr(item_tensors, "_SAMPLE_ITEMS", 400)
    sample = make_stream(data).sample(seed=0)
    assert len(sample) == 400
    assert sample.sources["x"].max() > 2_000


def test_select_keeps_rows_together(data):
    (_, items), *_ = make_stream(data).blocks(64)
    chosen = items.select(torch.tensor([5, 2]))
    both = items.select(slice(5, 6)).followed_by(items.select(slice(2, 3)))
    for some in (chosen, both):
        assert some.sources["x"].tolist() == items.sources["x"][[5, 2]].tolist()
        assert some.present["x"].tolist() == items.present["x"][[5, 2]].tolist()
        assert some.labels["kind"].tolist() == items.labels["kind"][[5, 2]].tolist()
        assert some.labelled["tags"].tolist() == items.labelled["tags"][[5, 2]].tolist()


def test_bad_exclude_file_is_named(data, tmp_path):
    with pytest.raises(DataError, match="gone.parquet: no such file"):
        make_stream(data, exclude=tmp_path / "gone.parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="other.parquet: no required column 'item_id'"):
        make_stream(data, exclude=tmp_path / "other.parquet")
