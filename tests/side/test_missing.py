"""Missing SIDs in all that makes vectors of SIDs: as rows of zeros, which learn nothing."""

import pytest
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import NO_SID, SIDSpec, word_names
from sidrec_torchrec.side.collection import SIDEBagCollection, SIDECollection
from sidrec_torchrec.side.expansion import MODES, SIDEConfig
from sidrec_torchrec.side.hybrid import CoarseIds, HybridVectors
from sidrec_torchrec.side.ngram import AllNgram, PrefixNgram
from sidrec_torchrec.side.pieces import NOTHING, Pieces, PieceVectors
from tests.side.test_collection import make_codec, make_items

LENGTHS = [4, 0, 3, 5]
MISSING = [1, 4, 5, 6, 11]  # of the third bag all
N = sum(LENGTHS)
CPU = torch.device("cpu")


def make_events(codec: Codec) -> tuple[KeyedJaggedTensor, Tensor, Tensor]:
    """The KJT of some events, their words, and those that they would have if none were missing."""
    whole_NW = make_items(codec)[0][:N]
    words_NW = whole_NW.clone()
    words_NW[MISSING] = NO_SID
    return as_kjt(dict(zip(word_names("a", words_NW.shape[1]), words_NW.unbind(1), strict=True))), words_NW, whole_NW


def as_kjt(values: dict[str, Tensor]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor(
        keys=list(values),
        values=torch.cat([value.flatten() for value in values.values()]),
        lengths=torch.cat([torch.tensor(LENGTHS) * (value.numel() // N) for value in values.values()]),
    )


@pytest.mark.parametrize("stages", ["onehot:4,ternary*6", "ternary*45"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"learned": True}, {"learned": True, "fallback": 0.5}, {"digit_dropout": 0.3}])
def test_a_sequence_has_zeros(stages, mode, options):
    codec = make_codec(stages)
    features, _, _ = make_events(codec)
    config = SIDEConfig(name="item", feature_names=["a"], codec=codec, mode=mode, **options)
    side = SIDECollection(tables=[config]).train()
    vectors_NE = side(features)["a"].values()
    assert vectors_NE[MISSING].eq(0).all()
    expected_NE = make_items(codec)[1][mode][:N].clone()
    expected_NE[MISSING] = 0
    torch.testing.assert_close(side.eval()(features)["a"].values(), expected_NE, rtol=1e-5, atol=1e-5)
    if options.get("learned"):
        vectors_NE[MISSING].sum().backward()
        assert not side.tables["item"].rows.grad.any()


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_a_bag_counts_what_is_missing_as_zeros(pooling):
    codec = make_codec()
    features, _, _ = make_events(codec)
    config = SIDEConfig(name="item", feature_names=["a"], codec=codec, mode="decoded", pooling=pooling)
    pooled_BE = SIDEBagCollection(tables=[config])(features)["a"]
    rows_NE = make_items(codec)[1]["decoded"][:N].clone()
    rows_NE[MISSING] = 0
    offsets_B = torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)
    expected_BE = nn.functional.embedding_bag(torch.arange(N), rows_NE, offsets_B, mode=pooling.value.lower())
    torch.testing.assert_close(pooled_BE, expected_BE, rtol=1e-5, atol=1e-5)
    assert pooled_BE[2].eq(0).all() and pooled_BE[3].any()


def test_a_codec_decodes_it_to_zeros():
    codec = make_codec()
    _, words_NW, whole_NW = make_events(codec)
    for num_digits in (None, 0, 2):
        expected_ND = codec.decode(whole_NW, num_digits=num_digits)
        expected_ND[MISSING] = 0
        assert codec.decode(words_NW, num_digits=num_digits).equal(expected_ND)


def test_the_hybrid_reads_no_row():
    codec = make_codec("onehot:4,ternary*45")
    coarse = CoarseIds(codec.spec, 2)
    _, words_NW, _ = make_events(codec)
    values = dict(zip(word_names("a", 2), words_NW.unbind(1), strict=True)) | {coarse.key("a"): coarse.ids(words_NW)}
    hybrid = HybridVectors(SIDEConfig(name="item", feature_names=["a"], codec=codec), coarse, 8, CPU)
    (table,) = hybrid.parameters()
    nn.init.normal_(table)
    side_NE, rows_ND = hybrid(as_kjt(values))
    has_sid_N = torch.ones(N, dtype=torch.bool)
    has_sid_N[MISSING] = False
    assert side_NE[MISSING].eq(0).all() and rows_ND[MISSING].eq(0).all()
    assert rows_ND[has_sid_N].equal(table[coarse.ids(words_NW[has_sid_N])])
    rows_ND.sum().backward()
    used = torch.zeros(len(table), dtype=torch.bool).index_fill(0, coarse.ids(words_NW[has_sid_N]), True)
    assert (table.grad.any(1) == used).all()


def test_it_has_no_pieces():
    spec = SIDSpec(parse_stages("onehot:3*4"), "test")
    codec = Codec(spec, torch.zeros(2), tuple(torch.randn(3, 2) for _ in range(4)))
    _, words_NW, whole_NW = make_events(codec)
    pieces = Pieces.learn(spec, whole_NW.numpy(), torch.ones(N, dtype=torch.int64).numpy(), num_rows=30)
    assert pieces.merges
    pieces_NL = pieces.of(words_NW)
    assert (pieces_NL[MISSING] == NOTHING).all()
    has_sid_N = (words_NW >= 0).all(1)
    assert pieces_NL[has_sid_N].equal(pieces.of(whole_NW)[has_sid_N])
    tables = PieceVectors({"a": pieces}, 30, 8, CPU)
    for parameter in tables.parameters():
        nn.init.normal_(parameter)
    assert tables(as_kjt({Pieces.key("a"): pieces_NL}))[MISSING].eq(0).all()


@pytest.mark.parametrize("kind", [PrefixNgram, AllNgram])
def test_its_tokens_can_be_looked_up(kind):
    spec = SIDSpec(parse_stages("onehot:3*4"), "test")
    words_NW = spec.pack(torch.randint(3, (6, 4)))
    expected_NP = kind(spec, num_rows=50, depth=3).tokens(words_NW)
    words_NW[2] = NO_SID
    tokens_NP = kind(spec, num_rows=50, depth=3).tokens(words_NW)
    assert ((tokens_NP >= 0) & (tokens_NP < 50)).all()
    assert tokens_NP[[0, 1, 3, 4, 5]].equal(expected_NP[[0, 1, 3, 4, 5]])
    with pytest.raises(ValueError, match="row 0, word 0 is -2"):
        kind(spec, num_rows=50, depth=3).tokens(torch.tensor([[-2]]))
