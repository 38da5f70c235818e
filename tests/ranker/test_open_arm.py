"""What is laid out for an arm: nothing that only other sequences than those it is trained on could tell."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.seen_by import seen_by
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.ranker.arms import ARMS, Arm, ArmConfig, open_arm
from sidrec_torchrec.ranker.arms.open import arm_inputs
from sidrec_torchrec.ranker.trained_on import TrainedOn
from tests.data.test_prepare import write_corpus


@pytest.fixture
def counting(monkeypatch):
    """An arm that counts events, registered for one test."""
    monkeypatch.setattr(ARMS, "_entries", dict(ARMS._entries))

    @ARMS.register("counting")
    class Counting(Arm):
        counts_events = True

        def __init__(self, inputs, config):
            self.events = np.load(inputs.training_events)

        def values(self, item_N):
            return {"count": torch.from_numpy(self.events[item_N])}

        def module(self, device):
            return torch.nn.Identity()

    return Counting


def test_events_are_counted_of_the_sequences_a_ranker_is_trained_on(counting, tmp_path):
    data = tmp_path / "data"
    write_corpus(data)
    own = prepare(data, tmp_path / "own", PrepareConfig(seed=0))
    other = prepare(data, tmp_path / "other", PrepareConfig(seed=1))
    assert not np.array_equal(own.training_events(), other.training_events())
    arm = open_arm("counting", ArmConfig(), data=data, prepared=own)
    assert arm.events.tolist() == own.training_events().tolist()
    inputs = arm_inputs("counting", data=data, prepared=other)
    tested = counting(TrainedOn(own).met("counting", inputs, seen_by(own, other)), ArmConfig())
    assert tested.events.tolist() == own.training_events().tolist()


def test_an_arm_that_does_not_say_so_is_not_given_other_items(counting, tmp_path):
    for name, more in (("one", []), ("two", [7])):
        write_corpus(tmp_path / name)
        ids = pq.read_table(tmp_path / name / "items.parquet")["item_id"].to_pylist() + more
        pq.write_table(pa.table({"item_id": pa.array(ids, pa.int64())}), tmp_path / name / "items.parquet")
    one = prepare(tmp_path / "one", tmp_path / "p1", PrepareConfig())
    two = prepare(tmp_path / "two", tmp_path / "p2", PrepareConfig())
    inputs = arm_inputs("counting", data=tmp_path / "two", prepared=two)
    with pytest.raises(SidrecError, match="the arm 'counting' cannot be given other items than it was trained on"):
        TrainedOn(one).met("counting", inputs, seen_by(one, two))


def test_only_arms_that_count_have_events_counted(tmp_path):
    write_corpus(tmp_path / "data")
    prepared = prepare(tmp_path / "data", tmp_path / "out", PrepareConfig())
    open_arm("id", ArmConfig(), data=tmp_path / "data", prepared=prepared)
    assert not (prepared.folder / "arrays").exists()
