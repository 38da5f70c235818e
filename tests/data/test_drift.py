"""Drift: counts against numpy, the stability index against its formula, and what is warned of."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidrec_torchrec.data.drift import drift, drift_table, stability_index
from sidrec_torchrec.data.like import prepared_of
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.data.seen_by import seen_by
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import read_json, write_json

DAY = 86_400


def test_the_index_is_its_formula():
    # three values, smoothed by a half each: shares (2.5, 0.5, 8.5) / 11.5 and (0.5, 5.5, 4.5) / 10.5
    p, q = np.array([2.5, 0.5, 8.5]) / 11.5, np.array([0.5, 5.5, 4.5]) / 10.5
    expected = sum((b - a) * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert stability_index([2, 0, 8], [0, 5, 4]) == pytest.approx(expected, rel=1e-12)
    # a value that neither has counts for nothing, nor do zeros behind
    assert stability_index([2, 0, 0, 8], [0, 5, 0, 4, 0]) == pytest.approx(expected, rel=1e-12)
    assert stability_index([7, 3], [70, 30]) == pytest.approx(0, abs=0.02)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_the_index_is_symmetric_and_zero_for_equal_counts(then, now):
    assert stability_index(then, now) == pytest.approx(stability_index(now, then))
    assert stability_index(then, now) >= 0
    assert stability_index(then, then) == 0


def write(folder, users, events, items=10):
    folder.mkdir()
    pq.write_table(pa.table({"item_id": pa.array(range(items), pa.int64())}), folder / "items.parquet")
    pq.write_table(pa.table(users), folder / "users.parquet")
    pq.write_table(pa.table(events), folder / "events.parquet")
    return folder


def log(rng, users=12, length=30, items=10, first=0):
    user_N = np.repeat(np.arange(users), length)
    return {
        "user_id": user_N,
        "item_id": rng.integers(0, items, users * length),
        "timestamp": first + np.tile(np.arange(length) * DAY // 3, users) + 1_700_000_000 // DAY * DAY,
        "label": rng.integers(0, 2, users * length).astype(np.int8),
    }


def test_counts_are_those_of_the_data(tmp_path):
    rng = np.random.default_rng(0)
    users = {
        "user_id": np.arange(12),
        "country": ["at", "be", None, "at", "be", "at", "cz", None, "at", "at", "at", "be"],
    }
    old = log(rng)
    own = prepare(write(tmp_path / "old", users, old), tmp_path / "p0", PrepareConfig(cold_fraction=0.3))
    assert own.profile["features"]["country"] == {"counts": [6, 3, 1], "unknown": 0, "missing": 2}
    cold = set(pq.read_table(own.folder / "cold_items.parquet")["item_id"].to_pylist())
    assert cold
    tested = np.tile(np.arange(30) >= 24, 12)
    counts = own.profile["test"]
    assert counts["targets"] == tested.sum() == 72
    assert counts["without_training_events"] == np.isin(old["item_id"][tested], sorted(cold)).sum()
    assert counts["labels"] == {"label": [int(old["label"][tested].sum()), 72]}
    assert counts["history_lengths"] == [0, 0, 0, 0, 0, 72]  # 24 to 29 events before: 16 to 31
    assert counts["history_events"] == 12 * sum(range(24, 30))
    times = old["timestamp"][tested]
    assert counts["days"] == times.max() // DAY - times.min() // DAY + 1 == 2

    # the next days: another country's name, one more user without, a new item, more likes
    users = {
        "user_id": np.arange(13),
        "country": ["AT", "be", None, "AT", "be", "AT", "cz", None, "AT", "AT", "AT", "be", None],
    }
    new = log(rng, items=14)
    new["label"] = (rng.random(len(new["label"])) < 0.8).astype(np.int8)
    config = PrepareConfig(split="time", test_from=int(old["timestamp"].max()) - 2 * DAY, test_only=True)
    given = prepare(write(tmp_path / "new", users, new, items=14), tmp_path / "p1", config, own)
    assert given.vocabularies == own.vocabularies
    report = drift(own, seen_by(own, given))
    country = report["features"]["country"]
    assert country["unknown"] == [0, 6 / 13] and country["missing"] == [2 / 12, 3 / 13]
    assert country["psi"] == stability_index([6, 3, 1, 0, 2], [0, 3, 1, 6, 3])
    tested = new["timestamp"] >= config.period[1]
    untrained = ~np.isin(new["item_id"], np.flatnonzero(own.training_events()))
    assert report["without_training_events"] == [counts["without_training_events"] / 72, untrained[tested].mean()]
    assert report["label_rate"]["label"] == [
        old["label"][np.tile(np.arange(30) >= 24, 12)].mean(),
        new["label"][tested].mean(),
    ]
    assert report["history_length"]["mean"] == [26.5, np.tile(np.arange(30), 12)[tested].mean()]
    days = new["timestamp"][tested].max() // DAY - new["timestamp"][tested].min() // DAY + 1
    assert report["targets_per_day"] == [72 / 2, tested.sum() / days]
    assert [line.split(":")[0] for line in report["warnings"]] == ["user feature 'country'"] * 2
    assert "46.2% of the users' values are ones that the ranker does not know, more than 5%" in report["warnings"][0]
    assert drift_table(report).row_count == 6


def test_the_same_data_have_not_moved(tmp_path):
    rng = np.random.default_rng(0)
    users = {"user_id": np.arange(12), "country": list("abcabcabcabc")}
    data = write(tmp_path / "data", users, log(rng))
    own = prepare(data, tmp_path / "p0", PrepareConfig())
    report = drift(own, seen_by(own, prepare(data, tmp_path / "p1", PrepareConfig(), own)))
    assert report["features"]["country"]["psi"] == report["history_length"]["psi"] == 0
    assert report["warnings"] == []
    assert all(then == now for then, now in [report["without_training_events"], report["targets_per_day"]])


def test_sampled_negatives_are_not_counted(tmp_path):
    rng = np.random.default_rng(0)
    events = log(rng, items=90)
    del events["label"]
    data = write(tmp_path / "d", {"user_id": np.arange(12)}, events, items=90)
    own = prepare(data, tmp_path / "p", PrepareConfig(negatives=3))
    assert own.profile["test"]["targets"] == 72
    assert own.counts["test"]["targets"] > 72 * 3


def test_sequences_of_another_version_are_refused(tmp_path):
    data = write(tmp_path / "d", {"user_id": np.arange(12)}, log(np.random.default_rng(0)))
    own = prepare(data, tmp_path / "p", PrepareConfig())
    path = own.folder / "prepared.json"
    write_json(path, {name: value for name, value in read_json(path).items() if name != "profile"})
    with pytest.raises(
        DataError, match="prepared.json: of another version of sidrec_torchrec .*profile.*; prepare again"
    ):
        open_prepared(own.folder)
    assert prepared_of(own.folder) == own.folder
