"""Replaced tables against the original model, whose item table holds what the codec decodes."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchrec.inference.modules import quantize_inference_model
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import word_names
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.side.collection import SIDEBagCollection, expand_and_pool
from sidrec_torchrec.side.expansion import SIDEConfig
from sidrec_torchrec.side.replace import ReplacedBagCollection, replace_tables
from tests.side.test_in_torchrec import DIM, ITEMS, ONE_WORD, TWO_WORDS, make_codec, make_items

TABLES = {"user": ["user"], "item": ["clicked", "viewed"], "ad": ["ad"]}
OF_ITEMS = ("clicked", "viewed", "bought")
LENGTHS = {"user": [1, 1, 1], "clicked": [3, 0, 2], "ad": [1, 1, 1], "viewed": [2, 1, 0]}
VARIABLE = {"user": [1, 2], "clicked": [3, 0, 2], "ad": [1], "viewed": [2, 1]}
INVERSE = {"user": [0, 1, 1, 0], "clicked": [2, 1, 0, 0], "ad": [0, 0, 0, 0], "viewed": [1, 0, 1, 1]}


def make_tables(kind, tables: dict[str, list[str]] = TABLES, vector_ND: Tensor | None = None, **options) -> nn.Module:
    """A collection of tables of ITEMS rows; those of items hold ``vector_ND``."""
    config = EmbeddingBagConfig if kind is EmbeddingBagCollection else EmbeddingConfig
    pooling = {"pooling": options.pop("pooling", PoolingType.SUM)} if kind is EmbeddingBagCollection else {}
    torch.manual_seed(0)
    collection = kind(
        [
            config(name=name, embedding_dim=DIM, num_embeddings=ITEMS, feature_names=list(features), **pooling)
            for name, features in tables.items()
        ],
        **options,
    )
    for name, table in (collection.embedding_bags if config is EmbeddingBagConfig else collection.embeddings).items():
        if name.startswith("item") and vector_ND is not None:
            table.weight.data.copy_(vector_ND)
    return collection


def make_batch(codec: Codec | None, lengths=LENGTHS, weighted: bool = False, inverse=None) -> KeyedJaggedTensor:
    """The same events as rows of tables, or with a codec, items as SIDs."""
    generator = torch.Generator().manual_seed(3)
    parts = []  # key, values, weights, lengths, inverse
    for feature, counts in lengths.items():
        row_N = torch.randint(ITEMS, (sum(counts),), generator=generator)
        weight_N = torch.rand(sum(counts), generator=generator)
        columns = make_items(codec)[0][row_N].T if codec and feature in OF_ITEMS else [row_N]
        for key, column_N in zip(word_names(feature, len(columns)), columns, strict=True):
            parts.append((key, column_N, weight_N, counts, inverse and torch.tensor(inverse[feature])))
    keys, values, weights, counts, inverses = (list(column) for column in zip(*parts, strict=True))
    variable = {}
    if inverse:
        variable["stride_per_key_per_rank"] = [[len(n)] for n in counts]
        variable["inverse_indices"] = (keys, torch.stack(inverses))
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat(values),
        weights=torch.cat(weights) if weighted else None,
        lengths=torch.tensor([n for of_key in counts for n in of_key]),
        **variable,
    )


def assert_same(ours, theirs) -> None:
    """KeyedTensors or dicts of JaggedTensors: keys in order, widths and values."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name in theirs:
            assert ours[name].lengths().tolist() == theirs[name].lengths().tolist()
            torch.testing.assert_close(ours[name].values(), theirs[name].values(), rtol=1e-5, atol=1e-5)
    else:
        assert ours.keys() == theirs.keys() and ours.length_per_key() == theirs.length_per_key()
        torch.testing.assert_close(ours.values(), theirs.values(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stages", [ONE_WORD, TWO_WORDS])
@pytest.mark.parametrize("kind", [EmbeddingBagCollection, EmbeddingCollection])
@pytest.mark.parametrize("names", [["item"], ["item", "other_items"]])
def test_output_is_that_of_the_original(stages, kind, names):
    codec = make_codec(stages)
    tables = TABLES | {"other_items": ["bought"]}
    lengths = LENGTHS | {"bought": [0, 4, 1]}
    model = make_tables(kind, tables)
    bags = model.embedding_bags if kind is EmbeddingBagCollection else model.embeddings
    for name in ("item", "other_items"):
        bags[name].weight.data.copy_(codec.decode(make_items(codec)[0]))
    rows, sids = (make_batch(c, lengths) for c in (None, codec))
    if names == ["item"]:  # the other table keeps reading rows
        sids = KeyedJaggedTensor.concat([make_batch(codec, LENGTHS), rows.permute([rows.keys().index("bought")])])
    expected = model(rows)
    user = bags["user"].weight
    replaced = replace_tables(model, dict.fromkeys(names, codec), mode="decoded")
    assert_same(replaced(sids), expected)
    assert type(replaced.tables) is kind and replaced.tables.device.type == "cpu"
    kept = dict(replaced.named_parameters())
    assert [name.split(".")[2] for name in kept] == [name for name in tables if name not in names]
    assert next(iter(kept.values())) is user  # the parameter itself, with its optimizer and hooks


@pytest.mark.parametrize("stages", [ONE_WORD, TWO_WORDS])
@pytest.mark.parametrize("case", ["mean", "weighted", "variable batch", "mean of variable batch"])
def test_pooled_output_is_that_of_the_original(stages, case):
    codec = make_codec(stages)
    model = make_tables(
        EmbeddingBagCollection,
        vector_ND=make_items(codec)[1],
        pooling=PoolingType.MEAN if "mean" in case else PoolingType.SUM,
        is_weighted=case == "weighted",
    )
    variable = {"lengths": VARIABLE, "inverse": INVERSE} if "variable" in case else {}
    rows, sids = (make_batch(c, weighted=case == "weighted", **variable) for c in (None, codec))
    expected = model(rows)
    replaced = replace_tables(model, {"item": codec}, mode="decoded")
    assert replaced.is_weighted() == (case == "weighted")
    assert_same(replaced(sids), expected)


@pytest.mark.parametrize("kind", [EmbeddingBagCollection, EmbeddingCollection])
def test_shared_features_keep_their_names(kind):
    codec = make_codec(TWO_WORDS)
    tables = {"rows": ["clicked"], "item": ["clicked", "viewed"], "item_too": ["viewed"], "user": ["user"]}
    model = make_tables(kind, tables, vector_ND=make_items(codec)[1])
    rows, sids = make_batch(None), make_batch(codec)
    expected = model(rows)
    assert "clicked@rows" in expected.keys()  # noqa: SIM118 (of a KeyedTensor)
    both = KeyedJaggedTensor.concat([sids, rows.permute([rows.keys().index("clicked")])])
    assert_same(replace_tables(model, {"item": codec, "item_too": codec}, mode="decoded")(both), expected)


@pytest.mark.parametrize("mode", ["digits", "decoded"])
@pytest.mark.parametrize("kind", [EmbeddingBagCollection, EmbeddingCollection])
def test_other_widths_are_mapped(mode, kind):
    codec = make_codec()
    codec = Codec(codec.spec, codec.offset_D[:5], tuple(table[:, :5] for table in codec.digit_tables))
    replaced = replace_tables(make_tables(kind), {"item": codec}, mode=mode)
    weight_DV = replaced.projections["item"].weight
    words_NW, _ = make_items(codec)
    digits_NL = codec.spec.unpack(words_NW).long()
    values = [stage.values()[digits_NL[:, j]] for j, stage in enumerate(codec.spec.stages)]
    vector_ND = (codec.decode(words_NW) if mode == "decoded" else torch.cat(values, dim=1)) @ weight_DV.T
    original = make_tables(kind, vector_ND=vector_ND.detach())
    output = replaced(make_batch(codec))
    assert_same(output, original(make_batch(None)))
    (output.values() if kind is EmbeddingBagCollection else output["clicked"].values()).sum().backward()
    assert weight_DV.grad.abs().sum() > 0


def test_learned_rows_start_as_the_frozen_ones_and_train():
    codec = make_codec("onehot:5,ternary*4")
    batch = make_batch(codec)
    outputs = []
    for learned in (False, True):
        torch.manual_seed(0)
        collection = replace_tables(make_tables(EmbeddingBagCollection), {"item": codec}, learned=learned)
        outputs.append(collection(batch).values())
    torch.testing.assert_close(*outputs)
    outputs[1].square().sum().backward()
    gradients = [p.grad for name, p in collection.named_parameters() if name.startswith("side.")]
    assert len(gradients) == 1 and gradients[0].any()


def test_digits_are_left_out_in_training_alone():
    codec = make_codec("onehot:5,ternary*4")
    batch, outputs = make_batch(codec), []
    for digit_dropout in (0.0, 0.5):
        torch.manual_seed(0)
        tables = make_tables(EmbeddingBagCollection)
        collection = replace_tables(tables, {"item": codec}, digit_dropout=digit_dropout)
        outputs.append(collection.eval()(batch).values())
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    first, second = (collection.train()(batch).values() for _ in range(2))
    assert (first != outputs[1]).any() and (first != second).any()


def test_every_table_at_once_or_one_after_another():
    codec, other = make_codec(), make_codec(TWO_WORDS, "bbbb")
    vector_ND = codec.decode(make_items(codec)[0])
    original = make_tables(EmbeddingBagCollection, {"item": ["clicked"], "item_too": ["viewed"]}, vector_ND=vector_ND)
    original.embedding_bags["item_too"].weight.data.copy_(make_items(other)[1])
    lengths = {"clicked": [3, 0, 2]}, {"viewed": [2, 1, 0]}
    rows = KeyedJaggedTensor.concat([make_batch(None, part) for part in lengths])
    sids = KeyedJaggedTensor.concat([make_batch(c, part) for c, part in zip((codec, other), lengths, strict=True)])
    at_once = replace_tables(copy.deepcopy(original), {"item_too": other, "item": codec}, mode="decoded")
    assert at_once.tables is None and list(at_once.parameters()) == []
    assert_same(at_once(sids), original(rows))
    in_turn = replace_tables(copy.deepcopy(original), {"item_too": other}, mode="decoded")
    assert replace_tables(in_turn, {"item": codec}, mode="decoded") is in_turn
    assert_same(in_turn(sids), original(rows))


class Sequences(nn.Module):
    """Two histories from one collection, which is held under three names, two of them side by side."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.embeddings = make_tables(EmbeddingCollection, device=device)
        self.same = self.embeddings
        self.again = nn.ModuleList([self.embeddings])
        self.score = nn.Linear(DIM, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        clicked, viewed = self.embeddings(features)["clicked"], self.again[0](features)["viewed"]
        return self.score(clicked.to_padded_dense(4).sum(1) - viewed.to_padded_dense(4).sum(1))


def make_dlrm(device: torch.device | None = None) -> DLRM:
    return DLRM(make_tables(EmbeddingBagCollection, device=device), 4, [8, DIM], [8, 1])


def test_a_collection_is_replaced_wherever_it_is_held():
    model = Sequences()
    assert replace_tables(model, {"item": make_codec()}) is model
    assert model.embeddings is model.same is model.again[0] and type(model.embeddings.tables) is EmbeddingCollection
    assert model(make_batch(make_codec())).shape == (3, 1)


@pytest.mark.parametrize("make", [make_dlrm, Sequences])
def test_models_trace_quantize_and_copy(make):
    codec = make_codec()
    model = replace_tables(make(), {"item": codec}).eval()
    arguments = (make_batch(codec),) if make is Sequences else (torch.randn(3, 4), make_batch(codec))
    expected = model(*arguments)
    for other in (torch.fx.symbolic_trace(model), copy.deepcopy(model)):
        torch.testing.assert_close(other(*arguments), expected)
    quantized = quantize_inference_model(copy.deepcopy(model))
    torch.testing.assert_close(quantized(*arguments), expected, rtol=0, atol=1e-2)
    modules = [type(module).__module__ for module in quantized.modules()]
    assert "torchrec.quant.embedding_modules" in modules and "torchrec.modules.embedding_modules" not in modules


def test_mode_of_training_stays():
    assert not replace_tables(make_dlrm().eval(), {"item": make_codec()}).sparse_arch.embedding_bag_collection.training


def test_meta_stays_meta_and_side_is_real():
    codec = make_codec()
    model = replace_tables(make_dlrm(torch.device("meta")), {"item": codec}, mode="decoded")
    collection = model.sparse_arch.embedding_bag_collection
    assert {p.device.type for p in collection.tables.parameters()} == {collection.tables.device.type} == {"meta"}
    assert collection.device.type == "cpu"
    for values in (model.to_empty(device="cpu"), model.half().float()):  # neither may cost SIDE its constants
        collection = values.sparse_arch.embedding_bag_collection
        pooled = expand_and_pool(collection.side, collection._side_tables, make_batch(codec), False)
        reference = make_tables(EmbeddingBagCollection, {"item": TABLES["item"]}, vector_ND=make_items(codec)[1])
        torch.testing.assert_close(pooled, reference(make_batch(None)).values().detach(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="SIDE 'item' cannot be built on the meta device"):
        replace_tables(make_dlrm(), {"item": codec}, device=torch.device("meta"))


def managed(collection: EmbeddingBagCollection) -> nn.Module:
    """The collection behind TorchRec's remapping of ids, which would remap SIDs."""
    modules = {
        config.name: MCHManagedCollisionModule(
            zch_size=ITEMS,
            device=torch.device("cpu"),
            eviction_interval=10,
            eviction_policy=DistanceLFU_EvictionPolicy(),
        )
        for config in collection.embedding_bag_configs()
    }
    remap = ManagedCollisionCollection(modules, collection.embedding_bag_configs())
    return ManagedCollisionEmbeddingBagCollection(collection, remap)


def two_collections() -> nn.Module:
    return nn.ModuleDict({"a": make_tables(EmbeddingBagCollection), "b": make_tables(EmbeddingCollection)})


@pytest.mark.parametrize(
    ("make", "codecs", "message"),
    [
        (make_dlrm, {"itm": ONE_WORD}, r"no table 'itm'; those that can be replaced: \['ad', 'item', 'user'\]$"),
        (make_dlrm, {}, r"no table named; those that can be replaced: \['ad', 'item', 'user'\]"),
        (two_collections, {"item": ONE_WORD}, "table 'item' is in a and b; call replace_tables on the submodule"),
        (
            lambda: quantize_inference_model(make_dlrm()),
            {"item": ONE_WORD},
            r"no table 'item'; .*: \[\]. Not looked into: sparse_arch.embedding_bag_collection \(.* of torchrec.quant",
        ),
        (
            lambda: managed(make_tables(EmbeddingBagCollection)),
            {"item": ONE_WORD},
            r"Not looked into: the model itself \(ManagedCollisionEmbeddingBagCollection",
        ),
        (
            lambda: SIDEBagCollection([SIDEConfig(name="item", feature_names=["a"], codec=make_codec())]),
            {"item": ONE_WORD},
            r"Not looked into: the model itself \(SIDEBagCollection",
        ),
        (
            partial(make_tables, EmbeddingCollection, need_indices=True),
            {"item": ONE_WORD},
            "table 'item' is in a collection that returns indices",
        ),
        (
            partial(make_tables, EmbeddingBagCollection, TABLES | {"more": ["viewed"]}),
            {"item": ONE_WORD},
            "key 'viewed' of the KeyedJaggedTensor would have to carry SIDs and ids, for tables 'item' and 'more'",
        ),
        (
            partial(make_tables, EmbeddingBagCollection, is_weighted=True, pooling=PoolingType.MEAN),
            {"item": ONE_WORD},
            "mean pooling takes no weights",
        ),
    ],
)
def test_refusals_leave_the_model_as_it_was(make, codecs, message):
    model = make()
    before = list(model.named_modules())
    with pytest.raises(ValueError, match=message):
        replace_tables(model, {name: make_codec(stages) for name, stages in codecs.items()})
    assert list(model.named_modules()) == before


def test_wrong_arguments_are_refused():
    codec, other = make_codec(), make_codec(fingerprint="bbbb")
    with pytest.raises(TypeError, match="table 'item': expected a Codec, got SIDSpec"):
        replace_tables(make_dlrm(), {"item": codec.spec})
    with pytest.raises(ValueError, match="SIDE 'item': mode must be one of digits, decoded; got 'digit'"):
        replace_tables(make_dlrm(), {"item": codec}, mode="digit")
    shared = make_tables(EmbeddingBagCollection, {"item": ["clicked"], "item_too": ["clicked"]})
    with pytest.raises(ValueError, match="key 'clicked' .* SIDs of one codec and of another"):
        replace_tables(shared, {"item": codec, "item_too": other})
    ids_left_in = make_batch(None)
    ids_left_in.values().sub_(10**9)
    replaced = replace_tables(make_tables(EmbeddingBagCollection, {"item": ["clicked"]}), {"item": codec})
    assert isinstance(replaced, ReplacedBagCollection)
    with pytest.raises(DataError, match="feature 'clicked': row 0"):
        replaced(ids_left_in)
