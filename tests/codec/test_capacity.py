"""SIDs within a capacity, against a search through all SIDs, item by item."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.codec import capacity as module
from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.capacity import within_capacity
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.nearest import NearestSIDs
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.errors import DataError


def make_codec(stages: str = "onehot:3,ternary*3", dim: int = 4, seed: int = 0) -> Codec:
    """Random tables, each digit's shorter than those before."""
    spec = SIDSpec(parse_stages(stages), "f" * 16)
    generator = torch.Generator().manual_seed(seed)
    tables = tuple(torch.randn(radix, dim, generator=generator) * 0.6**j for j, radix in enumerate(spec.radices))
    return Codec(spec, torch.randn(dim, generator=generator), tables)


def every_sid(codec: Codec) -> tuple[np.ndarray, np.ndarray]:
    """All packed SIDs, in order, and their vectors in float64, summed up from the tables."""
    digits_NL = np.array(list(itertools.product(*map(range, codec.spec.radices))))
    vectors_ND = codec.offset_D.double().numpy() + sum(
        table.double().numpy()[digits_NL[:, j]] for j, table in enumerate(codec.digit_tables)
    )
    return codec.spec.pack(digits_NL), vectors_ND


@pytest.mark.parametrize("stages", ["onehot:3,ternary*3", "ternary^2,signs*2,onehot:5", "ternary*41"])
def test_nearest_sids_are_those_of_a_search_through_all(stages):
    codec = make_codec(stages, dim=6)
    near = NearestSIDs(codec)
    x_ND = np.random.default_rng(0).normal(size=(9, 6))
    words_NBW, distance_NB = near.find(x_ND, 50)
    assert (np.diff(distance_NB, axis=1) > -1e-7).all()  # distances equal to 1e-9 are in the order of SIDs
    for x_D, words_BW, distance_B in zip(x_ND, words_NBW, distance_NB, strict=True):
        assert len(np.unique(words_BW, axis=0)) == 50
        np.testing.assert_allclose(distance_B, near.distances(np.tile(x_D, (50, 1)), words_BW), atol=1e-9)
    if near.count > 1000:
        return
    all_NW, vectors_ND = every_sid(codec)
    words_NBW, distance_NB = near.find(x_ND, 10**6)
    for x_D, words_BW, distance_B in zip(x_ND, words_NBW, distance_NB, strict=True):
        expected_B = np.square(vectors_ND - x_D).sum(1)
        order = np.argsort(expected_B)
        np.testing.assert_array_equal(words_BW, all_NW[order])
        np.testing.assert_allclose(distance_B, expected_B[order], atol=1e-9)


def test_equal_distances_are_in_the_order_of_the_sids():
    codec = Codec(SIDSpec(parse_stages("signs*3"), "f"), torch.zeros(3), tuple(torch.eye(3)[j] * torch.tensor([[-1.0], [1]]) for j in range(3)))  # fmt: skip
    words_NBW, _ = NearestSIDs(codec).find(np.zeros((1, 3)), 8)
    assert words_NBW[0, :, 0].tolist() == list(range(8))


def expected_moves(codec, published, words, capacity, x_ND):
    """By the definition: who finds room stays; the others look through all SIDs, one after another."""
    all_NW, vectors_ND = every_sid(codec)
    count = {tuple(w): 0 for w in all_NW.tolist()}
    for w in published:
        count[tuple(w)] += 1
    result: list = []
    for w in words.tolist():
        has_room = count[tuple(w)] < capacity
        count[tuple(w)] += has_room
        result.append(tuple(w) if has_room else None)
    for row, settled in enumerate(result):
        if settled is None:
            order = np.argsort(np.round(np.square(vectors_ND - x_ND[row]).sum(1), 7), kind="stable")
            result[row] = next(tuple(w) for w in all_NW[order].tolist() if count[tuple(w)] < capacity)
            count[result[row]] += 1
    return result


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    capacity=st.integers(1, 3),
    has_vectors=st.booleans(),
    block=st.sampled_from([1, 7, 1024]),
)
def test_items_move_as_the_definition_says(seed, capacity, has_vectors, block):
    rng = np.random.default_rng(seed)
    codec = make_codec(seed=seed)
    all_NW, vectors_ND = every_sid(codec)
    popular = rng.integers(0, len(all_NW), 6)
    published = np.repeat(all_NW[popular], rng.integers(0, capacity + 1, 6), axis=0)
    words_NW = all_NW[rng.choice(np.append(popular, rng.integers(0, len(all_NW), 4)), 30)]
    own_ND = vectors_ND[np.searchsorted(all_NW[:, 0], words_NW[:, 0])]
    x_ND = own_ND + rng.normal(size=own_ND.shape) * 0.1 if has_vectors else own_ND
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        patch.setattr(module, "_FEWEST", 4)  # so that more candidates must be found
        moves = within_capacity(codec, words_NW, capacity, published_PW=published, vectors=x_ND.__getitem__ if has_vectors else None)  # fmt: skip
    _, counts = np.unique(np.concatenate([published, moves.words_NW]), axis=0, return_counts=True)
    assert counts.max() <= max(capacity, np.unique(published, axis=0, return_counts=True)[1].max(initial=0))
    stays = np.ones(30, bool)
    stays[moves.rows_M] = False
    np.testing.assert_array_equal(moves.words_NW[stays], words_NW[stays])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FEWEST", 81)  # all there are: a beam this wide loses none
        exact = within_capacity(codec, words_NW, capacity, published_PW=published, vectors=x_ND.__getitem__ if has_vectors else None)  # fmt: skip
    expected = expected_moves(codec, published.tolist(), words_NW, capacity, x_ND)
    assert [tuple(w) for w in exact.words_NW.tolist()] == expected
    np.testing.assert_array_equal(exact.rows_M, moves.rows_M)
    places = np.searchsorted(all_NW[:, 0], exact.words_NW[exact.rows_M, 0])
    np.testing.assert_allclose(exact.after_M, np.square(vectors_ND[places] - x_ND[exact.rows_M]).sum(1), atol=1e-6)
    np.testing.assert_allclose(exact.before_M, np.square(own_ND - x_ND)[exact.rows_M].sum(1), atol=1e-6)


def test_many_items_of_one_sid():
    """Without content of their own, say: all SIDs are used before any is used twice."""
    codec = make_codec("ternary*5")
    moves = within_capacity(codec, np.zeros((243, 1), np.int64), 1)
    assert sorted(moves.words_NW[:, 0].tolist()) == list(range(243))
    assert (np.diff(moves.after_M) > -1e-9).all()
    with pytest.raises(DataError, match="244 items, but 243 SIDs with room for 1 each; raise the capacity"):
        within_capacity(codec, np.zeros((244, 1), np.int64), 1)
    moves = within_capacity(codec, np.zeros((244, 1), np.int64), 2)
    assert np.bincount(moves.words_NW[:, 0]).max() == 2 and len(moves.rows_M) == 242


def test_sids_too_far_away_are_not_looked_for(monkeypatch):
    monkeypatch.setattr(module, "_FEWEST", 2)
    monkeypatch.setattr(module, "_MOST", 4)
    with pytest.raises(DataError, match="the 16 SIDs nearest to an item are full; raise the capacity"):
        within_capacity(make_codec("ternary*5"), np.zeros((40, 1), np.int64), 1)


def test_nothing_moves_where_there_is_room():
    codec = make_codec()
    words_NW = every_sid(codec)[0]
    moves = within_capacity(codec, words_NW, 1)
    assert len(moves.rows_M) == 0 and moves.words_NW is words_NW
