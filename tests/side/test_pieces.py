"""Pieces against byte-pair encoding written out in full, and their table against a sum of embeddings."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import OneHot, Ternary
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.side.pieces import NOTHING, Pieces, PieceVectors


def symbols(radices: list[int], digits: list[int]) -> list[int]:
    return [1 + sum(radices[:place]) + digit for place, digit in enumerate(digits)]


def merged(sid: list[int], pair: tuple[int, int], made: int) -> list[int]:
    """The SID with every occurrence of the pair as one piece."""
    out: list[int] = []
    for piece in sid:
        if out and (out[-1], piece) == pair:
            out[-1] = made
        else:
            out.append(piece)
    return out


def byte_pairs(sids: list[list[int]], events: list[int], first: int, most: int) -> list[tuple[int, int]]:
    """Counts every pair anew before each merge."""
    merges: list[tuple[int, int]] = []
    while len(merges) < most:
        counts: dict[tuple[int, int], int] = {}
        for sid, n in zip(sids, events, strict=True):
            for pair in pairwise(sid):
                counts[pair] = counts.get(pair, 0) + n
        counts = {pair: n for pair, n in counts.items() if n}
        if not counts:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        sids = [merged(sid, pair, first + len(merges)) for sid in sids]
        merges.append(pair)
    return merges


@st.composite
def corpora(draw):
    radices = draw(st.lists(st.integers(2, 5), min_size=1, max_size=6))
    digits = st.tuples(*(st.integers(0, radix - 1) for radix in radices)).map(list)
    sids = draw(st.lists(digits, min_size=1, max_size=25))
    events = draw(st.lists(st.integers(0, 4), min_size=len(sids), max_size=len(sids)))
    return radices, sids, events, draw(st.integers(0, 30))


@settings(max_examples=200, deadline=None)
@given(corpora())
def test_pieces_are_those_of_byte_pair_encoding(corpus):
    radices, digits, events, most = corpus
    spec = SIDSpec(tuple(map(OneHot, radices)), "test")
    words_NW = spec.pack(np.array(digits))
    first = 1 + sum(radices)
    pieces = Pieces.learn(spec, words_NW, np.array(events), first + most)
    sids = [symbols(radices, d) for d in digits]
    expected = byte_pairs(sids, events, first, most)
    assert list(pieces.merges) == expected and pieces.num_pieces == first + len(expected)
    # cut all of them, whether training has them or not: every merge in the order in which it was learned
    for made, pair in enumerate(expected, start=first):
        sids = [merged(sid, pair, made) for sid in sids]
    padded = [sid + [NOTHING] * (len(radices) - len(sid)) for sid in sids]
    assert pieces.of(torch.from_numpy(words_NW)).tolist() == padded


def test_what_is_popular_is_one_piece_and_what_is_rare_shares():
    spec = SIDSpec((OneHot(4),) * 3, "test")
    digits = np.array([[0, 1, 2], [0, 1, 3], [3, 3, 3], [2, 0, 1]])
    pieces = Pieces.learn(spec, spec.pack(digits), np.array([90, 5, 1, 0]), 13 + 2)
    assert pieces.merges == (
        (1, 6),
        (13, 11),
    )  # digits 0, 1 at the first two places, 95 times; with 2 after them, 90 times
    assert pieces.of(torch.from_numpy(spec.pack(digits))).tolist() == [[14, 0, 0], [13, 12, 0], [4, 8, 12], [3, 5, 10]]


def test_an_items_events_count_like_as_many_items():
    spec = SIDSpec((OneHot(3),) * 4, "test")
    rng = np.random.default_rng(0)
    words_NW = spec.pack(rng.integers(3, size=(40, 4)))
    events_N = rng.integers(5, size=40)
    repeated_NW = np.repeat(words_NW, events_N, axis=0)
    one = Pieces.learn(spec, words_NW, events_N, 40)
    assert one == Pieces.learn(spec, repeated_NW, np.ones(len(repeated_NW), int), 40)
    assert one != Pieces.learn(spec, words_NW, np.ones(40, int), 40)


def test_sids_of_several_words_and_of_any_digits():
    spec = SIDSpec((Ternary(),) * 45, "test")
    words_NW = spec.pack(np.random.default_rng(0).integers(3, size=(20, 45)))
    assert words_NW.shape == (20, 2)
    pieces = Pieces.learn(spec, words_NW, np.ones(20, int), 136 + 60)
    cut_NL = pieces.of(torch.from_numpy(words_NW))
    assert cut_NL.shape == (20, 45) and len(cut_NL.unique(dim=0)) == 20
    assert ((cut_NL == NOTHING).sum(1) > 0).all() and cut_NL.max() < pieces.num_pieces == 196


def test_nothing_met_merges_nothing():
    spec = SIDSpec((OneHot(4),) * 2, "test")
    pieces = Pieces.learn(spec, spec.pack(np.array([[1, 2]])), np.array([0]), 100)
    assert pieces.merges == () and pieces.of(torch.tensor([[6]])).tolist() == [[2, 7]]


def test_a_table_has_a_row_for_each_value_of_each_digit():
    spec = SIDSpec((OneHot(4), OneHot(5)), "test")
    with pytest.raises(ValueError, match="num_rows must be 10 at least, one for each value of each digit; got 9"):
        Pieces.learn(spec, spec.pack(np.array([[1, 2]])), np.array([1]), 9)


def test_vectors_are_sums_of_the_pieces_rows_and_nothing_adds_nothing():
    spec = SIDSpec((OneHot(5),) * 3, "test")
    words = {name: spec.pack(np.random.default_rng(i).integers(5, size=(6, 3))) for i, name in enumerate("ab")}
    pieces = {name: Pieces.learn(spec, words_NW, np.arange(6), 16 + 4) for name, words_NW in words.items()}
    vectors = PieceVectors(pieces, 20, 4, torch.device("cpu"))
    expected, values = [], []
    for name, words_NW in words.items():
        table = vectors.collection.embeddings[Pieces.key(name)].weight
        torch.nn.init.normal_(table)
        cut_NL = pieces[name].of(torch.from_numpy(words_NW))
        assert (cut_NL == NOTHING).any()
        expected.append(torch.stack([sum(table[piece] for piece in sid if piece != NOTHING) for sid in cut_NL]))
        values.append(cut_NL.flatten())
    lengths = torch.tensor([2, 0, 4]) * 3
    features = KeyedJaggedTensor(keys=["a_pieces", "b_pieces"], values=torch.cat(values), lengths=lengths.repeat(2))
    vectors_ND = vectors(features)
    torch.testing.assert_close(vectors_ND, torch.cat(expected, dim=1))
    vectors_ND.sum().backward()
    assert not any(t.weight.grad[NOTHING].any() for t in vectors.collection.embeddings.values())
