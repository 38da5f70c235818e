"""Learned rows that training drops for a share of the events, and what is read in their place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.ranker.arms import ARMS, ArmConfig, ArmInputs, SIDArray

ITEMS, EVENTS = 50, 4_000
CPU = torch.device("cpu")


@pytest.fixture
def sids(tmp_path: Path) -> SIDArray:
    torch.manual_seed(0)
    spec = SIDSpec(parse_stages("ternary*8"), "fingerprint")
    np.save(tmp_path / "sids.npy", spec.pack(torch.randint(3, (ITEMS, 8))).numpy())
    return SIDArray(tmp_path / "sids.npy", Codec(spec, torch.zeros(4), tuple(torch.randn(3, 4) for _ in range(8))))


def build(name: str, sids: SIDArray, p: float) -> tuple[torch.nn.Module, KeyedJaggedTensor]:
    config = ArmConfig(table_dropout=p, digit_dropout=0, table_dim=8)
    arm = ARMS[name](ArmInputs(num_items=ITEMS, sids={"codes": sids}), config)
    values = arm.values(np.random.default_rng(0).integers(0, ITEMS, EVENTS).astype(np.int32))
    keys, tensors = zip(*values.items(), strict=True)
    lengths = torch.ones(EVENTS * len(keys), dtype=torch.int64)
    return arm.module(CPU), KeyedJaggedTensor(keys=list(keys), values=torch.cat(tensors), lengths=lengths)


def test_learned_side_falls_back_to_the_rows_it_started_with(sids):
    module, events = build("learned-side", sids, 0.3)
    start_NE = module.eval()(events).detach().clone()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1.0
    trained_NE = module(events)
    assert (trained_NE - start_NE).abs().min() > 0.5  # all are read, in evaluation
    torch.manual_seed(1)
    x_NE = module.train()(events)
    is_start_N = (x_NE == start_NE).all(1)
    is_trained_N = (x_NE == trained_NE).all(1)
    assert (is_start_N ^ is_trained_N).all()
    assert 0.26 < is_start_N.float().mean() < 0.34
    x_NE[is_start_N].sum().backward()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


def test_table_rows_become_zeros(sids):
    module, events = build("id", sids, 0.3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(2.0)
    assert (module.eval()(events) == 2.0).all()
    torch.manual_seed(1)
    x_NE = module.train()(events)
    dropped_N = (x_NE == 0).all(1)
    assert (x_NE[~dropped_N] == 2.0).all() and 0.26 < dropped_N.float().mean() < 0.34
