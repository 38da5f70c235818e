"""NE by bucket against its definition, event by event in numpy; one process and two; what is not known or not defined."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from sidrec_torchrec.data.batches import SequenceBatches
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import Prepared, open_prepared
from sidrec_torchrec.data.seen_by import seen_by
from sidrec_torchrec.data.tasks import UNKNOWN, label_of
from sidrec_torchrec.files import read_json, write_json
from sidrec_torchrec.ranker.breakdown import TABLES, Breakdown, Past, TargetFacts
from sidrec_torchrec.ranker.evaluation import evaluate_in_detail
from sidrec_torchrec.ranker.model import RankerOutput
from sidrec_torchrec.ranker.target_sums import TargetSums
from sidrec_torchrec.ranker.targets import Targets
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import Stage

CPU = torch.device("cpu")
DAY = 86_400
START = 1_790_812_800  # 2026-10-01
ITEMS = 60
TASKS = ("label", "like")
from tests.figures import figures


class NoFeatures:
    keys = ()

    def values(self, item_N):
        return {}


def probability(item, time, k):
    """What the model below predicts of task k: anything that differs."""
    return 0.05 + 0.9 * ((item * 37 + time // 60 * 11 + 5 * k) % 101) / 101


class KnownModel(nn.Module):
    """Predicts by formula, in a ranker's shape."""

    def forward(self, batch):
        targets = Targets.of(batch)
        item_S, time_S = batch.item_N[targets.event_S].long(), batch.timestamp_N[targets.event_S]
        label_SK = torch.stack([label_of(batch.action_N[targets.event_S], k) for k in range(len(TASKS))], 1)
        p_SK = torch.stack([probability(item_S, time_S, k) for k in range(len(TASKS))], 1)
        weight_SK = batch.weight_B[targets.row_S].unsqueeze(1) * (label_SK != UNKNOWN)
        empty = torch.zeros(())
        return empty, RankerOutput(p_SK.float(), (label_SK == 1).float(), weight_SK, empty, batch.global_targets)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A folder, and its events: 70 days, from items with thousands of events to those that come on the last days."""
    folder = tmp_path_factory.mktemp("log")
    rng = np.random.default_rng(0)
    count = 7000
    time_N = np.sort(rng.integers(0, 70 * DAY, count))
    often_U = 1 / np.arange(1, 601)  # some users of hundreds of events, some of one; and the first, of thousands
    user_N = np.where(rng.random(count) < 0.3, 0, rng.choice(600, count, p=often_U / often_U.sum()))
    began_I = np.concatenate([np.zeros(ITEMS - 30), rng.uniform(0.5, 1, 30) * 70 * DAY])
    weight_I = np.concatenate([[40, 10, 10], rng.uniform(0.01, 1, ITEMS - 33), np.full(30, 0.5)])
    item_N = np.zeros(count, np.int64)
    for n, time in enumerate(time_N):
        there_I = weight_I * (began_I <= time)
        item_N[n] = rng.choice(ITEMS, p=there_I / there_I.sum())
    label_N = rng.integers(0, 2, count)
    like_N = [
        None if missing else int(value) for missing, value in zip(rng.random(count) < 0.3, rng.integers(0, 2, count))
    ]
    pq.write_table(pa.table({"item_id": np.arange(ITEMS, dtype=np.int64)}), folder / "items.parquet")
    columns = {
        "user_id": user_N,
        "item_id": item_N,
        "timestamp": START + time_N,
        "label": label_N.astype(np.int8),
        "like": pa.array(like_N, pa.int8()),
    }
    events = pa.table(columns)
    pq.write_table(events, folder / "events.parquet")
    return folder, events.to_pylist()


def prepare_from(log, out: Path, day: int, **changes) -> Prepared:
    protocol = {"split": "time", "test_from": START + day * DAY, "validation_fraction": 0.0, "tasks": TASKS}
    return prepare(log[0], out, PrepareConfig(**protocol | {"max_history": 10_000, "targets_per_row": 40} | changes))


def measure(folder: Path, trained_on: Path) -> dict:
    """Of this process's share."""
    tested = seen_by(open_prepared(trained_on), open_prepared(folder))
    with process_group() as processes:
        batches = SequenceBatches(
            tested, "test", NoFeatures(), batch_events=4000, rank=processes.rank, world_size=processes.world_size
        )
        return evaluate_in_detail(KnownModel(), batches, processes, Stage())


def bucket_of(table: str, value: int) -> str:
    """By its own words."""
    if table in ("item_age", "model_age"):
        first = "no earlier event" if table == "item_age" else "before it"
        if value < 0 or (value == 0 and table == "item_age"):
            return first
        return next(
            (
                words
                for days, words in ((1, "under 1 day"), (7, "1 to 7 days"), (30, "7 to 30 days"))
                if value < days * DAY
            ),
            "30 days and more",
        )
    if value == 0:
        return "0"
    if table == "item_training_events":
        most = ((4, "1 to 4"), (19, "5 to 19"), (99, "20 to 99"), (999, "100 to 999"))
    else:
        most = ((9, "1 to 9"), (49, "10 to 49"), (199, "50 to 199"), (999, "200 to 999"))
    return next((words for limit, words in most if value <= limit), "1,000 and more")


def by_definition(events: list[dict], trained_until: int, tested_from: int, tested_until: int) -> dict:
    """(table, task, bucket): [p, label] of its targets."""
    user_N, item_N, time_N = (np.array([e[name] for e in events]) for name in ("user_id", "item_id", "timestamp"))
    trained_N = time_N < trained_until
    found: dict = {}
    for place, event in enumerate(events):
        if not tested_from <= event["timestamp"] < tested_until:
            continue
        values = {
            "item_training_events": (item_N[trained_N] == event["item_id"]).sum(),
            "item_age": event["timestamp"] - time_N[item_N == event["item_id"]].min(),
            "history_length": (user_N[:place] == event["user_id"]).sum(),
            "model_age": event["timestamp"] - time_N[trained_N].max(),
        }
        for k, task in enumerate(TASKS):
            if event[task] is not None:
                p = probability(event["item_id"], event["timestamp"], k)
                for table, value in values.items():
                    found.setdefault((table, task, bucket_of(table, value)), []).append((p, event[task]))
    return found


def check(breakdown: dict, expected: dict) -> None:
    assert list(breakdown) == list(TABLES) and all(list(rows_of) == list(TASKS) for rows_of in breakdown.values())
    found = 0
    for table, rows_of in breakdown.items():
        for task, rows in rows_of.items():
            assert [row["bucket"] for row in rows] == list(TABLES[table].buckets)
            for row in rows:
                targets = np.array(expected.get((table, task, row["bucket"]), np.empty((0, 2)))).T
                check_row(row, *targets)
                found += len(targets[0])
    assert found == sum(map(len, expected.values()))


def check_row(row: dict, p: np.ndarray, label: np.ndarray) -> None:
    assert (row["targets"], row["positives"]) == (len(p), label.sum())
    if not 0 < label.sum() < len(label):
        assert row["ne"] is None and row["note"] in ("no targets", "positives alone", "negatives alone")
        return
    rate = label.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    loss = -np.where(label == 1, np.log(p), np.log(1 - p)).mean()
    assert row["ne"] == pytest.approx(loss / entropy, rel=1e-5) and "note" not in row
    assert row["calibration"] == pytest.approx(p.mean() / rate, rel=1e-5)


def test_every_bucket_is_its_definition(log, tmp_path):
    prepared = prepare_from(log, tmp_path / "out", 35)
    cut = START + 35 * DAY
    values = measure(prepared.folder, prepared.folder)
    expected = by_definition(log[1], cut, cut, START + 99 * DAY)
    kinds = {(table, bucket) for table, _, bucket in expected}
    everything = {(name, bucket) for name, table in TABLES.items() for bucket in table.buckets}
    assert everything - kinds == {("model_age", "before it")}  # the log has what it takes
    check(values["breakdown"], expected)
    cold = values["breakdown"]["item_training_events"]["label"][0]
    assert (cold["targets"], cold["ne"]) == (
        values["targets_cold_label"],
        pytest.approx(values["ne_cold_label"], rel=1e-5),
    )
    json.dumps(values, allow_nan=False)


def test_two_processes_agree(log, tmp_path, run_distributed):
    folder = prepare_from(log, tmp_path / "out", 35).folder
    one = measure(folder, folder)
    first, second = run_distributed(measure, 2, folder, folder)
    assert first == second
    for name, resampled in one["bootstrap"].items():
        assert first["bootstrap"][name]["replicates"] == pytest.approx(resampled["replicates"], rel=1e-6)
    for task, rows in one["reliability"].items():
        assert figures(rows) == pytest.approx(figures(first["reliability"][task]), rel=1e-12)
        assert sum(row["targets"] for row in rows) == one[f"targets_all_{task}"]
    for table, rows_of in one["breakdown"].items():
        for task, rows in rows_of.items():
            for row, its in zip(rows, first["breakdown"][table][task], strict=True):
                assert {"ne", "calibration"} < row.keys() == its.keys()
                for kind, value in row.items():
                    assert value == (pytest.approx(its[kind], rel=1e-12) if isinstance(value, float) else its[kind])


def test_a_ranker_is_as_old_as_its_own_training(log, tmp_path):
    """Tested on a later week, of which the sequences were prepared with more to train on."""
    own = prepare_from(log, tmp_path / "own", 20)
    later = prepare_from(log, tmp_path / "later", 50, test_until=START + 57 * DAY)
    values = measure(later.folder, own.folder)
    expected = by_definition(log[1], START + 20 * DAY, START + 50 * DAY, START + 57 * DAY)
    assert {bucket for table, _, bucket in expected if table == "model_age"} == {"30 days and more"}
    check(values["breakdown"], expected)
    unseen = {event["item_id"] for event in log[1]} - set(np.flatnonzero(own.seen()).tolist())
    cold = [e for e in log[1] if 50 * DAY <= e["timestamp"] - START < 57 * DAY and e["item_id"] in unseen]
    assert values["targets_cold_label"] == len(cold) > measure(later.folder, later.folder)["targets_cold_label"]


def test_shares_of_users_say_that_training_has_later_events(log, tmp_path):
    config = PrepareConfig(tasks=TASKS, validation_fraction=0.0, cold_fraction=0.0)
    folder = prepare(log[0], tmp_path / "out", config).folder
    earlier, *later = measure(folder, folder)["breakdown"]["model_age"]["label"]
    assert earlier["bucket"] == "before it" and earlier["targets"] > 0.9 * sum(
        row["targets"] for row in [earlier, *later]
    )


def test_what_is_not_known_is_left_out(log, tmp_path):
    prepared = prepare_from(log, tmp_path / "out", 35)
    written = read_json(prepared.folder / "prepared.json")
    del written["last_training_event"]
    write_json(prepared.folder / "prepared.json", written)  # as where nothing trains
    tables = measure(prepared.folder, prepared.folder)["breakdown"]
    assert "model_age" not in tables and "item_age" in tables


@pytest.mark.parametrize(
    ("labels", "note", "calibration"),
    [([1, 1], "positives alone", 0.4), ([0, 0], "negatives alone", None), ([], "no targets", None)],
)
def test_a_bucket_of_one_class_says_so(labels, note, calibration):
    S = len(labels)
    past = Past(np.ones(1, bool), None, None, None)
    breakdown = Breakdown(past, TargetSums(CPU, ("label",)), CPU)
    facts = [TargetFacts(*np.zeros((3, n), int), np.full(n, n)) for n in (S, 20)]
    p_S1, label_S1 = torch.full((S, 1), 0.4), torch.tensor(labels).float().view(-1, 1)
    empty = torch.zeros(())
    breakdown.update(RankerOutput(p_S1, label_S1, torch.ones(S, 1), empty, empty), facts[0])
    mixed = torch.arange(20).view(-1, 1) % 2
    certain = mixed.float()  # predictions of 0 and 1, and right
    breakdown.update(RankerOutput(certain, certain, torch.ones(20, 1), empty, empty), facts[1])
    tables = breakdown.compute()
    assert list(tables) == ["history_length"]
    _, few, many, *_ = tables["history_length"]["label"]
    expected = {"bucket": "1 to 9", "targets": S, "positives": sum(labels), "ne": None}
    assert few == expected | {"calibration": pytest.approx(calibration) if calibration else None, "note": note}
    assert many["ne"] == pytest.approx(0, abs=1e-9) and many["calibration"] == 1
    json.dumps(tables, allow_nan=False)


def test_an_event_without_an_item_is_no_target(log, tmp_path):
    prepared = prepare_from(log, tmp_path / "out", 35)
    batch = next(iter(SequenceBatches(prepared, "test", NoFeatures(), batch_events=500)))
    targets = Targets.of(batch)
    batch.item_N[targets.event_S[3]] = -1
    facts = TargetFacts.of(batch)
    kept_S = np.delete(np.arange(len(targets.event_S)), 3)
    assert facts.item_S.tolist() == batch.item_N[targets.event_S[kept_S]].tolist() and facts.item_S.min() >= 0
    assert facts.history_S.tolist() == (targets.end_S - targets.begin_S)[kept_S].tolist()
