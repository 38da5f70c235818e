"""What a model with SIDE keeps in a checkpoint: tensors under names a person can read, and whose codec it is."""

import copy
import json
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.errors import CodecMismatchError
from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, code_attention
from sidrec_torchrec.side.code_attention import CodeAttention, request_ranges
from sidrec_torchrec.side.collection import SIDEBagCollection, SIDECollection
from sidrec_torchrec.side.expansion import SIDEConfig
from sidrec_torchrec.side.replace import replace_tables
from tests.side.test_in_torchrec import make_codec
from tests.side.test_replace import make_batch, make_tables

KINDS = [EmbeddingBagCollection, EmbeddingCollection]


def replaced(kind, fingerprint: str = "aaaa", **options) -> nn.Module:
    return replace_tables(make_tables(kind), {"item": make_codec(fingerprint=fingerprint)}, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_names_a_person_can_read_and_tensors_alone(kind):
    tables = "embedding_bags" if kind is EmbeddingBagCollection else "embeddings"
    kept = {f"tables.{tables}.{name}.weight" for name in ("user", "ad")}
    state = replaced(kind, learned=True).state_dict()
    assert set(state) == kept | {"side.item.rows", "side.item.fingerprint", "projections.item.weight"}
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_an_earlier_version_loads(kind):
    """Its names were longer, and the codec was text."""
    model = replaced(kind, learned=True)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items() if value.is_floating_point()}
    old = {k.replace("side.item.rows", "sides.item._expansions.expansions.item.rows_VE"): v for k, v in state.items()}
    text = {"stages": "ternary*9", "fingerprint": "aaaa"}
    old["sides.item._expansions.expansions.item._extra_state"] = json.dumps(text)
    assert model.load_state_dict(dict(old)).missing_keys == []
    for key, value in state.items():
        torch.testing.assert_close(model.state_dict()[key], value)
    with pytest.raises(CodecMismatchError, match="made with codec aaaa, but this is codec bbbb"):
        replaced(kind, "bbbb", learned=True).load_state_dict(old)


def test_a_collection_of_an_earlier_version_loads():
    config = SIDEConfig(name="item", feature_names=["clicked"], codec=make_codec(fingerprint="aaaa"), learned=True)
    side = SIDECollection([config])
    rows = torch.randn_like(side.state_dict()["tables.item.rows"])
    side.load_state_dict(
        {
            "_expansions.expansions.item.rows_VE": rows,
            "_expansions.expansions.item._extra_state": json.dumps({"fingerprint": "aaaa"}),
        }
    )
    torch.testing.assert_close(side.state_dict()["tables.item.rows"], rows)


def test_a_distributed_checkpoint_of_an_earlier_version_loads_as_a_file(tmp_path):
    model = replaced(EmbeddingBagCollection)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items() if value.is_floating_point()}
    text = {"sides.item._expansions.expansions.item._extra_state": json.dumps({"fingerprint": "aaaa"})}
    dcp.save(state | text, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    dcp_to_torch_save(tmp_path / "checkpoint", tmp_path / "file.pt")
    model.load_state_dict(torch.load(tmp_path / "file.pt"))
    for key, value in state.items():
        torch.testing.assert_close(model.state_dict()[key], value)


@pytest.mark.parametrize("kind", KINDS)
def test_another_codec_is_refused_however_it_was_read(kind, tmp_path):
    source, target = replaced(kind), replaced(kind, "a fingerprint that is much longer than any of ours is, truly")
    with pytest.raises(CodecMismatchError, match="made with codec aaaa, but this is codec a fingerprint that"):
        target.load_state_dict(source.state_dict())
    dcp.save(source.state_dict(), checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    state = target.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)  # into the module's own tensors
    with pytest.raises(CodecMismatchError, match="made with codec aaaa"):
        target.load_state_dict(state)
    again = replaced(kind)
    state = again.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    again.load_state_dict(state)


def test_fingerprints_that_differ_in_their_ends_alone_are_told_apart():
    source, target = (replaced(EmbeddingBagCollection, "a" * 70 + end) for end in "bc")
    with pytest.raises(CodecMismatchError, match=r"made with codec a{47}~\w{16}, but this is codec a{70}c"):
        target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("name", ["device", "side", "tables", "vectors"])
def test_a_table_may_have_any_name_that_torchrec_takes(name):
    config = SIDEConfig(name=name, feature_names=["clicked"], codec=make_codec(fingerprint="aaaa"))
    for side in (SIDECollection([config]), SIDEBagCollection([config])):
        assert list(side.state_dict()) == [f"tables.{name}.fingerprint"]
    table = EmbeddingBagConfig(name=name, embedding_dim=4, num_embeddings=2, feature_names=["clicked"])
    model = replace_tables(EmbeddingBagCollection(tables=[table]), {name: config.codec})
    assert f"side.{name}.fingerprint" in model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_pickled_and_copied(kind):
    """As ``torch.save`` of a whole model and processes that are spawned do."""
    model, batch = replaced(kind), make_batch(make_codec())
    expected = model(batch)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for name in list(expected.keys()):
            outputs = [output[name] for output in (other(batch), expected)]
            torch.testing.assert_close(*[x if isinstance(x, torch.Tensor) else x.values() for x in outputs])


def test_moves_and_casts_keep_whose_it_is():
    model = replaced(EmbeddingBagCollection)
    before = model.state_dict()["side.item.fingerprint"].clone()
    for change in (lambda m: m.half().float(), lambda m: m.to_empty(device="cpu"), lambda m: m.double().float()):
        assert torch.equal(change(model).state_dict()["side.item.fingerprint"], before)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("stages", ["ternary*9", "ternary*50"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_collection_compiles_whole(kind, stages, learned):
    torch._dynamo.reset()
    codec = make_codec(stages)
    torch.manual_seed(0)
    model = replace_tables(make_tables(kind), {"item": codec}, learned=learned)
    batch = make_batch(codec)
    outputs = [run(batch) for run in (model, torch.compile(model, backend="eager", fullgraph=True))]
    if kind is EmbeddingBagCollection:
        torch.testing.assert_close(*[output.values() for output in outputs])
    else:
        for name in outputs[0]:
            torch.testing.assert_close(*[output[name].values() for output in outputs])


def test_digit_dropout_compiles_whole():
    torch._dynamo.reset()
    model = replaced(EmbeddingBagCollection, digit_dropout=0.5).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert compiled(make_batch(make_codec(fingerprint="aaaa"))).values().isfinite().all()


@pytest.mark.parametrize("learned", [False, True])
def test_code_attention_compiles_whole(learned):
    torch._dynamo.reset()
    config = SIDEConfig(name="item", feature_names=["clicked"], codec=make_codec(), learned=learned)
    attention = CodeAttention(config, dim=16, num_heads=2, side_information={"action": 3}, time_gaps=True)
    batch, query_MD = make_batch(make_codec()), torch.randn(3, 16)

    def run(features, query_MD):
        history = attention.events.read(features, "clicked")
        begin_M, end_M = history.offsets()[:-1], history.offsets()[1:]
        time_N = torch.arange(len(history.values()))
        action_N1 = torch.ones(len(time_N), 1, dtype=torch.int64)
        return attention(query_MD, history.values(), begin_M, end_M, action_N1, time_N, torch.full((3,), 100))

    whole = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(batch, query_MD), run(batch, query_MD))


def test_integers_of_any_width():
    """As TorchRec's own data sets and the Criteo loaders have them."""
    config = SIDEConfig(name="item", feature_names=["clicked"], codec=make_codec())
    attention = CodeAttention(config, dim=16, num_heads=2, side_information={"action": 3}, time_gaps=True)
    collections = [SIDECollection([config]), SIDEBagCollection([config])]
    batch = make_batch(make_codec())
    narrow = KeyedJaggedTensor(keys=batch.keys(), values=batch.values(), lengths=batch.lengths().int())
    query_MD, outputs = torch.randn(3, 16), []
    for features, cast in ((batch, lambda x: x), (narrow, lambda x: x.int())):
        history = attention.events.read(features, "clicked")
        time_N, action_N1 = cast(torch.arange(5)), cast(torch.tensor([[0], [1], [2], [0], [1]]))
        begin_M, end_M = request_ranges(cast(history.offsets()), cast(torch.tensor([1, 1, 1])))
        for begin, end in ((begin_M, end_M), (cast(history.offsets()[:-1]), cast(history.offsets()[1:]))):
            outputs.append(
                attention(query_MD, history.values(), begin, end, action_N1, time_N, cast(torch.full((3,), 100)))
            )
        outputs.append(collections[0](features)["clicked"].values())
        outputs.append(collections[1](features).values())
    for wide, slim in zip(outputs[:4], outputs[4:], strict=True):
        torch.testing.assert_close(slim, wide, rtol=0, atol=0)


@pytest.mark.parametrize("narrow", ["begin_M", "end_M", "event_time_N", "query_time_M", "words_NW"])
def test_the_operator_takes_integers_of_any_width(narrow, monkeypatch):
    spec = make_codec("ternary*9").spec
    inputs = {
        "words_NW": spec.pack(torch.randint(3, (5, 9))),
        "begin_M": torch.tensor([0, 3]),
        "end_M": torch.tensor([3, 5]),
        "scores_MVH": torch.randn(2, 27 + GAP_BUCKETS, 2),
        "event_time_N": torch.arange(5),
        "query_time_M": torch.tensor([50, 60]),
    }
    layout = None, list(spec.layout.radices), list(spec.layout.words), 0
    slim = inputs | {narrow: inputs[narrow].int()}
    for mode in ("", "reference"):
        monkeypatch.setenv("SIDREC_OPS", mode)
        results = [code_attention(*given.values(), *layout, True) for given in (inputs, slim)]
        torch.testing.assert_close(*results, rtol=0, atol=0)
