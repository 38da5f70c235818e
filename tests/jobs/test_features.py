"""Features through the jobs: trained, evaluated, predicted, exported; predictions are the same everywhere."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.data.format import DataFolder, DataSchema
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.jobs import evaluate, export, predict, train_ranker
from sidrec_torchrec.ranker.predictor import Predictor
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import WithWords, alone, requests_of
from sidrec_torchrec.training.group import process_group
from tests.jobs.test_predict import TESTED, cut_by_user, evaluated, untied
from tests.jobs.test_train_ranker import SMALL, assert_two_processes_equal, make_config

SCHEMA = DataSchema(
    event_features=("device", "hour:dense:6"),
    item_features=("category",),
    history_features=("dwell:dense:4",),
    event_weight="weight",
    user_columns=("segment", "genres", "region", "rooms"),
)
GENRES = ("folk", "jazz", "pop")
CODES = dataclasses.replace(SMALL, attention="codes", learned_queries=1, top_events=5)
RANKERS = {"codes": ("side", CODES), "ids": ("id", dataclasses.replace(SMALL, blocks=1, block_events=8))}


@pytest.fixture(scope="module")
def featured(corpus, tmp_path_factory) -> Path:
    """The corpus with features of events: a device that changes what is liked, an hour, and a dwell time that tells the label.

    Its users have lists, some empty, some with a value twice."""
    folder = tmp_path_factory.mktemp("featured")
    (folder / "items.parquet").symlink_to(corpus / "items.parquet")
    events, users = pq.read_table(corpus / "events.parquet"), pq.read_table(corpus / "users.parquet")
    rng, label_N = np.random.default_rng(0), events["label"].to_numpy()
    lists = [[None, []], *(rng.choice(GENRES, (2, n)).tolist() for n in rng.integers(1, 5, len(users) - 1))]
    for name, column in zip(("genres", "rooms"), zip(*lists, strict=True), strict=True):
        users = users.append_column(name, pa.array(column, pa.list_(pa.string())))
    pq.write_table(users, folder / "users.parquet")
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
    config = make_config(featured, sequences["train"], sids, out, arm, model=model, epochs=5, batch_events=512)
    config = dataclasses.replace(config, arm_options=dataclasses.replace(config.arm_options, digit_dropout=0.0))
    return config, train_ranker.main(config)


def test_a_feature_that_tells_the_label_is_learned_and_one_known_afterwards_does_not_leak(trained):
    """The device tells 81% of the labels, which nothing else does; the dwell time would tell all of them."""
    config, result = trained
    assert 0.5 < result["test"]["ne_all"] < 0.98
    assert evaluate.main(evaluate.EvaluateConfig(ranker=config.out)) == result["test"]


def test_two_processes_equal_one(trained, tmp_path, run_distributed):
    """Weights and codes of items too: what a batch weighs is of all processes."""
    config, one = trained
    if config.arm != "side":  # rows are dropped by each process
        return
    assert_two_processes_equal(config, one, tmp_path / "two", run_distributed)
    assert (
        one["test"]["targets_all"] < 0.6 * open_prepared(config.prepared).counts["test"]["targets"]
    )  # sums of weights


@pytest.mark.parametrize("is_cut", [False, True])
def test_prediction_is_what_evaluation_says(is_cut, trained, featured, sequences, tmp_path, monkeypatch):
    if is_cut:
        cut_by_user(monkeypatch)
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
    users = pq.read_table(featured / "users.parquet").to_pandas()
    np.testing.assert_allclose(predictor.predict(frame, users=users), expected_R, rtol=0, atol=1e-5)
    users["genres"] = users["rooms"]
    assert np.abs(predictor.predict(frame, users=users) - expected_R).max() > 1e-4
    with pytest.raises(DataError, match="no feature of requests 'device'"):
        predictor.predict(requests.drop_columns(["device"]))
    with pytest.raises(DataError, match="events: no feature 'dwell'"):
        predictor.predict(requests, events=events.drop_columns(["dwell"]))


@pytest.mark.parametrize("is_cut", [False, True])
def test_newest_events_are_asked_for_with_their_own_features(
    is_cut, trained, featured, sequences, tmp_path, monkeypatch
):
    if is_cut:
        cut_by_user(monkeypatch)
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
    assert metadata["inputs"]["user_values_V"] == ["user values"]
    assert metadata["inputs"]["user_lengths_BL"] == ["requests", 2]
    assert list(metadata["user_features"]) == ["segment", "region"]
    assert metadata["user_lists"] == {name: list(GENRES) for name in ("genres", "rooms")}
    scorer = Scorer(file)
    with process_group() as processes, torch.no_grad():
        parts = config.open()
        ranker = parts.whole(torch.device("cpu")).eval()
        TrainedRanker.open(config.out).load(ranker)
        features = WithWords(parts.arm)
        small = alone(next(iter(config.batches(parts.prepared, features, "test", processes))), 50)
        expected = ranker(small)[1].prediction[:, 0]
    inputs = requests_of(small, features.words(small), 3, ("genres", "rooms"))
    torch.testing.assert_close(scorer(**inputs), expected, rtol=0, atol=1e-5)
    for name, message in (
        ("feature_NF", r"feature_NF\[0, 3\] is 9, expected 0 to 4"),
        ("known_MF", r"known_MF\[0, 2\] is 9, expected 0 to 4"),
    ):
        spoilt = inputs[name].clone()
        spoilt[0, -1] = 9
        with pytest.raises(DataError, match=message):
            scorer(**inputs | {name: spoilt})
    values_V, first = inputs["user_values_V"], int(inputs["user_lengths_BL"].flatten().argmax())
    first = int(inputs["user_lengths_BL"].flatten()[:first].sum())  # of a list of several values
    for changed, message in (
        (values_V + 3, r"user_values_V\[0\] is \d, expected 1 to 3"),
        (values_V * 0, r"user_values_V\[0\] is 0, expected 1 to 3"),
        (values_V[:-1], r"user_lengths_BL add up to"),
        (values_V.index_fill(0, torch.tensor([first, first + 1]), 1), "has a value twice in one list"),
    ):
        with pytest.raises(DataError, match=message):
            scorer(**inputs | {"user_values_V": changed})
    with pytest.raises(DataError, match="missing or unknown inputs: feature_NF, known_MF"):
        scorer(**{name: value for name, value in inputs.items() if name not in ("feature_NF", "known_MF")})


def test_sequences_of_other_codes_are_refused(trained, featured, tmp_path):
    config, _ = trained
    other = prepare(featured, tmp_path / "other", PrepareConfig(**TESTED)).folder
    message = "other codes of events than .* feature 'hour', code 2, is from .*--like"
    with pytest.raises(SidrecError, match=message):
        evaluate.main(evaluate.EvaluateConfig(ranker=config.out, prepared=other))


def test_a_list_that_decides_labels_lowers_ne(corpus, sids, tmp_path):
    """Who has jazz among the genres likes four events of five, others one; history, of one event, can tell little of it."""
    (tmp_path / "items.parquet").symlink_to(corpus / "items.parquet")
    events, users = pq.read_table(corpus / "events.parquet"), pq.read_table(corpus / "users.parquet")
    rng = np.random.default_rng(7)
    genres = [rng.choice(["folk", "jazz", "pop", "rock", "soul"], 2, replace=False).tolist() for _ in range(len(users))]
    has_jazz = {user for user, own in zip(users["user_id"].to_pylist(), genres, strict=True) if "jazz" in own}
    rate_N = np.where(np.isin(events["user_id"].to_numpy(), list(has_jazz)), 0.8, 0.2)
    place = events.schema.get_field_index("label")
    label = pa.array((rng.random(len(events)) < rate_N).astype(np.int8))
    pq.write_table(events.set_column(place, "label", label), tmp_path / "events.parquet")
    pq.write_table(users.append_column("genres", pa.array(genres)), tmp_path / "users.parquet")
    ne = {}
    for name in ("region", "genres"):
        config = PrepareConfig(max_history=1, targets_per_row=1, cold_fraction=0.0, validation_fraction=0.2)
        schema = DataSchema(user_columns=(name,))
        prepared = prepare(DataFolder.of(tmp_path, schema), tmp_path / name, config).folder
        run = make_config(
            tmp_path, prepared, sids, tmp_path / "run" / name, "none", model=SMALL, batch_events=64, epochs=3
        )
        ne[name] = train_ranker.main(run)["test"]["ne_all"]
    entropy = -(0.8 * np.log(0.8) + 0.2 * np.log(0.2)) / np.log(2)
    assert entropy - 0.05 < ne["genres"] < entropy + 0.05 < 0.85 < ne["region"]
