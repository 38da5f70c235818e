"""SIDE inside TorchRec's machinery: fx, export, inference, variable batches, sharding, pipelines and checkpoints."""

import copy
from dataclasses import dataclass, fields

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingType
from torchrec.inference.modules import quantize_inference_model
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from sidrec_torchrec.codec.alphabet import OneHot, parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import NO_SID, SIDSpec, word_names
from sidrec_torchrec.errors import CodecMismatchError, DataError
from sidrec_torchrec.side.collection import SIDEBagCollection, SIDECollection
from sidrec_torchrec.side.expansion import SIDEConfig
from sidrec_torchrec.side.ngram import NgramVectors, PrefixNgram

ITEMS, DIM = 30, 8
ONE_WORD, TWO_WORDS = "onehot:4,ternary*6", "onehot:4,ternary*45"


def make_codec(stages: str = ONE_WORD, fingerprint: str = "aaaa") -> Codec:
    generator = torch.Generator().manual_seed(0)
    spec = SIDSpec(parse_stages(stages), fingerprint)
    tables = tuple(torch.randn(radix, DIM, generator=generator) for radix in spec.radices)
    return Codec(spec, torch.randn(DIM, generator=generator), tables)


def make_items(codec: Codec) -> tuple[Tensor, Tensor]:
    """Words of ITEMS items, and the vectors they should decode to."""
    generator = torch.Generator().manual_seed(1)
    digits_NL = torch.stack([torch.randint(r, (ITEMS,), generator=generator) for r in codec.spec.radices], dim=1)
    vector_ND = codec.offset_D + sum(table[digits_NL[:, j]] for j, table in enumerate(codec.digit_tables))
    return codec.spec.pack(digits_NL), vector_ND


def make_side(codec: Codec, features: list[str], pooling: PoolingType = PoolingType.SUM) -> SIDEBagCollection:
    return SIDEBagCollection(
        tables=[SIDEConfig(name="item", feature_names=features, codec=codec, mode="decoded", pooling=pooling)]
    )


def make_dlrm(codec: Codec) -> tuple[DLRM, tuple[Tensor, KeyedJaggedTensor]]:
    """A DLRM fed by SIDE alone, and arguments for it."""
    torch.manual_seed(0)
    words_NW, _ = make_items(codec)
    sids = KeyedJaggedTensor(keys=["a", "b"], values=words_NW[:10, 0], lengths=torch.tensor([3, 0, 2, 1, 4, 0]))
    model = DLRM(
        make_side(codec, ["a", "b"]),
        dense_in_features=4,
        dense_arch_layer_sizes=[8, DIM],
        over_arch_layer_sizes=[8, 1],
    )
    return model, (torch.randn(3, 4), sids)


def test_models_trace_quantize_and_copy():
    model, arguments = make_dlrm(make_codec())
    expected = model(*arguments).detach()
    for other in (torch.fx.symbolic_trace(model), quantize_inference_model(model), copy.deepcopy(model)):
        torch.testing.assert_close(other(*arguments).detach(), expected)


def test_sequences_trace():
    codec = make_codec()
    _, (_, sids) = make_dlrm(codec)
    side = SIDECollection(tables=[SIDEConfig(name="item", feature_names=["a", "b"], codec=codec)])
    traced = torch.fx.symbolic_trace(side)
    torch.testing.assert_close(traced(sids)["b"].values(), side(sids)["b"].values())


class Plain(nn.Module):
    """SIDE behind plain tensors, which export can keep dynamic."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.side = make_side(codec, ["a"])
        self.keys = word_names("a", codec.spec.num_words)

    def forward(self, values: Tensor, lengths: Tensor) -> Tensor:
        return self.side(KeyedJaggedTensor(keys=self.keys, values=values, lengths=lengths)).values()


@pytest.mark.parametrize("graph", ["export", "compile"])
@pytest.mark.parametrize("stages", [ONE_WORD, TWO_WORDS])
def test_graphs_take_any_number_of_events_and_refuse_wrong_ones(stages, graph):
    codec = make_codec(stages)
    model, W = Plain(codec), codec.spec.num_words
    values_NW, counts = make_items(codec)[0][:10], [4, 0, 6]
    if graph == "export":
        example = (values_NW[:5].T.flatten(), torch.tensor([3, 0, 2] * W))
        dynamic = ({0: torch.export.Dim("N", min=2)}, None)
        run = torch.export.export(model, example, dynamic_shapes=dynamic, strict=False).module()
    else:
        run = torch.compile(model, backend="aot_eager")
    arguments = (values_NW.T.flatten(), torch.tensor(counts * W))
    torch.testing.assert_close(run(*arguments), model(*arguments))
    for bad in (-2, codec.spec.word_limits[-1], *([NO_SID] if W > 1 else [])):
        wrong_NW = values_NW.clone()
        wrong_NW[7, -1] = bad
        with pytest.raises(RuntimeError, match="feature 'a': a word is no packed SID of onehot:4,ternary"):
            run(wrong_NW.T.flatten(), arguments[1])
    if W > 1:
        with pytest.raises(RuntimeError, match="keys 'a_0' and 'a_1' have different lengths"):
            run(arguments[0], torch.tensor([4, 0, 6, 5, 0, 5]))


@pytest.mark.parametrize("stages", [ONE_WORD, TWO_WORDS])
@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
def test_variable_batch_equals_a_frozen_table(stages, pooling):
    codec = make_codec(stages)
    words_NW, vector_ND = make_items(codec)
    table = EmbeddingBagConfig(
        name="item", embedding_dim=DIM, num_embeddings=ITEMS, feature_names=["a", "b"], pooling=pooling
    )
    frozen = EmbeddingBagCollection(tables=[table])
    frozen.embedding_bags["item"].weight.data.copy_(vector_ND)
    item_N = torch.tensor([4, 9, 9, 0, 25, 17, 3])
    lengths, strides = [[3, 0], [1, 1, 2]], [[2], [3]]
    inverse = torch.tensor([[0, 1, 1, 0], [2, 0, 1, 1]])
    items = KeyedJaggedTensor(
        keys=["a", "b"],
        values=item_N,
        lengths=torch.tensor([n for of_feature in lengths for n in of_feature]),
        stride_per_key_per_rank=strides,
        inverse_indices=(["a", "b"], inverse),
    )
    W = codec.spec.num_words
    keys = [f"{f}_{w}" for f in "ab" for w in range(W)] if W > 1 else ["a", "b"]
    item_words = [words_NW[part, w] for part in item_N.split([3, 4]) for w in range(W)]
    sids = KeyedJaggedTensor(
        keys=keys,
        values=torch.cat(item_words),
        lengths=torch.tensor([n for of_feature in lengths for n in of_feature * W]),
        stride_per_key_per_rank=[stride for stride in strides for _ in range(W)],
        inverse_indices=(keys, inverse.repeat_interleave(W, dim=0)),
    )
    ours, theirs = make_side(codec, ["a", "b"], pooling)(sids), frozen(items)
    assert ours.keys() == theirs.keys() and ours.length_per_key() == theirs.length_per_key()
    torch.testing.assert_close(ours.values(), theirs.values().detach(), rtol=1e-5, atol=1e-5)


def test_wrong_batches_are_refused():
    side, words = make_side(make_codec(TWO_WORDS), ["a"]), torch.zeros(4, dtype=torch.int64)

    def batch(keys: list[str], lengths: list[int], values: Tensor = words) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(keys=keys, values=values, lengths=torch.tensor(lengths))

    assert side(batch(["a_0", "a_1"], [1, 1, 1, 1])).values().shape == (2, DIM)
    with pytest.raises(DataError, match=r"feature 'a': the KeyedJaggedTensor has no key 'a_1'; its keys are \['a_0'\]"):
        side(batch(["a_0"], [4]))
    for lengths in ([2, 1, 1, 0], [2, 0, 1, 1]):
        with pytest.raises(DataError, match="keys 'a_0' and 'a_1' have different lengths"):
            side(batch(["a_0", "a_1"], lengths))
    with pytest.raises(DataError, match="feature 'a': words have .* dtype torch.int32, expected int64"):
        side(batch(["a_0", "a_1"], [1, 1, 1, 1], words.int()))
    with pytest.raises(DataError, match="feature 'a': row 1, word 1 is -1, no packed SID"):
        side(batch(["a_0", "a_1"], [1, 1, 1, 1], torch.tensor([0, 0, 0, -1])))
    narrow = SIDEConfig(name="narrow", feature_names=["a"], codec=make_codec(), mode="digits")
    with pytest.raises(ValueError, match="'item' and 'narrow' give 8 and 10 floats"):
        SIDECollection(
            tables=[SIDEConfig(name="item", feature_names=["a"], codec=make_codec(), mode="decoded"), narrow]
        )
    with pytest.raises(ValueError, match="serves no feature"):
        SIDEConfig(name="item", feature_names=[], codec=make_codec())
    with pytest.raises(ValueError, match="unique names"):
        SIDEBagCollection(tables=[])


# SIDE, a sharded pooled table and sharded prefix n-grams in one model, trained from one KeyedJaggedTensor.

NGRAM = PrefixNgram(SIDSpec((OneHot(6),) * 3, "rq"), num_rows=40, depth=3)
STEPS, GLOBAL_BATCH = 5, 8


@dataclass
class Batch(Pipelineable):
    features: KeyedJaggedTensor
    label_B: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device=device, non_blocking=non_blocking) for f in fields(self)))

    def record_stream(self, stream: torch.Stream) -> None:
        for f in fields(self):
            getattr(self, f.name).record_stream(stream)


class Mixed(nn.Module):
    """One candidate per row; returns the loss to train on and, as output, loss and logits, as the train pipeline expects."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        super().__init__()
        self.side = make_side(codec, ["clicked"])
        table = EmbeddingBagConfig(
            name="item_id", embedding_dim=DIM, num_embeddings=ITEMS, feature_names=["item"], init_fn=nn.init.zeros_
        )
        self.tables = EmbeddingBagCollection(tables=[table], device=device)
        self.prefixes = NgramVectors({"text": NGRAM}, embedding_dim=DIM, device=device)
        torch.manual_seed(0)  # here: tables on the meta device draw nothing
        self.over = nn.Sequential(nn.Linear(3 * DIM, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        parts = [
            self.side(batch.features).values(),
            self.tables(batch.features).values(),
            self.prefixes(batch.features),
        ]
        logit_B = self.over(torch.cat(parts, dim=1)).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logit_B, batch.label_B)
        return loss, (loss.detach(), logit_B.detach())


def make_batch(step: int, rows: slice, codec: Codec) -> Batch:
    """These rows of the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    item_B = torch.randint(ITEMS, (GLOBAL_BATCH,), generator=generator)[rows]
    clicked_BC = torch.randint(ITEMS, (GLOBAL_BATCH, 3), generator=generator)[rows]
    count_B = torch.randint(4, (GLOBAL_BATCH,), generator=generator)[rows]
    digits_NL = torch.randint(6, (ITEMS, 3), generator=torch.Generator().manual_seed(99))
    token_BP = NGRAM.tokens(NGRAM.spec.pack(digits_NL))[item_B]
    words_NW, _ = make_items(codec)
    clicked = words_NW[torch.cat([row[:count] for row, count in zip(clicked_BC, count_B, strict=True)]), 0]
    one_B = torch.ones_like(count_B)
    features = KeyedJaggedTensor(
        keys=["clicked", "item", *NGRAM.keys("text")],
        values=torch.cat([clicked, item_B, *token_BP.T]),
        lengths=torch.cat([count_B, one_B, *[one_B] * NGRAM.depth]),
    )
    return Batch(features, (item_B % 2).float())


def shard(model: nn.Module) -> DistributedModelParallel:
    """The pooled table on one process, the prefix table's rows over both; SGD in the backward pass."""
    fused = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.5}
    sharders = [EmbeddingBagCollectionSharder(fused_params=fused), EmbeddingCollectionSharder(fused_params=fused)]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=2, local_world_size=2, compute_device="cpu"),
        constraints={
            "item_id": ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value]),
            "text_ngrams": ParameterConstraints(sharding_types=[ShardingType.ROW_WISE.value]),
        },
    )
    plan = planner.collective_plan(model, sharders, torch.distributed.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def load(model: DistributedModelParallel, checkpoint: str) -> DistributedModelParallel:
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=checkpoint)
    model.load_state_dict(state["model"])
    return model


def train_sharded(checkpoint: str) -> dict:
    """What one of two processes sees; the trained model goes through a distributed checkpoint."""
    codec, rank = make_codec(), torch.distributed.get_rank()
    model = shard(Mixed(codec, torch.device("meta")))
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())), lambda params: torch.optim.SGD(params, lr=0.5)
    )
    pipeline = TrainPipelineSparseDist(model, dense, device=torch.device("cpu"), execute_all_batches=True)
    share = GLOBAL_BATCH // 2
    rows = slice(rank * share, (rank + 1) * share)
    batches = iter([make_batch(step, rows, codec) for step in range(STEPS)])
    losses = [pipeline.progress(batches)[0].item() for _ in range(STEPS)]
    pipeline.detach()
    state = model.state_dict()
    rows_held = {
        name: sum(len(shard.tensor) for shard in state[f"{name}.weight"].local_shards())
        for name in ("tables.embedding_bags.item_id", "prefixes.collection.embeddings.text_ngrams")
    }
    dcp.save({"model": state}, checkpoint_id=checkpoint)
    try:
        load(shard(Mixed(make_codec(fingerprint="bbbb"), torch.device("meta"))), checkpoint)
        refused = ""
    except CodecMismatchError as error:
        refused = str(error)
    restored = load(shard(Mixed(codec, torch.device("meta"))), checkpoint)
    _, (_, after) = restored(make_batch(STEPS, rows, codec))
    return {"losses": losses, "rows": rows_held, "refused": refused, "after": after}


def test_sharded_training_equals_training_in_one_process(run_distributed, tmp_path):
    first, second = run_distributed(train_sharded, 2, str(tmp_path / "checkpoint"))
    codec = make_codec()
    model = Mixed(codec, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        loss, _ = model(make_batch(step, slice(None), codec))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    pairs = zip(first["losses"], second["losses"], strict=True)
    assert [sum(pair) / 2 for pair in pairs] == pytest.approx(losses, abs=1e-5)
    _, (_, logit_B) = model(make_batch(STEPS, slice(None), codec))
    torch.testing.assert_close(torch.cat([first["after"], second["after"]]), logit_B, rtol=1e-4, atol=1e-5)
    item_rows, prefix_rows = zip(*(of_process["rows"].values() for of_process in (first, second)), strict=True)
    assert sorted(item_rows) == [0, ITEMS] and prefix_rows == (NGRAM.num_rows // 2,) * 2  # sharded indeed
    for of_process in (first, second):
        assert "made with codec aaaa, but this is codec bbbb" in of_process["refused"]
