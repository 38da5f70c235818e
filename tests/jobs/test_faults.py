"""Training that meets what it should not: numbers that are not finite, labels that are all the same."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.cli import main as cli
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.errors import DivergedError, SidrecError
from sidrec_torchrec.jobs import evaluate, train_ranker
from sidrec_torchrec.jobs.train_ranker import TrainRankerConfig
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.training import RankerTraining


@pytest.fixture
def config(corpus, prepared, tmp_path) -> TrainRankerConfig:
    return TrainRankerConfig(
        data=corpus,
        prepared=prepared,
        out=tmp_path / "run",
        arm="none",
        epochs=2,
        batch_events=1024,
        model=RankerConfig(dim=16, num_heads=2, head_dims=(16, 8)),
    )


def test_a_ranker_that_diverges_names_and_keeps_the_batch(config, monkeypatch):
    steps = RankerTraining.steps

    def then_with_a_rate_too_large(self, epoch, first, before_step):
        if epoch == 1:
            self.optimizer.config = dataclasses.replace(self.optimizer.config, learning_rate=1e30)
        yield from steps(self, epoch, first, before_step)

    monkeypatch.setattr(RankerTraining, "steps", then_with_a_rate_too_large)
    with pytest.raises(
        DivergedError, match=r"none: training diverged in epoch 2, batch \d+ \(.* the best epoch before"
    ):
        train_ranker.main(config)
    assert not (config.out / "metrics.json").exists()
    (path,) = config.out.glob("diverged-epoch-2-*.npz")
    batch = np.load(path)
    assert batch["action_N"].shape == batch["timestamp_N"].shape == (batch["lengths_B"].sum(),)
    assert evaluate.main(evaluate.EvaluateConfig(ranker=config.out))["ne_all"] > 0  # of the epoch before


def test_weights_that_overflow_in_an_epochs_last_step_are_no_epoch_to_keep(config, monkeypatch):
    validate = RankerTraining.validate

    def spoilt(self, progress):
        next(self.model.parameters()).data.fill_(np.inf)
        return validate(self, progress)

    monkeypatch.setattr(RankerTraining, "validate", spoilt)
    with pytest.raises(DivergedError, match=r"epoch 1, batch .*validation: \d+ predictions are not finite"):
        train_ranker.main(config)
    assert not (config.out / "checkpoints" / "best").exists()


def test_its_exit_code_tells_that_running_again_is_no_use(config, capsys):
    flags = ["--data", config.data, "--prepared", config.prepared, "--out", config.out, "--arm", "none"]
    flags += ["--optimizer.learning-rate", "1e30", "--epochs", "1"]
    assert cli(["train-ranker", *map(str, flags)]) == 3
    assert "error: none: training diverged in epoch 1, batch 2" in capsys.readouterr().err


def test_labels_that_are_all_the_same_tell_nothing(corpus, config, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(corpus, data)
    events = pq.read_table(data / "events.parquet")
    label = np.zeros(len(events), np.int8)
    label[0] = 1  # one positive, in training
    place = events.schema.get_field_index("label")
    pq.write_table(events.set_column(place, "label", pa.array(label)), data / "events.parquet")
    prepare(data, tmp_path / "sequences", PrepareConfig(max_history=48, targets_per_row=32, cold_fraction=0.2))
    config = dataclasses.replace(config, data=data, prepared=tmp_path / "sequences", epochs=1)
    for _ in range(2):  # when it is read back, too
        with pytest.raises(SidrecError, match="tell nothing of a ranker .'all': all .* have one label"):
            train_ranker.main(config)
    test = json.loads((config.out / "metrics.json").read_text())["test"]
    assert test["ne_all"] is test["auc_all"] is None and test["targets_all"] > 0
    with pytest.raises(SidrecError, match=r"test: its targets tell nothing"):
        evaluate.main(evaluate.EvaluateConfig(ranker=config.out, out=tmp_path / "values.json"))
    assert json.loads((tmp_path / "values.json").read_text())["ne_all"] is None
