"""How SIDs are used, against counting in plain Python."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.codec.report import DigitUse, PrefixGroups, entropy


@st.composite
def specs_and_digits(draw):
    """Few distinct digits, so that SIDs collide at every depth; up to three words."""
    stages = draw(st.sampled_from(["ternary*4", "onehot:5,ternary*3", "onehot:32768*6", "ternary*90"]))
    spec = SIDSpec(parse_stages(stages), "f")
    row = st.tuples(*(st.integers(0, 1).map(lambda d, top=radix - 1: d * top) for radix in spec.radices))
    some = draw(st.lists(row, min_size=1, max_size=4))
    return spec, draw(st.lists(st.sampled_from(some), max_size=12))


def packed(spec: SIDSpec, digits: list[tuple[int, ...]]) -> np.ndarray:
    return spec.pack(np.array(digits, np.int64).reshape(len(digits), spec.num_digits))


def bits(counts) -> float:
    total = sum(counts)
    return sum(-c / total * math.log2(c / total) for c in counts if c)


@settings(max_examples=60, deadline=None)
@given(specs_and_digits(), st.integers(0, 12))
def test_digit_use(spec_and_digits, cut):
    spec, digits = spec_and_digits
    use = DigitUse(spec)
    for part in (digits[:cut], digits[cut:]):
        use.update(np.array(part, int).reshape(-1, spec.num_digits))
    unused, entropies = use.unused(), use.entropy()
    for j, radix in enumerate(spec.radices):
        counts = Counter(row[j] for row in digits)
        assert {v: int(use.counts[j][v]) for v in np.flatnonzero(use.counts[j])} == counts
        assert unused[j] == radix - len(counts)
        assert entropies[j] == pytest.approx(bits(counts.values()), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(specs_and_digits())
def test_prefix_groups(spec_and_digits):
    spec, digits = spec_and_digits
    groups = PrefixGroups.of(spec, packed(spec, digits))
    for depth in (*range(min(5, spec.num_digits)), spec.num_digits):
        prefixes = [row[:depth] for row in digits]
        counts = Counter(prefixes)
        use = groups.use(depth)
        assert (use.digits, use.distinct, use.largest) == (depth, len(counts), max(counts.values(), default=0))
        assert use.shared == sum(c for c in counts.values() if c > 1)
        assert use.entropy == pytest.approx(bits(counts.values()), abs=1e-12)
        assert groups.sizes(depth).tolist() == [counts[prefix] for prefix in sorted(counts)]
        assert groups.labels(depth).tolist() == [sorted(counts).index(prefix) for prefix in prefixes]
    assert groups.ranks().tolist() == [digits[:n].count(row) for n, row in enumerate(digits)]
    assert [use["digits"] for use in groups.result()] == list(range(1, spec.num_digits + 1))


def test_groups_beyond_one_block(monkeypatch):
    monkeypatch.setattr("sidrec_torchrec.codec.report._BLOCK", 7)
    spec = SIDSpec(parse_stages("onehot:5,ternary*3"), "f")
    digits_NL = np.random.default_rng(0).integers(0, spec.radices, (500, 4))
    groups = PrefixGroups.of(spec, spec.pack(digits_NL))
    for depth in range(1, 5):
        _, label_N, sizes_G = np.unique(digits_NL[:, :depth], axis=0, return_inverse=True, return_counts=True)
        np.testing.assert_array_equal(groups.labels(depth), label_N.reshape(-1))
        np.testing.assert_array_equal(groups.sizes(depth), sizes_G)


def test_entropy():
    assert entropy(np.array([8, 8, 8, 8])) == pytest.approx(2)
    assert math.copysign(1, entropy(np.array([0, 5]))) == 1  # 0, not -0
    assert entropy(np.array([0, 0])) == 0


def test_idle_digits_are_those_that_say_next_to_nothing():
    spec = SIDSpec(parse_stages("ternary*3,onehot:8"), "")
    use = DigitUse(spec)
    digits_NL = np.zeros((1000, 4), dtype=np.int64)
    digits_NL[:, 0] = np.arange(1000) % 3  # all of its bits
    digits_NL[:5, 1] = 1  # 0.05 bits of 1.58
    digits_NL[:, 2] = np.arange(1000) < 60  # 0.33 bits
    digits_NL[:40, 3] = 7  # 0.24 bits of 3
    use.update(digits_NL)
    assert use.idle() == [1, 3]
