"""The jobs on two tasks, one of them with missing labels: train, resume, two processes, evaluate, export, pipeline."""

import dataclasses

import numpy as np
import pytest
import torch

from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.fusion.training import TokenizerTrainingConfig
from sidrec_torchrec.jobs import evaluate, export, pipeline, train_ranker
from sidrec_torchrec.ranker.arms import ArmConfig
from sidrec_torchrec.ranker.breakdown import TABLES
from sidrec_torchrec.ranker.readers import READERS
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import requests_of
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from sidrec_torchrec.training.checkpoints import Checkpoints
from sidrec_torchrec.training.group import process_group
from tests.figures import figures
from tests.jobs.test_train_ranker import SMALL, Killed, make_config, train_here

TASKS = ("label", "like")


@pytest.fixture(scope="module")
def trained(labeled, sequences, sids, tmp_path_factory):
    """A ranker of both tasks that attends to codes: its configuration and result."""
    model = dataclasses.replace(SMALL, attention="codes", task_weights=(1.0, 2.0))
    out = tmp_path_factory.mktemp("ranker") / "codes"
    options = ArmConfig(side_mode="decoded", digit_dropout=0.0)  # which differs between processes
    config = make_config(labeled, sequences, sids, out, "side", model=model, arm_options=options)
    return config, train_ranker.main(config)


def predictions(config, split="test"):
    """Of the best epoch on a split, by the unsharded ranker: probability, label and weight, float64 [S, K]."""
    with process_group() as processes, torch.no_grad():
        parts = config.open()
        ranker = parts.whole(torch.device("cpu")).eval()
        TrainedRanker.open(config.out).load(ranker)
        outputs = [ranker(batch)[1] for batch in parts.batches(split, processes)]
    return [
        torch.cat([getattr(o, name) for o in outputs]).double().numpy() for name in ("prediction", "label", "weight")
    ]


def test_metrics_and_the_choice_of_the_epoch(trained):
    config, result = trained
    assert result["tasks"] == list(TASKS)
    prediction_SK, label_SK, weight_SK = predictions(config)
    counts = open_prepared(config.prepared).counts["test"]["labels"]
    for k, task in enumerate(TASKS):
        known_S = weight_SK[:, k] > 0
        assert known_S.sum() == counts[task] == result["test"][f"targets_all_{task}"]
        p, y = prediction_SK[known_S, k], label_SK[known_S, k]
        rate = y.mean()
        loss = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        assert result["test"][f"ne_all_{task}"] == pytest.approx(loss / entropy, rel=1e-4)
        assert result["test"][f"calibration_all_{task}"] == pytest.approx(p.mean() / rate, rel=1e-4)
    scores = [(values["ne_all_label"] + values["ne_all_like"]) / 2 for values in result["validation"]]
    assert scores == pytest.approx([values["ne_all"] for values in result["validation"]])
    assert result["best_epoch"] == int(np.argmin(scores))
    assert evaluate.main(evaluate.EvaluateConfig(ranker=config.out)) == result["test"]


@pytest.mark.parametrize("attention", list(READERS))
def test_both_tasks_are_learned(attention, labeled, sequences, sids, tmp_path):
    model = dataclasses.replace(SMALL, attention=attention)
    # digits, none dropped: in so small a corpus the decoded vectors of a tokenizer of one epoch say little
    arms = ArmConfig(side_mode="digits", digit_dropout=0.0)
    config = make_config(labeled, sequences, sids, tmp_path / "run", "side", model=model, arm_options=arms, epochs=8)
    result = train_ranker.main(config)
    assert result["train_loss"][-1] < result["train_loss"][0]
    first, best = (result["validation"][epoch] for epoch in (0, result["best_epoch"]))
    for task in TASKS:
        assert best[f"ne_all_{task}"] < first[f"ne_all_{task}"]


def test_an_interrupted_run_goes_on_where_it_was(trained, tmp_path, monkeypatch):
    whole_config, whole = trained
    config = dataclasses.replace(whole_config, out=tmp_path / "killed", checkpoint_batches=2)
    save = Checkpoints.save

    def save_then_die(self, name, state):
        save(self, name, state)
        raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_then_die)
    with pytest.raises(Killed):
        train_ranker.main(config)
    monkeypatch.setattr(Checkpoints, "save", save)
    resumed = train_ranker.main(config)
    assert resumed["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
    assert figures(resumed["test"]) == pytest.approx(figures(whole["test"]), rel=1e-5)


def test_two_processes_equal_one(trained, tmp_path, run_distributed):
    config, one = trained
    first, second = run_distributed(train_here, 2, dataclasses.replace(config, out=tmp_path / "two"))
    assert first == second
    assert first["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
    one_by_table = one["test"]["breakdown"]
    assert {(t, task) for t, of in one_by_table.items() for task in of} == {(t, k) for t in TABLES for k in TASKS}
    first["test"].pop("reliability"), one["test"].pop("reliability")  # a prediction at a bin's edge may change sides
    assert figures(first["test"]) == pytest.approx(figures(one["test"]), abs=1e-3)
    for name in ("ne_all", "ne_all_label", "ne_all_like", "ne_warm_like", "ne_cold_like"):
        assert first["test"][name] == pytest.approx(one["test"][name], abs=1e-4)


def test_the_exported_ranker_scores_both_tasks(trained, tmp_path):
    config, _ = trained
    file = tmp_path / "ranker.pt2"
    metadata = export.main(export.ExportConfig(ranker=config.out, out=file, compiled=False))
    assert metadata["tasks"] == list(TASKS)
    scorer = Scorer(file)
    expected_SK = torch.from_numpy(predictions(config)[0])
    with process_group() as processes:
        batches = config.open().batches("test", processes)
        scored = [scorer(**requests_of(batch, batch.items["sid"].values().unsqueeze(1))) for batch in batches]
    torch.testing.assert_close(torch.cat(scored).double(), expected_SK, rtol=0, atol=1e-5)


def test_refusals(trained, prepared, tmp_path):
    config, _ = trained
    with pytest.raises(SidrecError, match="of the tasks label; the ranker predicts label, like: prepare with"):
        evaluate.main(evaluate.EvaluateConfig(ranker=config.out, prepared=prepared))
    model = dataclasses.replace(SMALL, task_weights=(1.0, 1.0, 1.0))
    with pytest.raises(SidrecError, match="task_weights must name 2, one per task, or none"):
        train_ranker.main(dataclasses.replace(config, out=tmp_path / "run", model=model))
    with pytest.raises(SidrecError, match="task_weights must name 1, one per task"):
        pipeline.PipelineConfig(out=tmp_path, ranker=RankerTrainingConfig(model=model))
    with pytest.raises(ValueError, match="name each task once"):
        PrepareConfig(tasks=("like", "like"))


def test_the_pipeline_reports_every_task(labeled, tmp_path, capsys):
    report = pipeline.main(
        pipeline.PipelineConfig(
            out=tmp_path / "run",
            data=labeled,
            arms=("none", "side"),
            protocol=PrepareConfig(tasks=TASKS),
            tokenizer=TokenizerTrainingConfig(epochs=1),
            ranker=RankerTrainingConfig(epochs=1, batch_events=1024, model=SMALL),
        )
    )
    assert "The tasks are label, like" in report["protocol"]
    for arm in report["arms"].values():
        for kind in ("ne", "auc"):
            means = [np.mean([arm[f"{kind}_warm_{task}"][0] for task in TASKS])]
            assert arm[f"{kind}_warm"] == pytest.approx(means)
    base, other = (report["arms"][name]["ne_cold_like"][0] for name in ("none", "side"))
    assert report["arms"]["side"]["ne_gain_cold_like"] == pytest.approx((base - other) / base)
    printed, page = capsys.readouterr().out, (tmp_path / "run" / "report.html").read_text()
    assert "side: like" in printed and "<td>side: like</td>" in page
    labels = report["data"]["summary"]["labels"]
    assert labels["label"]["missing"] == 0 < labels["like"]["missing"]
