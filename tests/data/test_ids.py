"""Ids of every type: found exactly, numbered, hashed, and as seeds."""

import uuid

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.data import ids
from sidrec_torchrec.data.ids import IdIndex, as_ids, canonical, check_unique, keys, seed_of, shown
from sidrec_torchrec.errors import DataError

UUIDS = [uuid.UUID(int=10**30 + i).bytes for i in range(4)]


@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        (pa.array([3, -1], pa.int8()), pa.int64(), [3, -1]),
        (pa.array([3, 1], pa.uint32()), pa.int64(), [3, 1]),
        (pa.array([2**64 - 1, 1], pa.uint64()), pa.uint64(), [2**64 - 1, 1]),
        (pa.array(["b", ""]), pa.large_string(), ["b", ""]),
        (pa.array(["b", "a"], pa.string_view()), pa.large_string(), ["b", "a"]),
        (pa.array(["b", "a", "b"]).dictionary_encode(), pa.large_string(), ["b", "a", "b"]),
        (pa.array([7, 5, 7], pa.int16()).dictionary_encode(), pa.int64(), [7, 5, 7]),
        (pa.array([b"\xff", b""]), pa.large_binary(), [b"\xff", b""]),
        (pa.array(UUIDS, pa.binary(16)), pa.large_binary(), UUIDS),
        (pa.array(UUIDS, pa.uuid()), pa.large_binary(), UUIDS),
        (pa.chunked_array([["a"], ["b", "c"]]), pa.large_string(), ["a", "b", "c"]),
    ],
)
def test_every_type_is_made_canonical(column, kind, values):
    assert canonical(column).type == kind
    assert canonical(column).to_pylist() == values
    assert IdIndex(canonical(column)).find(canonical(column)).tolist() == [values.index(v) for v in values]


@pytest.mark.parametrize("kind", [pa.float64(), pa.bool_(), pa.list_(pa.int64()), pa.timestamp("s")])
def test_what_cannot_be_an_id(kind):
    assert ids.id_type(kind) is None
    with pytest.raises(TypeError, match="cannot hold ids"):
        canonical(pa.array([], kind))


texts = st.lists(st.text(max_size=20) | st.sampled_from(["a", "a\0", "\0", "abcdefgh", "abcdefgh\0"]), max_size=30)
numbers = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5), max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.tuples(texts, texts), st.tuples(numbers, numbers)))
def test_places_are_those_of_a_dict(both):
    """Static and growing, against Python's own lookup."""
    kept, asked = both
    kind = pa.large_string() if any(isinstance(v, str) for v in kept + asked) else pa.int64()
    kept_ids, asked_ids = pa.array(kept, kind), pa.array(asked, kind)
    first = {}
    for place, value in enumerate(kept):
        first.setdefault(value, place)
    assert IdIndex(kept_ids).find(asked_ids).tolist() == [first.get(v, -1) for v in asked]
    growing, numbered = IdIndex(), {}
    for part in (kept, asked, kept):
        assert growing.add(pa.array(part, kind)).tolist() == [numbered.setdefault(v, len(numbered)) for v in part]
    assert growing.ids.to_pylist() == list(numbered)


def test_ids_whose_hashes_are_equal_are_told_apart(monkeypatch):
    monkeypatch.setattr(ids, "_hash_bytes", lambda texts: np.full(len(texts), 7, np.uint64))
    index = IdIndex(as_ids(["a", "b", "c", "b"]))
    assert index.find(as_ids(["c", "x", "b", "a"])).tolist() == [2, -1, 1, 0]
    growing = IdIndex()
    assert growing.add(as_ids(["a", "b"])).tolist() == [0, 1]
    assert growing.add(as_ids(["b", "c", "a", "d"])).tolist() == [1, 2, 0, 3]
    with pytest.raises(DataError, match="row 3: item_id 'b' is already in row 1; ids must be unique \\(1 repeats"):
        check_unique(as_ids(["a", "b", "c", "b"]), "row {}".format, "item_id")


def test_numbers_and_text_do_not_mix():
    with pytest.raises(TypeError, match="ids are large_string here and int64 there"):
        IdIndex(as_ids([1, 2])).find(as_ids(["1"]))
    assert IdIndex(as_ids(["ab"])).find(as_ids([b"ab"])).tolist() == [0]
    unsigned = pa.array([2**64 - 1, 5], pa.uint64())
    assert IdIndex(unsigned).find(as_ids([-1, 5])).tolist() == [-1, 1]  # not by their bits
    assert IdIndex(as_ids([-1, 5])).find(unsigned).tolist() == [-1, 1]


def test_nulls_are_not_found():
    assert IdIndex(as_ids([0, 1])).find(pa.array([None, 1], pa.int64())).tolist() == [-1, 1]
    assert IdIndex(as_ids(["", "b"])).find(pa.array([None, "", "b"], pa.large_string())).tolist() == [-1, 0, 1]


def test_keys_of_text_are_spread():
    """10^5 ids that differ in a digit: no two alike, and each bit set in half of them."""
    keys_N = keys(as_ids([f"user-{i:07d}" for i in range(100_000)])).view(np.uint64)
    assert len(np.unique(keys_N)) == len(keys_N)
    share_64 = ((keys_N[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(0)
    assert np.abs(share_64[30:] - 0.5).max() < 0.02  # those that buckets are chosen by
    sliced = as_ids([f"user-{i:07d}" for i in range(9)]).slice(3, 4)
    np.testing.assert_array_equal(keys(sliced).view(np.uint64), keys_N[3:7])


def test_seeds_and_words():
    assert seed_of(-1) == 2**63 - 1
    assert seed_of("a") == seed_of(b"a") != seed_of("b")
    assert 0 <= seed_of("a") < 2**63
    assert [shown(as_ids(v), 0) for v in ([5], ["x"], [b"\xff"])] == ["5", "'x'", "b'\\xff'"]
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    assert shown(canonical(broken), 0) == "b'\\xff'"
