"""Numbers to be predicted through the jobs: trained, evaluated, predicted, exported, reported; the same everywhere."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.jobs import evaluate, export, pipeline, predict, train_ranker
from sidrec_torchrec.ranker.predictor import Predictor
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from tests.jobs.test_predict import TESTED, cut_by_user, evaluated, untied
from tests.jobs.test_train_ranker import SMALL, make_config, train_here

TASKS = ("label", "dwell:log")


@pytest.fixture(scope="module")
def watched(corpus, tmp_path_factory) -> Path:
    """The corpus with a dwell time that depends on the user's segment, unknown here and there: all but a ninth of its variance, as a logarithm.

    So do the labels, that there is something to choose an epoch by.
    """
    folder = tmp_path_factory.mktemp("watched")
    for name in ("items.parquet", "users.parquet"):
        (folder / name).symlink_to(corpus / name)
    events, users = pq.read_table(corpus / "events.parquet"), pq.read_table(corpus / "users.parquet").to_pandas()
    rng, N = np.random.default_rng(0), len(events)
    segment_N = users.set_index("user_id")["segment"].str[-1].astype(int)[events["user_id"].to_numpy()].to_numpy()
    dwell_N = np.exp(2 + segment_N + 0.4 * rng.normal(size=N))
    label = pa.array((rng.random(N) < np.array([0.1, 0.3, 0.6, 0.9])[segment_N]).astype(np.int8))
    events = events.set_column(events.schema.get_field_index("label"), "label", label)
    pq.write_table(
        events.append_column("dwell", pa.array(dwell_N, mask=rng.random(N) < 0.2)), folder / "events.parquet"
    )
    return folder


@pytest.fixture(scope="module")
def sequences(watched, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sequences") / "train"
    config = PrepareConfig(max_history=48, targets_per_row=32, cold_fraction=0.2, validation_fraction=0.2, tasks=TASKS)
    return prepare(watched, folder, config).folder


@pytest.fixture(scope="module")
def trained(watched, sequences, sids, tmp_path_factory):
    model = dataclasses.replace(SMALL, attention="codes", learned_queries=1)
    out = tmp_path_factory.mktemp("ranker") / "codes"
    config = make_config(watched, sequences, sids, out, "side", model=model, epochs=5, batch_events=128)
    config = dataclasses.replace(config, arm_options=dataclasses.replace(config.arm_options, digit_dropout=0.0))
    return config, train_ranker.main(config)


def test_a_number_is_foretold_better_than_by_its_mean_and_labels_choose_the_epoch(trained):
    config, result = trained
    assert result["tasks"] == ["label", "dwell"]
    test = result["test"]
    assert 0.08 < test["nmse_all_dwell"] < 0.3 and test["nmse_all"] == test["nmse_all_dwell"]
    assert test["targets_all_dwell"] == open_prepared(config.prepared).counts["test"]["labels"]["dwell"]
    assert test["targets_all_dwell"] < test["targets_all_label"]
    scores = [values["ne_all"] for values in result["validation"]]
    assert scores == [values["ne_all_label"] for values in result["validation"]]
    assert result["best_epoch"] == int(np.argmin(scores))
    rows = test["breakdown"]["history_length"]["dwell"]
    assert sum(row["targets"] for row in rows) == test["targets_all_dwell"]
    assert evaluate.main(evaluate.EvaluateConfig(ranker=config.out)) == test


def test_two_processes_equal_one(trained, tmp_path, run_distributed):
    config, one = trained
    first, second = run_distributed(train_here, 2, dataclasses.replace(config, out=tmp_path / "two"))
    assert first == second
    assert first["train_loss"] == pytest.approx(one["train_loss"], abs=1e-3)
    for name in ("ne_all_label", "mse_all_dwell", "nmse_warm_dwell", "nmse_cold_dwell", "targets_all_dwell"):
        assert first["test"][name] == pytest.approx(one["test"][name], rel=2e-3)


@pytest.mark.parametrize("is_cut", [False, True])
def test_predictions_are_those_of_evaluation_on_the_scale_of_the_log(
    is_cut, trained, watched, sequences, tmp_path, monkeypatch
):
    if is_cut:
        cut_by_user(monkeypatch)
    config, _ = trained
    tested = prepare(
        watched, tmp_path / "tested", PrepareConfig(**TESTED | {"test_fraction": 0.1}), like=open_prepared(sequences)
    ).folder
    events = pq.read_table(watched / "events.parquet")
    expected = evaluated(config.out, tested, events)
    rows = untied(events, list(expected))
    expected_RK = np.stack([expected[row] for row in rows])
    requests = events.take(rows).select(["user_id", "item_id", "timestamp"])
    pq.write_table(requests, tmp_path / "requests.parquet")
    out = tmp_path / "out.parquet"
    predict.main(predict.PredictConfig(ranker=config.out, requests=tmp_path / "requests.parquet", out=out))
    table = pq.read_table(out)
    assert table.column_names[3:] == ["probability_label", "predicted_dwell"]
    np.testing.assert_allclose(table["probability_label"], expected_RK[:, 0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(table["predicted_dwell"], expected_RK[:, 1], rtol=1e-4, atol=1e-5)
    dwell_R = events["dwell"].take(rows).to_numpy()
    known_R = ~np.isnan(dwell_R)
    assert np.corrcoef(np.log(dwell_R[known_R]), np.log1p(expected_RK[known_R, 1]))[0, 1] > 0.7
    # histories need no dwell times, and no requests do
    without = events.drop_columns(["dwell"])
    np.testing.assert_allclose(Predictor.open(config.out, events=without).predict(requests), expected_RK, rtol=1e-4)


def test_sequences_of_another_scale_are_read_with_the_ranker_s_own(trained, watched, tmp_path):
    config, _ = trained
    protocol = PrepareConfig(max_history=48, targets_per_row=32, test_fraction=0.5)
    anew = prepare(watched, tmp_path / "anew", dataclasses.replace(protocol, tasks=TASKS))
    like = prepare(watched, tmp_path / "like", protocol, like=open_prepared(config.prepared))
    assert anew.regressions != like.regressions
    both = [evaluate.main(evaluate.EvaluateConfig(ranker=config.out, prepared=p.folder)) for p in (anew, like)]
    for name in ("mse_all_dwell", "nmse_all_dwell", "ne_all_label"):
        assert both[0][name] == both[1][name]
    assert both[1]["drift"]["value_mean"]["dwell"][1] > 0
    other = prepare(watched, tmp_path / "other", dataclasses.replace(protocol, tasks=("label",)))
    with pytest.raises(SidrecError, match="of the tasks label; the ranker predicts label, dwell:log"):
        evaluate.main(evaluate.EvaluateConfig(ranker=config.out, prepared=other.folder))
    plain = dataclasses.replace(config, prepared=other.folder, out=tmp_path / "run", init=config.out)
    with pytest.raises(SidrecError, match="cannot start from this ranker: it predicts label, dwell:log, not label"):
        train_ranker.main(plain)


def test_an_exported_ranker_says_which_predictions_are_values(trained, tmp_path):
    config, _ = trained
    file = tmp_path / "ranker.pt2"
    metadata = export.main(
        export.ExportConfig(ranker=config.out, out=file, compiled=False)
    )  # which compares predictions
    assert metadata["tasks"] == ["label"] and metadata["regressions"] == ["dwell"]
    assert Scorer(file).metadata["regressions"] == ["dwell"]


def test_the_pipeline_reports_numbers_alone(watched, tmp_path, capsys):
    config = pipeline.PipelineConfig(
        out=tmp_path / "run",
        data=watched,
        arms=("none", "id"),
        protocol=PrepareConfig(tasks=("dwell:log",)),
        ranker=RankerTrainingConfig(epochs=3, batch_events=64, model=SMALL),
    )
    report = pipeline.main(config)
    assert "Predicted as numbers: dwell" in report["protocol"]
    base, other = (report["arms"][name]["nmse_cold"][0] for name in ("none", "id"))
    assert max(base, other) < 0.97 and "ne_cold" not in report["arms"]["id"]
    assert report["arms"]["id"]["nmse_gain_cold"] == pytest.approx((base - other) / base)
    assert report["data"]["summary"]["labels"].keys() == {"dwell"}
    printed, page = capsys.readouterr().out, (tmp_path / "run" / "report.html").read_text()
    assert "id (NMSE)" in printed and "<td>id (NMSE)</td>" in page and "dwell (NMSE)" in page
    runs = [json.loads(path.read_text()) for path in (tmp_path / "run").rglob("metrics.json")]
    for run in (run for run in runs if "best_epoch" in run):
        scores = [values["nmse_all"] for values in run["validation"]]
        assert run["best_epoch"] == int(np.argmin(scores))
