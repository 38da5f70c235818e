"""Alphabets and their text form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sidrec_torchrec.codec.alphabet import (
    MAX_RADIX,
    Levels,
    OneHot,
    Real,
    Signs,
    Ternary,
    format_stages,
    parse_stages,
)

alphabets = st.one_of(
    st.builds(Ternary, st.integers(1, 9)),
    st.builds(Signs, st.integers(1, 15)),
    st.builds(Levels, st.integers(2, 32), st.integers(1, 3)),
    st.builds(Real, st.integers(1, 500)),
    st.builds(OneHot, st.integers(2, MAX_RADIX)),
)


def test_ternary_digits_stand_for_minus_one_zero_and_one():
    assert (Ternary().radix, Ternary().width) == (3, 1)
    assert Ternary().values().tolist() == [[-1.0], [0.0], [1.0]]


def test_one_hot_digit_stands_for_its_row_of_the_identity():
    assert (OneHot(4).radix, OneHot(4).width) == (4, 4)
    assert torch.equal(OneHot(4).values(), torch.eye(4))


def test_the_first_coordinate_is_the_most_significant():
    assert Ternary(2).values().tolist() == [[a, b] for a in (-1, 0, 1) for b in (-1, 0, 1)]
    assert Signs(2).values().tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    assert Levels(4).values().tolist() == [[-1.5], [-0.5], [0.5], [1.5]]
    assert (Levels(5, 3).radix, Levels(5, 3).width) == (125, 3)


def test_a_real_alphabet_has_no_digits():
    assert (Real(4).radix, Real(4).width) == (0, 4)
    with pytest.raises(ValueError, match=r"a 'real\^4' stage has no digits"):
        Real(4).values()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ternary(10), r"at most 32768 values, ternary\^10 has more"),
        (lambda: Ternary(10**9), "has more"),
        (lambda: Signs(16), "has more"),
        (lambda: Levels(MAX_RADIX + 1), "has more"),
        (lambda: Levels(1), "at least 2 levels, got 1"),
        (lambda: Ternary(0), "at least 1 coordinate, got 0"),
        (lambda: Real(0), "at least 1 coordinate, got 0"),
    ],
)
def test_impossible_grids_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("size", [1, 0, -3, MAX_RADIX + 1])
def test_one_hot_of_an_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match=f"2 to {MAX_RADIX} values, got {size}"):
        OneHot(size)


def test_text_is_read_as_written():
    assert parse_stages("onehot:256,ternary*3") == (OneHot(256), Ternary(), Ternary(), Ternary())
    assert parse_stages("levels:8^2,real^4,signs^3*2") == (Levels(8, 2), Real(4), Signs(3), Signs(3))
    assert parse_stages(" ternary , onehot:2*2 ") == (Ternary(), OneHot(2), OneHot(2))


def test_format_joins_equal_neighbours_only():
    stages = (Ternary(), OneHot(8), OneHot(8), OneHot(9), Ternary())
    assert format_stages(stages) == "ternary,onehot:8*2,onehot:9,ternary"


@given(st.lists(alphabets, min_size=1, max_size=12).map(tuple))
def test_text_reads_back(stages):
    assert parse_stages(format_stages(stages)) == stages


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", ""),
        ("ternary,", ""),
        ("binary*3", "binary*3"),
        ("ternary*0", "ternary*0"),
        ("ternary*00", "ternary*00"),
        ("ternary*-1", "ternary*-1"),
        ("onehot", "onehot"),
        ("onehot:2 56", "onehot:2 56"),
        ("ternary,onehot:x", "onehot:x"),
        ("onehot:4^2", "onehot:4^2"),
        ("levels^2", "levels^2"),
        ("ternary^0", "ternary^0"),
        ("ternary*2^2", "ternary*2^2"),
        ("ternary*2*2", "ternary*2*2"),
    ],
)
def test_unreadable_text_is_refused_by_its_part(text, part):
    with pytest.raises(ValueError) as caught:
        parse_stages(text)
    assert f"cannot read '{part}'; write like 'ternary*25'" in str(caught.value)


def test_impossible_size_in_text_is_refused_by_its_part():
    with pytest.raises(ValueError, match="stages 'ternary,onehot:1': 'onehot:1': .* got 1"):
        parse_stages("ternary,onehot:1")
    with pytest.raises(ValueError, match=r"stages 'ternary,signs\^16': 'signs\^16': .* has more"):
        parse_stages("ternary,signs^16")
