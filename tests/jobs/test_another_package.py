"""An arm and a reader of another package: one class each, found by entry point, and nothing else to change."""

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.jobs import evaluate, train_ranker
from sidrec_torchrec.jobs.pipeline import PipelineConfig
from sidrec_torchrec.jobs.train_ranker import TrainRankerConfig
from sidrec_torchrec.ranker.arms import ARMS, Arm
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.readers import READERS, VectorReader
from sidrec_torchrec.ranker.training import RankerTrainingConfig


class Parity(Arm):
    """Whether the item's row is even."""

    keys = ("parity",)

    def values(self, item_N):
        return {"parity": torch.from_numpy(item_N % 2).float()}

    def module(self, device):
        return ParityVectors()


class ParityVectors(nn.Module):
    def forward(self, items):
        return items["parity"].values().unsqueeze(1)


class Forgetful(VectorReader):
    """Reads half of what it pools."""

    def forward(self, batch, items, targets):
        q_SD, pooled_SPD = super().forward(batch, items, targets)
        return q_SD, pooled_SPD * 0.5


@pytest.fixture
def another_package(monkeypatch):
    module = ModuleType("another_package")
    module.Parity, module.Forgetful = Parity, Forgetful
    monkeypatch.setitem(sys.modules, "another_package", module)
    for registry, name, value in ((ARMS, "parity", "Parity"), (READERS, "forgetful", "Forgetful")):
        point = EntryPoint(name, f"another_package:{value}", f"sidrec_torchrec.{registry.kind}s")
        monkeypatch.setitem(registry._points, name, point)
    yield
    for registry, name in ((ARMS, "parity"), (READERS, "forgetful")):
        registry._entries.pop(name, None)


def test_an_arm_and_a_reader_of_another_package(another_package, corpus, prepared, tmp_path):
    model = RankerConfig(dim=16, num_heads=2, head_dims=(16, 8), attention="forgetful")
    PipelineConfig(out=tmp_path, arms=("parity", "none"), ranker=RankerTrainingConfig(model=model))
    config = TrainRankerConfig(
        data=corpus, prepared=prepared, out=tmp_path / "run", arm="parity", epochs=1, batch_events=1024, model=model
    )
    result = train_ranker.main(config)
    assert result["bytes_per_event_kjt"] == 4 and np.isfinite(result["test"]["ne_all"])
    assert evaluate.main(evaluate.EvaluateConfig(ranker=config.out)) == result["test"]


def test_without_it_they_are_unknown():
    with pytest.raises(SidrecError, match="unknown arm 'parity'; there are none, raw"):
        PipelineConfig(out="out", arms=("parity",))
