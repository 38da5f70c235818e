"""What an arm costs, against sizes known beforehand."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.ranker.arms import Arm, ArmConfig, ArmInputs
from sidrec_torchrec.ranker.bytes import bytes_per_event, table_bytes
from tests.data.test_prepare import write_corpus


class Noise(Arm):
    """Four random float32 an event: what cannot be compressed."""

    keys = ("noise",)

    def values(self, item_N):
        return {"noise": torch.from_numpy(np.random.default_rng(0).random((len(item_N), 4), np.float32))}

    def stored(self, item_N):
        return {"noise": pa.array(self.values(item_N)["noise"].numpy().reshape(-1).view(np.int32).view(np.float32))}

    def module(self, device):
        return nn.Identity()


def test_incompressible_values_cost_their_size(tmp_path):
    write_corpus(tmp_path / "data", users=100)
    prepared = prepare(tmp_path / "data", tmp_path / "out", PrepareConfig())
    noise = Noise(ArmInputs(num_items=prepared.num_items), ArmConfig())
    costs = bytes_per_event(noise, prepared)
    assert costs["bytes_per_event_kjt"] == 16
    assert costs["bytes_per_event_stored"] == pytest.approx(16, rel=0.15)


def test_tables_and_constants_are_counted():
    model = nn.Module()
    model.items = nn.Module()
    model.items.table = nn.Embedding(10, 4)
    model.items.register_buffer("constant", torch.zeros(3, dtype=torch.int64), persistent=False)
    model.head = nn.Linear(100, 100)
    assert table_bytes(model) == 10 * 4 * 4 + 3 * 8
