"""Features through the jobs: trained, evaluated, predicted, exported; predictions are the same everywhere."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.data.format import DataFolder, DataSchema
from sidrec_torchrec.data.prepare import PrepareConfig, open_prepared, prepare
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.jobs import evaluate, export, predict, train_ranker
from sidrec_torchrec.ranker.predictor import Predictor
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import WithWords, alone, requests_of
from sidrec_torchrec.training.group import process_group
from tests.jobs.test_predict import TESTED, evaluated, untied
from tests.jobs.test_train_ranker import SMALL, make_config, train_here

SCHEMA = DataSchema(
    event_features=("device", "hour:dense:6"),
    item_features=("category",),
    history_features=("dwell:dense:4",),
    event_weight="weight",
)
CODES = dataclasses.replace(SMALL, attention="codes", learned_queries=1, top_events=5)
RANKERS = {"codes": ("side", CODES), "ids": ("id", dataclasses.replace(SMALL, blocks=1, block_events=8))}


@pytest.fixture(scope="module")
def featured(corpus, tmp_path_factory) -> Path:
    """The corpus with features of events: a device that changes what is liked, an hour, and a dwell time that tells the label."""
    folder = tmp_path_factory.mktemp("featured")
    for name in ("items.parquet", "users.parquet"):
        (folder / name).symlink_to(corpus / name)
    events = pq.read_table(corpus / "events.parquet")
    rng, label_N = np.random.default_rng(0), events["label"].to_numpy()
    is_missing_N = rng.random(len(events)) < 0.1
    device_N = np.where(rng.random(len(events)) < 0.2, rng.integers(0, 2, len(events)), label_N)
    events = events.append_column("device", pa.array(np.array(["tv", "phone"])[device_N], mask=is_missing_N))
    events = events.append_column("hour", pa.array(events["timestamp"].to_numpy() // 3600 % 24))
    dwell_N = label_N * 100.0 + rng.random(len(events))
    events = events.append_column("dwell", pa.array(dwell_N))
    events = events.append_column("weight", pa.array(rng.random(len(events))))
    pq.write_table(events, folder / "events.parquet")
    DataFolder.of(folder, SCHEMA).write_schema()
    return folder


@pytest.fixture(scope="module")
def sequences(featured, tmp_path_factory) -> dict[str, Path]:
    """Sequences to train on, and to test on: a target a row, as a request is."""
    folder = tmp_path_factory.mktemp("sequences")
    config = PrepareConfig(max_history=48, targets_per_row=32, cold_fraction=0.2, validation_fraction=0.2)
    train = prepare(featured, folder / "train", config)
    test = prepare(featured, folder / "test", PrepareConfig(**TESTED), like=train)
    return {"train": train.folder, "test": test.folder}


@pytest.fixture(scope="module", params=RANKERS)
def trained(request, featured, sequences, sids, tmp_path_factory):
    arm, model = RANKERS[request.param]
    out = tmp_path_factory.mktemp("ranker") / request.param
    config = make_config(featured, sequences["train"], sids, out, arm, model=model, epochs=4, batch_events=512)
    config = dataclasses.replace(config, arm_options=dataclasses.replace(config.arm_options, digit_dropout=0.0))
    return config, train_ranker.main(config)


def test_a_feature_that_tells_the_label_is_learned_and_one_known_afterwards_does_not_leak(trained):
    """The device tells 81% of the labels, which nothing else does; the dwell time would tell all of them."""
    config, result = trained
    assert 0.5 < result["test"]["ne_all"] < 0.96
    assert evaluate.main(evaluate.EvaluateConfig(ranker=config.out)) == result["test"]


def test_two_processes_equal_one(trained, tmp_path, run_distributed):
    """Weights and codes of items too: what a batch weighs is of all processes."""
    config, one = trained
    if config.arm != "side":  # rows are dropped by each process
        return
    first, second = run_distributed(train_here, 2, dataclasses.replace(config, out=tmp_path / "two"))
    assert first == second
    assert first["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
    for name in ("ne_all", "ne_warm", "ne_cold", "targets_all"):
        assert first["test"][name] == pytest.approx(one["test"][name], rel=1e-3)
    assert (
        one["test"]["targets_all"] < 0.6 * open_prepared(config.prepared).counts["test"]["targets"]
    )  # sums of weights


def test_prediction_is_what_evaluation_says(trained, featured, sequences, tmp_path):
    config, _ = trained
    events = pq.read_table(featured / "events.parquet")
    expected = evaluated(config.out, sequences["test"], events)
    rows = untied(events, list(expected))
    requests = events.take(rows).drop_columns(["label", "dwell", "weight"])
    pq.write_table(requests, tmp_path / "requests.parquet")
    out = tmp_path / "out.parquet"
    predict.main(predict.PredictConfig(ranker=config.out, requests=tmp_path / "requests.parquet", out=out))
    expected_R = np.concatenate([expected[row] for row in rows])
    np.testing.assert_allclose(pq.read_table(out)["probability"].to_numpy(), expected_R, rtol=0, atol=1e-5)
    predictor = Predictor.open(config.out)
    np.testing.assert_allclose(predictor.predict(requests), expected_R, rtol=0, atol=1e-5)
    frame = requests.to_pandas()
    np.testing.assert_allclose(
        predictor.predict(frame, events=events.to_pandas().drop(columns="weight")), expected_R, rtol=0, atol=1e-5
    )
    with pytest.raises(DataError, match="no feature of requests 'device'"):
        predictor.predict(requests.drop_columns(["device"]))
    with pytest.raises(DataError, match="events: no feature 'dwell'"):
        predictor.predict(requests, events=events.drop_columns(["dwell"]))


def test_newest_events_are_asked_for_with_their_own_features(trained, featured, sequences, tmp_path):
    config, _ = trained
    events = pq.read_table(featured / "events.parquet")
    expected = evaluated(config.out, sequences["test"], events)
    predict.main(predict.PredictConfig(ranker=config.out, newest=2, out=tmp_path / "out.parquet"))
    table = pq.read_table(tmp_path / "out.parquet")
    found = dict(zip(table["event_row"].to_pylist(), table["probability"].to_pylist(), strict=True))
    rows = [row for row in found if row in expected]
    assert len(rows) > 100
    np.testing.assert_allclose([found[r] for r in rows], np.concatenate([expected[r] for r in rows]), rtol=0, atol=1e-5)


def test_an_exported_ranker_says_which_features_it_reads_and_refuses_others(trained, tmp_path):
    config, _ = trained
    if config.arm != "side":
        return
    file = tmp_path / "ranker.pt2"
    metadata = export.main(export.ExportConfig(ranker=config.out, out=file, compiled=False))
    assert [feature["name"] for feature in metadata["features"]["event"]] == ["device", "hour"]
    assert metadata["features"]["event"][0]["values"] == ["phone", "tv"]
    assert len(metadata["features"]["history"][0]["bounds"]) == 3
    assert metadata["inputs"]["feature_NF"] == ["events", 4] and metadata["inputs"]["known_MF"] == ["candidates", 3]
    scorer = Scorer(file)
    with process_group() as processes, torch.no_grad():
        parts = config.open()
        ranker = parts.whole(torch.device("cpu")).eval()
        TrainedRanker.open(config.out).load(ranker)
        features = WithWords(parts.arm)
        small = alone(next(iter(config.batches(parts.prepared, features, "test", processes))), 50)
        expected = ranker(small)[1].prediction[:, 0]
    inputs = requests_of(small, features.words(small), 3)
    torch.testing.assert_close(scorer(**inputs), expected, rtol=0, atol=1e-5)
    for name, message in (
        ("feature_NF", r"feature_NF\[0, 3\] is 9, expected 0 to 4"),
        ("known_MF", r"known_MF\[0, 2\] is 9, expected 0 to 4"),
    ):
        spoilt = inputs[name].clone()
        spoilt[0, -1] = 9
        with pytest.raises(DataError, match=message):
            scorer(**inputs | {name: spoilt})
    with pytest.raises(DataError, match="missing or unknown inputs: feature_NF, known_MF"):
        scorer(**{name: value for name, value in inputs.items() if name not in ("feature_NF", "known_MF")})


def test_sequences_of_other_codes_are_refused(trained, featured, tmp_path):
    config, _ = trained
    other = prepare(featured, tmp_path / "other", PrepareConfig(**TESTED)).folder
    message = "other codes of events than .* feature 'hour', code 2, is from .*--like"
    with pytest.raises(SidrecError, match=message):
        evaluate.main(evaluate.EvaluateConfig(ranker=config.out, prepared=other))
