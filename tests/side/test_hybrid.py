"""The coarse id is the SID's prefix; the hybrid gives SIDE and a learned row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import OneHot, Ternary, parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.side.expansion import SIDEConfig
from sidrec_torchrec.side.hybrid import CoarseIds, HybridVectors


@given(st.lists(st.one_of(st.just(Ternary()), st.integers(2, 600).map(OneHot)), min_size=1, max_size=30), st.data())
def test_the_id_is_the_first_digits_read_as_one_number(stages, data):
    spec = SIDSpec(tuple(stages), "test")
    limit = data.draw(st.integers(spec.radices[0], 10**6))
    coarse = CoarseIds.at_most(spec, limit)
    digits_NL = torch.stack([torch.randint(radix, (20,)) for radix in spec.radices], dim=1)
    expected_N, num_ids = torch.zeros(20, dtype=torch.int64), 1
    for j in range(coarse.num_digits):
        expected_N = expected_N * spec.radices[j] + digits_NL[:, j]
        num_ids *= spec.radices[j]
    assert coarse.ids(spec.pack(digits_NL)).equal(expected_N)
    assert coarse.num_ids == num_ids <= limit
    if coarse.num_digits < spec.num_digits:
        assert num_ids * spec.radices[coarse.num_digits] > limit


def test_wrong_prefixes_are_refused():
    spec = SIDSpec(parse_stages("onehot:300,ternary*60"), "test")
    with pytest.raises(ValueError, match="first digit has 300 values, more than 256 coarse ids"):
        CoarseIds.at_most(spec, 256)
    for num_digits in (0, 40):
        with pytest.raises(ValueError, match="num_digits must be 1 to 35"):
            CoarseIds(spec, num_digits)


def test_gives_side_and_a_row_that_learns():
    spec = SIDSpec(parse_stages("onehot:5,ternary*4"), "test")
    codec = Codec(spec, torch.zeros(6), tuple(torch.randn(radix, 6) for radix in spec.radices))
    coarse = CoarseIds(spec, 1)
    digits_NL = torch.stack([torch.randint(radix, (9,)) for radix in spec.radices], dim=1)
    words_NW = spec.pack(digits_NL)
    features = KeyedJaggedTensor(
        keys=["sid", coarse.key("sid")],
        values=torch.cat([words_NW[:, 0], coarse.ids(words_NW)]),
        lengths=torch.tensor([4, 5, 4, 5]),
    )
    hybrid = HybridVectors(
        SIDEConfig(name="item", feature_names=["sid"], codec=codec, mode="decoded"), coarse, 8, torch.device("cpu")
    )
    side_NE, rows_ND = hybrid(features)
    torch.testing.assert_close(side_NE, codec.decode(words_NW))
    assert not rows_ND.any()
    (table,) = hybrid.parameters()
    with torch.no_grad():
        table.copy_(torch.arange(5.0).unsqueeze(1).expand(-1, 8))
    assert hybrid(features)[1].equal(digits_NL[:, :1].float().expand(-1, 8))
    with pytest.raises(ValueError, match="same codec"):
        HybridVectors(
            SIDEConfig(name="item", feature_names=["sid"], codec=codec), CoarseIds(SIDSpec(spec.stages, "b"), 1), 8
        )
