"""Keys found by hash, against a dict."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.codec import directory as module
from sidrec_torchrec.codec.directory import Directory, mix


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), unique=True), st.sampled_from([0, 61, 64]))
def test_keys_are_found_where_they_lie(keys, same_bits):
    """Also where many have one hash: the same first bits, or all."""
    keys_NW = np.array(keys, np.int64).reshape(-1, 2)
    asked_MW = np.array([(a, b) for a in range(-2, 42) for b in range(4)], np.int64)

    def hashed(rows):
        hash_N = mix(*rows.T)
        return np.zeros_like(hash_N) if same_bits == 64 else hash_N >> np.uint64(same_bits)

    directory, order_N = Directory.build(hashed(keys_NW))
    entries_NW = keys_NW[order_N]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", 7)
        place_M = directory.find(hashed(asked_MW), lambda at, rows: (entries_NW[at] == asked_MW[rows]).all(1))
    expected = {tuple(key): place for place, key in enumerate(entries_NW.tolist())}
    assert place_M.tolist() == [expected.get(tuple(key), -1) for key in asked_MW.tolist()]


def test_hashes_spread_whatever_the_numbers():
    for numbers_N in (np.arange(4096), np.arange(4096) << 40, -np.arange(4096)):
        for columns in ((numbers_N,), (numbers_N, np.zeros(4096, np.int64)), (np.zeros(4096, np.int64), numbers_N)):
            counts = np.bincount((mix(*columns) >> np.uint64(56)).astype(np.int64), minlength=256)
            chi2 = np.square(counts - 16).sum() / 16  # of 255 degrees of freedom
            assert 150 < chi2 < 400


def test_the_hash_stays_as_it_is():
    """It is part of the format of files. SplitMix64's first three numbers from the seed 0, as its authors' program prints them."""
    seeds = (np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)
    first = [mix(np.zeros(1, np.int64))[0]]
    assert first == [0xE220A8397B1DCDAF]
    assert len(set(mix(seeds).tolist())) == 3
