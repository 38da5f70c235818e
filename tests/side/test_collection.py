"""SIDE collections against torch's own embeddings over explicit tables, and inside TorchRec."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec, word_names
from sidrec_torchrec.errors import CodecMismatchError
from sidrec_torchrec.side.collection import SIDEBagCollection, SIDECollection
from sidrec_torchrec.side.expansion import MODES, SIDEConfig

ITEMS = 30


def make_codec(stages: str = "onehot:4,ternary*6", dim: int = 8, fingerprint: str = "aaaa") -> Codec:
    generator = torch.Generator().manual_seed(0)
    spec = SIDSpec(parse_stages(stages), fingerprint)
    tables = tuple(torch.randn(radix, dim, generator=generator) for radix in spec.radices)
    return Codec(spec, torch.randn(dim, generator=generator), tables)


def make_items(codec: Codec) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Words of ITEMS items, and by mode the table of what each should expand to."""
    generator = torch.Generator().manual_seed(1)
    digits_NL = torch.stack([torch.randint(r, (ITEMS,), generator=generator) for r in codec.spec.radices], dim=1)
    parts = [stage.values()[digits_NL[:, j]] for j, stage in enumerate(codec.spec.stages)]
    vector_ND = codec.offset_D + sum(table[digits_NL[:, j]] for j, table in enumerate(codec.digit_tables))
    return codec.spec.pack(digits_NL), {"digits": torch.cat(parts, dim=1), "decoded": vector_ND}


def make_features(lengths: dict[str, list[int]], codec: Codec, weights: bool = False):
    """A KJT of item rows, and the same events as a KJT of their SIDs."""
    generator = torch.Generator().manual_seed(2)
    words_NW, _ = make_items(codec)
    keys, rows, sids = [], [], []
    for feature, counts in lengths.items():
        row_N = torch.randint(ITEMS, (sum(counts),), generator=generator)
        weight_N = torch.rand(sum(counts), generator=generator) if weights else None
        rows.append((feature, row_N, counts, weight_N))
        for word, key in enumerate(word_names(feature, codec.spec.num_words)):
            sids.append((key, words_NW[row_N, word], counts, weight_N))
        keys.append(feature)
    return tuple(
        KeyedJaggedTensor(
            keys=[key for key, *_ in parts],
            values=torch.cat([values for _, values, _, _ in parts]),
            lengths=torch.tensor([n for _, _, counts, _ in parts for n in counts]),
            weights=torch.cat([w for *_, w in parts]) if weights else None,
        )
        for parts in (rows, sids)
    )


@pytest.mark.parametrize("stages", ["onehot:4,ternary*6", "ternary*45"])
@pytest.mark.parametrize("mode", MODES)
def test_sequence_equals_an_embedding(stages, mode):
    codec = make_codec(stages)
    rows, sids = make_features({"a": [3, 0, 2], "b": [1, 4, 0]}, codec)
    side = SIDECollection(tables=[SIDEConfig(name="item", feature_names=["a", "b"], codec=codec, mode=mode)])
    output = side(sids)
    table = nn.Embedding.from_pretrained(make_items(codec)[1][mode])
    assert list(output) == ["a", "b"]
    for feature in "ab":
        torch.testing.assert_close(output[feature].values(), table(rows[feature].values()), rtol=1e-5, atol=1e-5)
        assert output[feature].lengths().tolist() == rows[feature].lengths().tolist()
    assert list(side.parameters()) == []
    (config,) = side.embedding_configs()
    assert config.embedding_dim == side.embedding_dim() == table.embedding_dim
    assert side.embedding_names_by_table() == [["a", "b"]] and not side.need_indices()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pooling, weights", [("sum", False), ("mean", False), ("sum", True)])
def test_bag_equals_an_embedding_bag(mode, pooling, weights):
    codec = make_codec()
    rows, sids = make_features({"a": [3, 0, 2], "b": [1, 4, 0]}, codec, weights)
    config = SIDEConfig(
        name="item", feature_names=["a", "b"], codec=codec, mode=mode, pooling=PoolingType(pooling.upper())
    )
    side = SIDEBagCollection(tables=[config], is_weighted=weights)
    output = side(sids)
    for feature in "ab":
        part = rows[feature]
        bags = nn.functional.embedding_bag(
            part.values(),
            make_items(codec)[1][mode],
            part.offsets()[:-1],
            mode=pooling,
            per_sample_weights=part.weights() if weights else None,
        )
        torch.testing.assert_close(output[feature], bags, rtol=1e-5, atol=1e-5)
    assert side.is_weighted() == weights


def test_shared_features_are_named_as_torchrec_names_them():
    codec = make_codec()
    _, sids = make_features({"a": [3, 1]}, codec)
    tables = [
        SIDEConfig(name=name, feature_names=["a"], codec=codec, mode=mode)
        for name, mode in zip("xy", MODES, strict=True)
    ]
    own = [EmbeddingBagConfig(name=name, feature_names=["a"], embedding_dim=4, num_embeddings=2) for name in "xy"]
    names = EmbeddingBagCollection(tables=own)(
        KeyedJaggedTensor(keys=["a"], values=torch.zeros(2).long(), lengths=torch.tensor([1, 1]))
    ).keys()
    assert SIDEBagCollection(tables=tables)(sids).keys() == names == ["a@x", "a@y"]
    with pytest.raises(ValueError, match="unique"):
        SIDEBagCollection(tables=[tables[0], copy.copy(tables[0])])


def test_variable_batch_per_feature():
    codec = make_codec()
    words_NW, expected = make_items(codec)
    kjt = KeyedJaggedTensor(
        keys=["a", "b"],
        values=words_NW[:5, 0],
        lengths=torch.tensor([2, 1, 1, 1, 0]),
        stride_per_key_per_rank=[[2], [3]],
        inverse_indices=(["a", "b"], torch.tensor([[0, 1, 1], [2, 1, 0]])),
    )
    side = SIDEBagCollection(tables=[SIDEConfig(name="item", feature_names=["a", "b"], codec=codec)])
    output, row_ND = side(kjt), expected["digits"]
    bags_a = torch.stack([row_ND[0] + row_ND[1], row_ND[2]])
    bags_b = torch.stack([row_ND[3], row_ND[4], torch.zeros_like(row_ND[0])])
    torch.testing.assert_close(output["a"], bags_a[[0, 1, 1]])
    torch.testing.assert_close(output["b"], bags_b[[2, 1, 0]])


def test_refusals():
    codec = make_codec()
    config = SIDEConfig(name="item", feature_names=["a"], codec=codec)
    side = SIDECollection(tables=[config])
    for bad in (-2, codec.spec.word_limits[0]):
        kjt = KeyedJaggedTensor(keys=["a"], values=torch.tensor([0, bad]), lengths=torch.tensor([1, 1]))
        with pytest.raises(ValueError, match=f"row 1, word 0 is {bad}, no packed SID"):
            side(kjt)
    with pytest.raises(ValueError, match="meta"):
        SIDECollection(tables=[config], device=torch.device("meta"))
    with pytest.raises(ValueError, match="mode must be one of digits, decoded"):
        SIDEConfig(name="item", feature_names=["a"], codec=codec, mode="digit")
    with pytest.raises(ValueError, match="mean pooling takes no weights"):
        mean = SIDEConfig(name="item", feature_names=["a"], codec=codec, pooling=PoolingType.MEAN)
        SIDEBagCollection(tables=[mean], is_weighted=True)


def test_checkpoints_belong_to_their_codec(tmp_path):
    sides = [
        SIDECollection(tables=[SIDEConfig(name="item", feature_names=["a"], codec=make_codec(fingerprint=name))])
        for name in ("aaaa", "aaaa", "bbbb")
    ]
    sides[1].load_state_dict(sides[0].state_dict())
    with pytest.raises(CodecMismatchError, match="made with codec aaaa, but this is codec bbbb"):
        sides[2].load_state_dict(sides[0].state_dict())
    dcp.save({"model": sides[0].state_dict()}, checkpoint_id=tmp_path / "checkpoint")
    state = {"model": sides[2].state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    with pytest.raises(CodecMismatchError):
        sides[2].load_state_dict(state["model"])


@pytest.mark.parametrize("kind", [DLRM, DLRM_DCN, DLRM_Projection])
def test_torchrec_models_train_with_it(kind):
    torch.manual_seed(0)
    codec = make_codec()
    _, sids = make_features({"a": [3, 0, 2], "b": [1, 4, 0]}, codec)
    config = SIDEConfig(name="item", feature_names=["a", "b"], codec=codec, mode="decoded")
    extra = {
        DLRM: {},
        DLRM_DCN: {"dcn_num_layers": 2, "dcn_low_rank_dim": 4},
        DLRM_Projection: {"interaction_branch1_layer_sizes": [24, 16], "interaction_branch2_layer_sizes": [24, 16]},
    }
    model = kind(
        embedding_bag_collection=SIDEBagCollection(tables=[config]),
        dense_in_features=4,
        dense_arch_layer_sizes=[8, 8],
        over_arch_layer_sizes=[8, 1],
        **extra[kind],
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dense, label = torch.randn(3, 4), torch.tensor([[0.0], [1.0], [1.0]])
    losses = []
    for _ in range(5):
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, sids), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_learned_side_starts_frozen_and_learns_any_function_of_a_field():
    codec = make_codec("ternary*5")  # one field of 243 rows: an item each
    _, by_mode = make_items(codec)
    _, features = make_features({"f": [ITEMS]}, codec)
    learned, frozen = (
        SIDECollection([SIDEConfig(name="t", feature_names=["f"], codec=codec, mode="decoded", learned=flag)])
        for flag in (True, False)
    )
    torch.testing.assert_close(learned(features)["f"].values(), frozen(features)["f"].values())
    assert not list(frozen.parameters())

    words_N = features["f"].values()
    target_ND = torch.randn(243, by_mode["decoded"].shape[1], generator=torch.Generator().manual_seed(4))[words_N]
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (learned(features)["f"].values() - target_ND).square().sum() / 2 / words_N.bincount().max()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(learned(features)["f"].values(), target_ND, rtol=1e-2, atol=1e-2)


def test_learned_rows_are_in_checkpoints_and_keep_their_codec():
    config = {"name": "t", "feature_names": ["f"], "mode": "decoded", "learned": True}
    learned = SIDECollection([SIDEConfig(codec=make_codec(), **config)])
    with torch.no_grad():
        next(learned.parameters()).add_(1.0)
    again = SIDECollection([SIDEConfig(codec=make_codec(), **config)])
    again.load_state_dict(learned.state_dict())
    assert next(again.parameters()).equal(next(learned.parameters()))
    with pytest.raises(CodecMismatchError, match="bbbb"):
        SIDECollection([SIDEConfig(codec=make_codec(fingerprint="bbbb"), **config)]).load_state_dict(
            learned.state_dict()
        )


@pytest.mark.parametrize("stages", ["onehot:4,ternary*6", "ternary*45"])
def test_training_leaves_digits_out(stages):
    """Each event by itself loses a share of its digits, whole; what remains is as it was, and decodes as it should."""
    codec = make_codec(stages)
    _, sids = make_features({"a": [400]}, codec)
    vectors = {}
    for mode in MODES:
        table = SIDEConfig(name="item", feature_names=["a"], codec=codec, mode=mode, digit_dropout=0.25)
        whole = SIDECollection([dataclasses.replace(table, digit_dropout=0.0)])(sids)["a"].values()
        side = SIDECollection([table])
        torch.testing.assert_close(side.eval()(sids)["a"].values(), whole, rtol=0, atol=0)
        torch.manual_seed(0)
        vectors[mode] = whole, side.train()(sids)["a"].values()
    whole_NE, some_NE = vectors["digits"]
    starts = [0, *itertools.accumulate(stage.width for stage in codec.spec.stages)]
    kept = []
    for j, (first, last) in enumerate(itertools.pairwise(starts)):
        is_there = (whole_NE[:, first:last] != 0).any(1)
        is_kept = (some_NE[:, first:last] != 0).any(1)
        expected = torch.where(is_kept.unsqueeze(1), whole_NE[:, first:last], 0.0)
        torch.testing.assert_close(some_NE[:, first:last], expected, rtol=0, atol=0)
        kept.append((j, is_there, is_kept))
    share = sum(k.sum() for _, _, k in kept) / sum(t.sum() for _, t, _ in kept)
    assert 0.72 < share < 0.78
    assert len({tuple(k[1].tolist() for _, _, k in kept), tuple(k[2].tolist() for _, _, k in kept)}) == 2
    # the same draws: what decoded vectors lack are the rows of the digits that were left out, the offset with the first
    torch.manual_seed(0)
    is_out_NL = torch.rand(400, len(codec.spec.stages)) < 0.25
    digits_NL = codec.spec.unpack(torch.stack([sids[key].values() for key in list(sids.keys())], dim=1)).long()
    lacking_ND = sum(is_out_NL[:, j, None] * table[digits_NL[:, j]] for j, table in enumerate(codec.digit_tables))
    lacking_ND = lacking_ND + is_out_NL[:, :1] * codec.offset_D
    whole_ND, some_ND = vectors["decoded"]
    torch.testing.assert_close(some_ND, whole_ND - lacking_ND, rtol=1e-4, atol=1e-5)


def test_learned_digits_cannot_be_left_out():
    with pytest.raises(ValueError, match="none can be dropped"):
        SIDEConfig(name="item", feature_names=["a"], codec=make_codec(), learned=True, digit_dropout=0.1)
    with pytest.raises(ValueError, match=r"digit_dropout must lie in \[0, 1\), got 1"):
        SIDEConfig(name="item", feature_names=["a"], codec=make_codec(), digit_dropout=1)
