"""What every arm and reader says of itself agrees with what it does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.ranker.arms import ARMS, Arm, ArmConfig, ArmInputs, Needs, SIDArray, Tokenizers
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import RankerHead
from sidrec_torchrec.ranker.readers import READERS

ITEMS, EVENTS = 30, 20
CPU = torch.device("cpu")
CONFIG = ArmConfig(table_dim=8, ngram_rows=100)


def make_sids(folder: Path, stages: str) -> SIDArray:
    spec = SIDSpec(parse_stages(stages), stages)
    np.save(folder / f"{len(stages)}.npy", spec.pack(torch.randint(3, (ITEMS, spec.num_digits))).numpy())
    return SIDArray(
        folder / f"{len(stages)}.npy", Codec(spec, torch.zeros(4), tuple(torch.randn(r, 4) for r in spec.radices))
    )


def make_inputs(kind: type[Arm], folder: Path, num_sids: int = 1) -> ArmInputs:
    """What it needs and no more."""
    np.save(folder / "text.npy", np.random.default_rng(0).normal(size=(ITEMS, 6)).astype(np.float16))
    np.save(folder / "events.npy", np.arange(ITEMS))
    stages = "ternary*45" if kind.tokenizers is Tokenizers.FUSED else "onehot:8*3"
    sids = {f"tokenizer-{i}": make_sids(folder, stages) for i in range(num_sids)}
    return ArmInputs(
        num_items=ITEMS,
        vectors={"text": folder / "text.npy"} if kind.needs is Needs.VECTORS else {},
        sids=sids if kind.needs is Needs.SIDS else {},
        training_events=folder / "events.npy" if kind.counts_events else None,
    )


@pytest.mark.parametrize("name", list(ARMS))
def test_what_travels_is_what_the_arm_says(name, tmp_path):
    arm = ARMS[name](make_inputs(ARMS[name], tmp_path), CONFIG)
    item_N = np.arange(EVENTS, dtype=np.int32)
    values = arm.values(item_N)
    assert tuple(values) == arm.keys
    if not values:
        assert arm.is_base and not arm.stored(item_N)
        return
    flat = [value.flatten() for value in values.values()]
    lengths = torch.cat([torch.full((EVENTS,), len(value) // EVENTS) for value in flat])
    batch = KeyedJaggedTensor(keys=list(values), values=torch.cat(flat), lengths=lengths)
    assert arm.module(CPU)(batch).shape == (EVENTS, arm.dim)
    assert all(len(column) == EVENTS for column in arm.stored(item_N).values())


@pytest.mark.parametrize("name", list(ARMS))
def test_an_arm_that_travels_as_codes_has_one_sid_to_read(name, tmp_path):
    kind, reader = ARMS[name], READERS["codes"]
    arm = kind(make_inputs(kind, tmp_path), CONFIG)
    assert len(arm.sids) == kind.travels_as_codes
    READERS["vectors"].check_arm(name)
    if not kind.travels_as_codes:
        with pytest.raises(SidrecError, match=f"needs an arm whose SIDs travel: side, learned-side; got '{name}'"):
            reader.check_arm(name)
        return
    reader.check_arm(name)
    values = arm.values(np.arange(EVENTS, dtype=np.int32))
    words = torch.stack([*values.values()], dim=1)
    batch = KeyedJaggedTensor(
        keys=list(values), values=words.T.flatten(), lengths=torch.ones(words.numel(), dtype=torch.int64)
    )
    assert reader.items(arm, CPU)(batch).equal(words)
    two = kind(make_inputs(kind, tmp_path, num_sids=2), CONFIG)
    with pytest.raises(SidrecError, match="attention to codes reads one SID of each event; this arm has 2"):
        reader.items(two, CPU)


def test_one_arm_is_what_gains_are_relative_to():
    assert sum(ARMS[name].is_base for name in ARMS) == 1


@pytest.mark.parametrize("name", list(READERS))
@pytest.mark.parametrize("blocks", [0, 1])
def test_a_reader_is_built_from_the_rankers_config(name, blocks, tmp_path):
    arm = ARMS["side"](make_inputs(ARMS["side"], tmp_path), CONFIG)
    config = RankerConfig(dim=8, num_heads=2, attention=name, learned_queries=2, blocks=blocks)
    reader = RankerHead(config, arm.dim, arm.sids[0], (), CPU, 1).reader
    assert reader.num_pools == (6 if blocks else 3)
    assert reader.unservable is None and reader.reads_codes == (name == "codes")
