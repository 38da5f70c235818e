"""Drift against pairs counted one by one, definitions in plain Python, and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.drift import adjusted_rand, digit_drift, jensen_shannon, prefix_drift
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.codec.report import DigitUse


def make(stages: str, n: int = 300, seed: int = 0, fingerprint: str = "f") -> tuple[SIDSpec, np.ndarray]:
    """A spec and random digits [n, L]."""
    spec = SIDSpec(parse_stages(stages), fingerprint)
    return spec, np.random.default_rng(seed).integers(0, spec.radices, (n, spec.num_digits))


def use_of(spec: SIDSpec, digits_NL: np.ndarray) -> DigitUse:
    use = DigitUse(spec)
    use.update(digits_NL)
    return use


def rand_by_pairs(a: list[int], b: list[int]) -> float | None:
    """Hubert & Arabie's index from every pair of items."""
    pairs = [(a[i] == a[j], b[i] == b[j]) for i, j in itertools.combinations(range(len(a)), 2)]
    both, in_a, in_b = (sum(f(p) for p in pairs) for f in (all, lambda p: p[0], lambda p: p[1]))
    if in_a == in_b == 0:
        return None
    chance = in_a * in_b / len(pairs)
    most = (in_a + in_b) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=14))
def test_adjusted_rand_counts_pairs(labels):
    a, b = map(list, zip(*labels, strict=True))
    expected = rand_by_pairs(a, b)
    assert adjusted_rand(np.array(a), np.array(b)) == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_adjusted_rand_is_0_by_chance():
    rng = np.random.default_rng(0)
    values = [adjusted_rand(rng.integers(0, 8, 500), rng.integers(0, 5, 500)) for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(200)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=6))
def test_jensen_shannon_is_the_mean_divergence_from_the_middle(counts):
    p, q = (np.array(c, np.int64) for c in zip(*counts, strict=True))
    if not p.sum() or not q.sum():
        return
    p_share, q_share = p / p.sum(), q / q.sum()
    middle = (p_share + q_share) / 2
    expected = sum(s * math.log2(s / m) / 2 for x in (p_share, q_share) for s, m in zip(x, middle, strict=True) if s)
    assert jensen_shannon(p, q) == pytest.approx(expected, abs=1e-12)
    assert 0 <= jensen_shannon(p, q) <= 1 + 1e-12


def test_divergence_of_distributions_that_never_meet_is_1():
    assert jensen_shannon(np.array([3, 4, 0]), np.array([0, 0, 9])) == pytest.approx(1)


def test_chance_is_the_divergence_of_two_samples_of_one_distribution():
    spec, _ = make("onehot:20")
    rng, share = np.random.default_rng(0), np.arange(1, 21) / 210
    drifts = []
    for _ in range(300):
        samples = (rng.choice(20, (n, 1), p=share) for n in (2_000, 900))
        drifts += digit_drift(*(use_of(spec, digits_NL) for digits_NL in samples))
    assert np.mean([d.divergence for d in drifts]) == pytest.approx(np.mean([d.chance for d in drifts]), rel=0.05)


def test_digits_that_move_stand_out():
    spec, old_NL = make("ternary*3,onehot:4", n=5_000)
    _, new_NL = make("ternary*3,onehot:4", n=5_000, seed=1)
    new_NL[:, 1] = np.where(new_NL[:, 1] == 2, 0, new_NL[:, 1])  # value 2 gives way to 0
    old_NL[:, 3] = np.minimum(old_NL[:, 3], 2)  # value 3 is new
    drift = digit_drift(use_of(spec, old_NL), use_of(spec, new_NL))
    assert [d.divergence > 10 * d.chance for d in drift] == [False, True, False, True]
    assert [d.no_longer_used for d in drift] == [0, 1, 0, 0]
    assert [d.newly_used for d in drift] == [0, 0, 0, 1]
    for j, d in enumerate(drift):
        for digits_NL, bits in ((old_NL, d.old_entropy), (new_NL, d.new_entropy)):
            share = np.unique(digits_NL[:, j], return_counts=True)[1] / 5_000
            assert bits == pytest.approx(-(share * np.log2(share)).sum())


@pytest.mark.parametrize("block", [7, 1 << 16])
@pytest.mark.parametrize("stages", ["onehot:4,ternary*3", "ternary*50"])
def test_changed_is_the_share_of_items_with_another_prefix(stages, block, monkeypatch):
    monkeypatch.setattr("sidrec_torchrec.codec.drift._BLOCK", block)
    spec, old_NL = make(stages)
    new_NL = np.where(np.random.default_rng(1).random(old_NL.shape) < 0.1, (old_NL + 1) % spec.radices, old_NL)
    drift = prefix_drift(spec, spec.pack(old_NL), spec, spec.pack(new_NL))
    assert [(d.old_digits, d.new_digits) for d in drift] == [(k, k) for k in range(1, spec.num_digits + 1)]
    for k, d in enumerate(drift, start=1):
        assert d.changed == pytest.approx((old_NL[:, :k] != new_NL[:, :k]).any(1).mean())
        assert d.bits == pytest.approx(sum(map(math.log2, spec.radices[:k])))
    labels = [np.unique(digits_NL[:, :2], axis=0, return_inverse=True)[1].tolist() for digits_NL in (old_NL, new_NL)]
    assert drift[1].agreement == pytest.approx(rand_by_pairs(*labels))


def test_a_codec_whose_digits_are_renamed_agrees_with_itself():
    spec, old_NL = make("onehot:8*2")
    drift = prefix_drift(spec, spec.pack(old_NL), spec, spec.pack((old_NL + 3) % 8))
    assert [(d.changed, d.agreement) for d in drift] == [(1.0, 1.0)] * 2


def test_other_stages_are_compared_at_like_bits_and_without_names():
    old, old_NL = make("ternary,onehot:27,ternary*3")
    new, new_NL = make("ternary*7")
    new_NL[:, :4] = np.stack([old_NL[:, 0], old_NL[:, 1] // 9, old_NL[:, 1] // 3 % 3, old_NL[:, 1] % 3], axis=1)
    drift = prefix_drift(old, old.pack(old_NL), new, new.pack(new_NL))
    assert [(d.old_digits, d.new_digits) for d in drift] == [(1, 1), (2, 4), (3, 5), (4, 6), (5, 7)]
    assert [d.changed for d in drift] == [0.0, None, None, None, None]
    assert [d.agreement for d in drift[:2]] == [1.0, 1.0]  # the same groups, one digit of 27 written as three trits
    assert abs(drift[4].agreement or 0) < 0.2


def test_groups_of_one_say_nothing():
    spec = SIDSpec(parse_stages("onehot:1000"), "f")
    words_NW = spec.pack(np.arange(50)[:, None])
    (drift,) = prefix_drift(spec, words_NW, spec, words_NW)
    assert (drift.changed, drift.agreement) == (0.0, None)


def test_sids_of_other_items_are_refused():
    spec, digits_NL = make("ternary*3")
    words_NW = spec.pack(digits_NL)
    for rows in (0, 4):
        with pytest.raises(ValueError, match=f"got {rows} old and {min(rows, 3)} new ones"):
            prefix_drift(spec, words_NW[:rows], spec, words_NW[: min(rows, 3)])
