"""Packed SIDs against Python's own integers, which never overflow."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.codec.alphabet import OneHot, Ternary, parse_stages
from sidrec_torchrec.codec.packing import NO_SID, SIDSpec, word_names

alphabets = st.one_of(st.just(Ternary()), st.builds(OneHot, st.sampled_from([2, 3, 5, 255, 256, 257, 32768])))
specs = st.lists(alphabets, min_size=1, max_size=60).map(lambda stages: SIDSpec(tuple(stages), "0" * 16))


@st.composite
def specs_and_digits(draw):
    spec = draw(specs)
    row = st.tuples(*(st.integers(0, radix - 1) for radix in spec.radices))
    # the corners, where words overflow if they ever do, always among the rows
    corners = [tuple(radix - 1 for radix in spec.radices), (0,) * spec.num_digits]
    return spec, corners + draw(st.lists(row, max_size=6))


def big_words(radices, digits):
    """The format as its documentation tells it, in unbounded integers."""
    words, word, size = [], 0, 1
    for radix, digit in zip(radices, digits, strict=True):
        if size * radix > 2**63:
            words.append(word)
            word, size = 0, 1
        word, size = word * radix + digit, size * radix
    return [*words, word]


@settings(max_examples=60, deadline=None)
@given(specs_and_digits())
def test_words_are_those_of_unbounded_integers_and_read_back(spec_and_digits):
    spec, digits = spec_and_digits
    words_NW = spec.pack(torch.tensor(digits))
    assert words_NW.dtype == torch.int64
    assert words_NW.tolist() == [big_words(spec.radices, row) for row in digits]
    unpacked_NL = spec.unpack(words_NW)
    assert unpacked_NL.dtype == torch.int16
    assert unpacked_NL.tolist() == [list(row) for row in digits]


@settings(max_examples=60, deadline=None)
@given(specs_and_digits())
def test_words_sort_as_digits_do(spec_and_digits):
    spec, digits = spec_and_digits
    packed = [(words, row) for words, row in zip(spec.pack(torch.tensor(digits)).tolist(), digits, strict=True)]
    assert [row for _, row in sorted(packed)] == sorted(digits)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.just(Ternary()), st.builds(OneHot, st.integers(2, 300))), min_size=1, max_size=7), st.data()
)
def test_prefix_is_the_word_divided_by_the_radices_behind_it(stages, data):
    spec = SIDSpec(tuple(stages), "0" * 16)  # 300^7 < 2^63: one word
    digits = [data.draw(st.integers(0, radix - 1)) for radix in spec.radices]
    k = data.draw(st.integers(1, spec.num_digits))
    word = spec.pack(torch.tensor([digits])).item()
    prefix = SIDSpec(spec.stages[:k], "0" * 16).pack(torch.tensor([digits[:k]])).item()
    assert word // math.prod(spec.radices[k:]) == prefix


@settings(max_examples=60, deadline=None)
@given(specs_and_digits())
def test_chunks_cover_every_digit_once_and_recombine_to_the_words(spec_and_digits):
    spec, digits = spec_and_digits
    joined = spec.layout.join()
    chunks = joined.chunks
    assert sum(joined.counts) == spec.num_digits
    words_NW = spec.pack(torch.tensor(digits))
    for row, words, values in zip(digits, words_NW.tolist(), chunks.values(words_NW).tolist(), strict=True):
        rebuilt, first = [0] * spec.num_words, 0
        for c, (value, count) in enumerate(zip(values, joined.counts, strict=True)):
            own = slice(first, first + count)
            assert [value] == big_words(spec.radices[own], row[own])
            assert chunks.radices[c] == math.prod(spec.radices[own]) and (chunks.radices[c] <= 256 or count == 1)
            rebuilt[chunks.words[c]] += value * chunks.divisors[c]
            first += count
        assert rebuilt == words


@pytest.mark.parametrize(
    ("stages", "digits", "words"),
    [
        # (2 * 3 + 0) * 3 + 1
        ("onehot:4,ternary*2", [2, 0, 1], [19]),
        # 39 trits fill one word: 3^39 = 4052555153018976267 < 2^63 < 3^40
        ("ternary*39", [2] * 39, [4052555153018976266]),
        # the 40th begins the second word
        ("ternary*40", [2] * 39 + [1], [4052555153018976266, 1]),
        # 2^15 * 2^15 * 2^15 * 2^15 * 2^3 = 2^63 exactly: the largest word there is
        ("onehot:32768*4,onehot:8", [32767] * 4 + [7], [9223372036854775807]),
        ("onehot:32768*4,onehot:9", [32767] * 4 + [8], [1152921504606846975, 8]),
        # 200 * 3^20 + (3^19 + ... + 3 + 1)
        ("onehot:256,ternary*20", [200] + [1] * 20, [697356880200 + 1743392200]),
    ],
)
def test_golden_words(stages, digits, words):
    spec = SIDSpec(parse_stages(stages), "0" * 16)
    assert spec.pack(torch.tensor([digits])).tolist() == [words]
    assert spec.unpack(torch.tensor([words])).tolist() == [digits]


def test_sizes():
    spec = SIDSpec(parse_stages("onehot:256,ternary*20"), "f")
    assert spec.radices == (256, *[3] * 20)
    assert (spec.num_digits, spec.num_words) == (21, 1)
    assert spec.bits == pytest.approx(8 + 20 * math.log2(3))
    assert spec.word_limits == (256 * 3**20,)
    assert spec.layout.join().chunks.radices == (256, 243, 243, 243, 243)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_type_packs_without_overflow(dtype):
    spec = SIDSpec(parse_stages("ternary*39"), "f")
    digits_NL = torch.full((1, 39), 2, dtype=dtype)
    assert spec.pack(digits_NL).item() == 3**39 - 1


LAYOUTS = {
    "plain": lambda x: x,
    "read-only, as a column of an Arrow table": lambda x: (x.setflags(write=False), x)[1],
    "column after column": np.asfortranarray,
    "every second row of more": lambda x: np.repeat(x, 2, axis=0)[::2],
    "turned, with negative strides": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
}


@settings(max_examples=60, deadline=None)
@given(
    specs_and_digits(), st.sampled_from(["i2", "i4", "i8", "u2", "u4", "u8"]), *[st.sampled_from(sorted(LAYOUTS))] * 2
)
def test_numpy_arrays_of_any_integers_and_layout_pack_alike(spec_and_digits, dtype, digits_layout, words_layout):
    spec, digits = spec_and_digits
    digits_NL = LAYOUTS[digits_layout](np.array(digits, dtype))
    before = digits_NL.copy()
    words_NW = spec.pack(digits_NL)
    assert isinstance(words_NW, np.ndarray) and words_NW.dtype == np.int64
    assert words_NW.tolist() == [big_words(spec.radices, row) for row in digits]
    words_NW = LAYOUTS[words_layout](words_NW)
    spec.check_words(words_NW)
    unpacked_NL = spec.unpack(words_NW)
    assert isinstance(unpacked_NL, np.ndarray) and unpacked_NL.dtype == np.int16
    np.testing.assert_array_equal(unpacked_NL, before)
    np.testing.assert_array_equal(digits_NL, before)  # the memory is shared: it must not be written to


@pytest.mark.parametrize("stages", ["ternary*3", "ternary*100"])
def test_no_rows_make_no_words(stages):
    spec = SIDSpec(parse_stages(stages), "f")
    words_NW = spec.pack(torch.zeros(0, spec.num_digits, dtype=torch.int16))
    assert words_NW.shape == (0, spec.num_words) and words_NW.dtype == torch.int64
    digits_NL = spec.unpack(words_NW)
    assert digits_NL.shape == (0, spec.num_digits) and digits_NL.dtype == torch.int16


@pytest.mark.parametrize(
    ("digits_NL", "message"),
    [
        (torch.tensor([[0, 1, 2], [0, 3, 0]]), "row 1, digit 1 is 3, expected 0 to 2"),
        (torch.tensor([[0, 1, -1]]), "row 0, digit 2 is -1, expected 0 to 2"),
        (torch.tensor([[4, 0, 0]]), "row 0, digit 0 is 4, expected 0 to 3"),
        (torch.zeros(5, 2, dtype=torch.int64), r"shape \(5, 2\).* expected .*\[N, 3\]"),
        (torch.zeros(3, dtype=torch.int64), r"shape \(3,\).* expected .*\[N, 3\]"),
        (torch.zeros(1, 3), "dtype torch.float32, expected integers"),
    ],
)
def test_digits_that_cannot_be_packed_are_refused(digits_NL, message):
    for digits in (digits_NL, digits_NL.numpy()):
        with pytest.raises(ValueError, match=message):
            SIDSpec(parse_stages("onehot:4,ternary*2"), "f").pack(digits)


@pytest.mark.parametrize(
    ("words_NW", "message"),
    [
        (torch.tensor([[35], [36]]), "row 1, word 0 is 36, no packed SID of onehot:4,ternary\\*2"),
        (torch.tensor([[-2]]), "row 0, word 0 is -2"),
        (torch.zeros(5, 2, dtype=torch.int64), r"shape \(5, 2\) .* expected int64 \[N, 1\]"),
        (torch.zeros(5, dtype=torch.int64), r"shape \(5,\) .* expected int64 \[N, 1\]"),
        (torch.zeros(5, 1, dtype=torch.int32), r"dtype torch.int32, expected int64 \[N, 1\]"),
    ],
)
def test_words_that_no_digits_give_are_refused(words_NW, message):
    spec = SIDSpec(parse_stages("onehot:4,ternary*2"), "f")
    for refuse in (spec.unpack, spec.check_words):
        for words in (words_NW, words_NW.numpy()):
            with pytest.raises(ValueError, match=message):
                refuse(words)


@pytest.mark.parametrize("stages", ["ternary*3", "ternary*100"])
def test_a_sid_may_be_missing_whole_but_not_in_part(stages):
    spec = SIDSpec(parse_stages(stages), "f")
    words_NW = spec.pack(torch.ones(5, spec.num_digits, dtype=torch.int64))
    words_NW[2] = NO_SID
    for words in (words_NW, words_NW.numpy()):
        spec.check_words(words)
        for refuse in (spec.unpack, partial(spec.check_words, may_miss=False)):
            with pytest.raises(ValueError, match="row 2, word 0 is -1, no packed SID of ternary"):
                refuse(words)
    words_NW[3, -1] = NO_SID if spec.num_words > 1 else NO_SID - 1
    with pytest.raises(ValueError, match=f"row 3, word {spec.num_words - 1} is"):
        spec.check_words(words_NW)


def test_spec_without_digits_is_refused():
    with pytest.raises(ValueError, match="at least one digit"):
        SIDSpec((), "f")


def test_alphabet_without_digits_is_refused():
    class Anything(Ternary):
        radix = 0

        def __str__(self) -> str:
            return "anything"

    with pytest.raises(ValueError, match="'anything' has no digits, so it cannot be part of a SID"):
        SIDSpec((Ternary(), Anything()), "f")


@settings(max_examples=30, deadline=None)
@given(specs)
def test_json_reads_back(spec):
    again = SIDSpec.from_json(spec.to_json())
    assert again == spec and hash(again) == hash(spec)


def test_word_names():
    assert word_names("sid", 1) == ["sid"]
    assert word_names("sid", 3) == ["sid_0", "sid_1", "sid_2"]
