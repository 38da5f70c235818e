"""Histories read apart through the jobs, of a log in hive partitions: trained, evaluated, predicted, exported alike."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.format import DataFolder, DataSchema
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.jobs import evaluate, export, predict, train_ranker
from tests.jobs.test_predict import TESTED, evaluated, untied
from tests.jobs.test_train_ranker import SMALL, assert_two_processes_equal, make_config

SCHEMA = DataSchema(event_features=("kind",), event_weight="weight")
APART = dataclasses.replace(SMALL, histories_by="kind", learned_queries=1)
RANKERS = {
    "codes": ("side", dataclasses.replace(APART, attention="codes", top_events=3)),
    "vectors": ("hybrid", dataclasses.replace(APART, blocks=1, block_events=8)),
}
POLICY = EventPolicy(sort=True)


def write_data(folder: Path, corpus: Path, events: pa.Table) -> Path:
    """The corpus with another log: a folder of partitions by kind, which the files do not say."""
    folder.mkdir(exist_ok=True)
    for name in ("items.parquet", "users.parquet"):
        (folder / name).symlink_to(corpus / name)
    for kind in set(events["kind"].to_pylist()):
        part = folder / "events" / f"kind={kind}"
        part.mkdir(parents=True)
        mine = events.filter(pc.equal(events["kind"], kind))
        pq.write_table(mine.drop_columns("kind"), part / "0.parquet")
    DataFolder.of(folder, SCHEMA).write_schema()
    return folder


def in_order(events: pa.Table) -> pa.Table:
    """As jobs sort what they read of the partitions: of what happened together clicks come first, then orders."""
    kind_N = np.array(events["kind"].to_pylist())
    return events.take(np.lexsort((kind_N, events["timestamp"].to_numpy(), events["user_id"].to_numpy())))


@pytest.fixture(scope="module")
def log(corpus) -> pa.Table:
    """The corpus's events, a fifth of them orders, which nobody predicts: each is a 1 that counts nothing."""
    events = pq.read_table(corpus / "events.parquet")
    is_order_N = np.random.default_rng(0).random(len(events)) < 0.2
    label_N = np.where(is_order_N, 1, events["label"].to_numpy()).astype(np.int8)
    events = events.set_column(events.schema.get_field_index("label"), "label", pa.array(label_N))
    events = events.append_column("weight", pa.array(1.0 - is_order_N))
    return in_order(events.append_column("kind", pa.array(np.array(["click", "order"])[is_order_N.astype(int)])))


@pytest.fixture(scope="module")
def data(corpus, log, tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("kinds"), corpus, log)


@pytest.fixture(scope="module")
def sequences(data, tmp_path_factory) -> dict[str, Path]:
    """Sequences to train on, and to test on: a target a row, as a request is."""
    folder = tmp_path_factory.mktemp("sequences")
    config = PrepareConfig(
        max_history=48, targets_per_row=32, cold_fraction=0.2, validation_fraction=0.2, policy=POLICY
    )
    train = prepare(data, folder / "train", config)
    assert train.features.event[0].values == ("click", "order") and train.met["unsorted"]["count"] > 0
    return {"train": train.folder, "test": prepare(data, folder / "test", PrepareConfig(**TESTED), like=train).folder}


@pytest.fixture(scope="module", params=RANKERS)
def trained(request, data, sequences, sids, tmp_path_factory):
    arm, model = RANKERS[request.param]
    out = tmp_path_factory.mktemp("ranker") / request.param
    config = make_config(data, sequences["train"], sids, out, arm, model=model, batch_events=512)
    options = dataclasses.replace(config.arm_options, digit_dropout=0.0, table_dropout=0.0)
    config = dataclasses.replace(config, arm_options=options)
    return config, train_ranker.main(config)


def test_it_learns_and_orders_are_history_alone(trained):
    config, result = trained
    assert result["train_loss"][-1] < result["train_loss"][0]
    targets = open_prepared(config.prepared).counts["test"]["targets"]
    assert 0.7 * targets < result["test"]["targets_all"] < 0.9 * targets
    assert evaluate.main(evaluate.EvaluateConfig(ranker=config.out)) == result["test"]


def test_two_processes_equal_one(trained, tmp_path, run_distributed):
    config, one = trained
    if config.arm != "side":  # nothing here depends on the arm
        return
    assert_two_processes_equal(config, one, tmp_path / "two", run_distributed)


def test_prediction_is_what_evaluation_says(trained, log, sequences, tmp_path):
    config, _ = trained
    expected = evaluated(config.out, sequences["test"], log)
    rows = untied(log, list(expected))
    pq.write_table(log.take(rows).drop_columns(["label", "weight"]), tmp_path / "requests.parquet")
    out = tmp_path / "out.parquet"
    predict.main(predict.PredictConfig(ranker=config.out, requests=tmp_path / "requests.parquet", out=out))
    probability_R = pq.read_table(out)["probability"].to_numpy()
    np.testing.assert_allclose(probability_R, np.concatenate([expected[row] for row in rows]), rtol=0, atol=1e-5)


def test_it_is_exported_as_it_is(trained, tmp_path):
    """The job compares what it wrote with the ranker."""
    config, _ = trained
    file = tmp_path / "ranker.pt2"
    metadata = export.main(export.ExportConfig(ranker=config.out, out=file, compiled=False))
    assert metadata["features"]["event"] == [{"name": "kind", "values": ["click", "order"]}]


def test_a_kind_that_training_did_not_have_is_no_history(trained, data, log, sequences, tmp_path):
    """Prepared like the ranker, such events are counted and read by none: the ranker predicts what it would of other items there."""
    config, _ = trained
    if config.arm != "side":
        return
    kind_N = np.where(np.random.default_rng(1).random(len(log)) < 0.3, "refund", log["kind"])
    log = log.set_column(log.schema.get_field_index("kind"), "kind", pa.array(kind_N.tolist()))
    found = []
    for number, shift in enumerate((0, 1)):
        item_N = np.where(kind_N == "refund", np.roll(log["item_id"], shift), log["item_id"])
        events = in_order(log.set_column(log.schema.get_field_index("item_id"), "item_id", pa.array(item_N)))
        folder = write_data(tmp_path / str(number), data, events)
        own = open_prepared(sequences["train"])
        like = prepare(folder, tmp_path / f"like-{number}", PrepareConfig(**TESTED), like=own)
        found.append(evaluated(config.out, like.folder, events))
    known = [row for row in found[0] if events["kind"][row].as_py() != "refund"]
    assert len(known) > 100
    first, second = (np.concatenate([each[row] for row in known]) for each in found)
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)


def test_what_cannot_be_is_refused(trained, data, log, tmp_path):
    config, _ = trained
    other = dataclasses.replace(config, out=tmp_path / "out", init=config.out)
    for name, message in (
        ("", "its histories are by 'kind', not by ''"),
        ("sort", "histories by 'sort': no such feature"),
    ):
        model = dataclasses.replace(config.model, histories_by=name)
        with pytest.raises(SidrecError, match=message):
            train_ranker.main(dataclasses.replace(other, model=model))
    renamed = log.set_column(
        log.schema.get_field_index("kind"), "kind", pc.if_else(pc.equal(log["kind"], "click"), "view", "order")
    )
    renamed = write_data(tmp_path / "renamed", data, renamed)
    anew = prepare(renamed, tmp_path / "anew", PrepareConfig(policy=POLICY)).folder
    with pytest.raises(SidrecError, match="features of its events have other codes"):
        train_ranker.main(dataclasses.replace(other, data=renamed, prepared=anew))
    assert not (tmp_path / "out").exists()
