"""TorchRec's models with a table replaced: two processes, the other tables sharded, train as one process does."""

from dataclasses import dataclass, fields
from pathlib import Path

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
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from sidrec_torchrec.errors import CodecMismatchError
from sidrec_torchrec.side.replace import replace_tables
from tests.side.test_in_torchrec import DIM, ITEMS, ONE_WORD, TWO_WORDS, make_codec, make_items

STEPS, GLOBAL_BATCH, HISTORY, DENSE = 4, 8, 3, 4
TABLES = {"user": ["user"], "item": ["clicked", "viewed"], "ad": ["ad"]}
# what each model is tried with: SIDs of one word or two, and what its batches are like
CASES = {"dlrm": ONE_WORD, "dcn, weighted": TWO_WORDS, "projection, variable batch": TWO_WORDS, "sequences": ONE_WORD}


@dataclass
class Batch(Pipelineable):
    dense_BD: Tensor
    features: KeyedJaggedTensor
    label_B: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device=device, non_blocking=non_blocking) for f in fields(self)))

    def record_stream(self, stream: torch.Stream) -> None:
        for f in fields(self):
            getattr(self, f.name).record_stream(stream)


class Sequences(nn.Module):
    """What a user clicked less what they viewed, beside user and ad, from an EmbeddingCollection."""

    def __init__(self, embeddings: EmbeddingCollection) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.over = nn.Linear(4 * DIM + DENSE, 1)

    def forward(self, dense_BD: Tensor, features: KeyedJaggedTensor) -> Tensor:
        output = self.embeddings(features)
        pooled = [output[name].to_padded_dense(HISTORY).sum(1) for name in ("user", "clicked", "viewed", "ad")]
        return self.over(torch.cat([*pooled, dense_BD], dim=1))


class Task(nn.Module):
    """Loss to train on and, as output, loss and logits, as the train pipeline expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        logit_B = self.model(batch.dense_BD, batch.features).squeeze(1)
        loss = nn.functional.binary_cross_entropy_with_logits(logit_B, batch.label_B)
        return loss, (loss.detach(), logit_B.detach())


def make_model(case: str, device: torch.device, fingerprint: str = "aaaa") -> Task:
    """A model whose item table has been replaced; tables start at zero, for on meta they draw nothing."""
    of_bags, common = case != "sequences", {"embedding_dim": DIM, "num_embeddings": ITEMS, "init_fn": nn.init.zeros_}
    config = EmbeddingBagConfig if of_bags else EmbeddingConfig
    tables = [config(name=name, feature_names=features, **common) for name, features in TABLES.items()]
    collection = (
        EmbeddingBagCollection(tables, "weighted" in case, device) if of_bags else EmbeddingCollection(tables, device)
    )
    torch.manual_seed(0)  # here: tables on the CPU draw numbers before init_fn, those on meta none
    if not of_bags:
        model = Sequences(collection)
    else:
        sizes = {"dense_in_features": DENSE, "dense_arch_layer_sizes": [8, DIM], "over_arch_layer_sizes": [8, 1]}
        if "dcn" in case:
            model = DLRM_DCN(collection, **sizes, dcn_num_layers=2, dcn_low_rank_dim=4)
        elif "projection" in case:
            branches = {f"interaction_branch{i}_layer_sizes": [2 * DIM] for i in (1, 2)}
            model = DLRM_Projection(collection, **sizes, **branches)
        else:
            model = DLRM(collection, **sizes)
    return Task(replace_tables(model, {"item": make_codec(CASES[case], fingerprint)}))


def make_batch(case: str, step: int, rows: slice) -> Batch:
    """These rows of the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    words_NW, _ = make_items(make_codec(CASES[case]))
    W = words_NW.shape[1]
    dense_BD = torch.randn(GLOBAL_BATCH, DENSE, generator=generator)[rows]
    size = len(dense_BD)
    keys, values, weights, counts = [], [], [], []
    for feature in ("clicked", "user", "viewed", "ad"):
        row_BH = torch.randint(ITEMS, (GLOBAL_BATCH, HISTORY), generator=generator)[rows]
        weight_BH = torch.rand(GLOBAL_BATCH, HISTORY, generator=generator)[rows]
        count_B = torch.randint(HISTORY + 1, (GLOBAL_BATCH,), generator=generator)[rows]
        of_items = feature in TABLES["item"]
        if not of_items:
            count_B = torch.ones_like(count_B)
        real_BH = torch.arange(HISTORY) < count_B.unsqueeze(1)
        for word in range(W) if of_items else [None]:
            keys.append(feature if W == 1 or word is None else f"{feature}_{word}")
            values.append(row_BH[real_BH] if word is None else words_NW[row_BH[real_BH], word])
            weights.append(weight_BH[real_BH])
            counts.append(count_B)
    label_B = (torch.rand(GLOBAL_BATCH, generator=generator)[rows] < 0.5).float()
    variable = {}
    if "variable" in case:  # each feature's rows backwards: enough to go wrong if indices are not inverted
        counts = [count_B.flip(0) for count_B in counts]
        values = [
            torch.cat([*reversed(v.split(count_B.flip(0).tolist()))]) for v, count_B in zip(values, counts, strict=True)
        ]
        variable["stride_per_key_per_rank"] = [[size]] * len(keys)
        variable["inverse_indices"] = (keys, torch.arange(size).flip(0).repeat(len(keys), 1))
    features = KeyedJaggedTensor(
        keys=keys,
        values=torch.cat(values),
        lengths=torch.cat(counts),
        weights=torch.cat(weights) if "weighted" in case else None,
        **variable,
    )
    return Batch(dense_BD, features, label_B)


def shard(model: nn.Module) -> DistributedModelParallel:
    """Each table on one of the processes (gloo cannot split pooled rows); SGD in the backward pass."""
    fused = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.5}
    sharders = [EmbeddingBagCollectionSharder(fused_params=fused), EmbeddingCollectionSharder(fused_params=fused)]
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=2, local_world_size=2, compute_device="cpu"),
        constraints={t: ParameterConstraints(sharding_types=[ShardingType.TABLE_WISE.value]) for t in ("user", "ad")},
    )
    plan = planner.collective_plan(model, sharders, torch.distributed.GroupMember.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)


def load(model: nn.Module, checkpoint: Path) -> nn.Module:
    state = model.state_dict()
    dcp.load(state, checkpoint_id=checkpoint)
    model.load_state_dict(state)
    return model


def train_sharded(case: str, by_two: Path, by_one: Path) -> dict:
    """What one of two processes sees, training, and reading what one process has trained."""
    rank, meta = torch.distributed.get_rank(), torch.device("meta")
    model = shard(make_model(case, meta))
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())), lambda params: torch.optim.SGD(params, lr=0.5)
    )
    pipeline = TrainPipelineSparseDist(model, dense, device=torch.device("cpu"), execute_all_batches=True)
    share = GLOBAL_BATCH // 2
    rows = slice(rank * share, (rank + 1) * share)
    batches = iter([make_batch(case, step, rows) for step in range(STEPS)])
    losses = [pipeline.progress(batches)[0].item() for _ in range(STEPS)]
    pipelined = len(pipeline._pipelined_modules)
    pipeline.detach()
    state = model.state_dict()
    rows_held = {
        key.split(".")[-2]: sum(len(shard.tensor) for shard in value.local_shards())
        for key, value in state.items()
        if hasattr(value, "local_shards")
    }
    dcp.save(state, checkpoint_id=by_two)
    with pytest.raises(ValueError, match=r"no table 'ad'; .* Not looked into: the model itself \(DistributedModelPara"):
        replace_tables(model, {"ad": make_codec()})
    with pytest.raises(CodecMismatchError, match="made with codec aaaa, but this is codec bbbb"):
        load(shard(make_model(case, meta, fingerprint="bbbb")), by_one)
    restored = load(shard(make_model(case, meta)), by_one)
    _, (_, after) = restored(make_batch(case, STEPS, rows))
    return {"losses": losses, "rows": rows_held, "pipelined": pipelined, "after": after}


def train_all_sharded(folder: Path) -> dict[str, dict]:
    return {case: train_sharded(case, folder / case / "two", folder / case / "one") for case in CASES}


def train_in_one_process(case: str, checkpoint: Path) -> tuple[list[float], Tensor]:
    """Losses, and logits after training."""
    model = make_model(case, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in range(STEPS):
        loss, _ = model(make_batch(case, step, slice(None)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    dcp.save(model.state_dict(), checkpoint_id=checkpoint)
    return losses, model(make_batch(case, STEPS, slice(None)))[1][1]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_sharded_training_equals_training_in_one_process(run_distributed, tmp_path):
    expected = {case: train_in_one_process(case, tmp_path / case / "one") for case in CASES}
    first, second = run_distributed(train_all_sharded, 2, tmp_path)
    for case, (losses, logit_B) in expected.items():
        pairs = zip(first[case]["losses"], second[case]["losses"], strict=True)
        assert [sum(pair) / 2 for pair in pairs] == pytest.approx(losses, abs=1e-5), case
        sharded_B = torch.cat([first[case]["after"], second[case]["after"]])
        torch.testing.assert_close(sharded_B, logit_B, rtol=1e-4, atol=1e-5, msg=case)  # read by two, trained by one
        read_by_one = load(make_model(case, torch.device("cpu")), tmp_path / case / "two")
        _, (_, read_B) = read_by_one(make_batch(case, STEPS, slice(None)))
        torch.testing.assert_close(read_B, logit_B, rtol=1e-4, atol=1e-5, msg=case)  # trained by two, read by one
        ranks = first[case], second[case]
        for table in ("user", "ad"):
            assert sorted(of_rank["rows"][table] for of_rank in ranks) == [0, ITEMS]  # sharded indeed
        assert [of_rank["pipelined"] for of_rank in ranks] == [1, 1]
        with pytest.raises(CodecMismatchError, match="made with codec aaaa, but this is codec bbbb"):
            load(make_model(case, torch.device("cpu"), fingerprint="bbbb"), tmp_path / case / "two")
