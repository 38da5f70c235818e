"""Numbers to be predicted: their values and scale in sequences, against a plain definition; and what is refused."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidrec_torchrec.data.batches import Collator
from sidrec_torchrec.data.drift import drift
from sidrec_torchrec.data.format import DataFolder, DataSchema, validate
from sidrec_torchrec.data.prepare import prepare
from sidrec_torchrec.data.regression import Moments
from sidrec_torchrec.data.seen_by import check_labels, seen_by
from sidrec_torchrec.data.tasks import RegressionName, check_tasks, split_tasks
from sidrec_torchrec.errors import DataError, SidrecError
from tests.data.test_features import CONFIG, NoFeatures
from tests.data.test_prepare import rows_of, write_corpus

TASKS = ("label", "dwell:log", "stars:regression")
SCHEMA = DataSchema(event_weight="weight")


def add_values(folder, **columns) -> pa.Table:
    """A corpus whose events also have a dwell time, stars, each missing here and there, and a weight."""
    events = write_corpus(folder)
    rng, N = np.random.default_rng(1), len(events)
    made = {
        "dwell": pa.array(rng.lognormal(3, 2, N), mask=rng.random(N) < 0.2),
        "stars": pa.array(rng.integers(1, 6, N).astype(np.int8), mask=rng.random(N) < 0.2),
        "weight": pa.array(rng.random(N)),
    }
    for name, column in (made | columns).items():
        events = events.append_column(name, column)
    pq.write_table(events, folder / "events.parquet", row_group_size=100)
    return events


def prepare_here(folder, tasks=TASKS, schema=SCHEMA, name="out", like=None, **changes):
    config = dataclasses.replace(CONFIG, tasks=tasks, **changes)
    return prepare(DataFolder.of(folder, schema), folder / name, config, like)


def test_names_say_what_is_predicted():
    assert split_tasks(("a", "b:log", "c:d", "e:regression")) == (
        ("a", "c:d"), (RegressionName("b", True), RegressionName("e"))
    )  # fmt: skip
    assert [str(named) for named in split_tasks(("b:log", "e:regression"))[1]] == ["b:log", "e:regression"]
    check_tasks(("a", "b", "c", "d", "e:log", "f:log"))  # four of labels at most
    for names in (("a", "a:log"), ("a:regression", "a:log"), ("a", "b", "c", "d", "e")):
        with pytest.raises(ValueError, match="name each task once"):
            check_tasks(names)


@given(
    parts=st.lists(st.lists(st.none() | st.floats(0, 1e6), max_size=8), min_size=1, max_size=5),
    is_log=st.booleans(),
    is_weighted=st.booleans(),
)
def test_moments_are_those_of_all_values_together(parts, is_log, is_weighted):
    moments, rng = Moments(RegressionName("x", is_log)), np.random.default_rng(0)
    values, weights = [], []
    for part in parts:
        value_N = np.array([np.nan if value is None else value for value in part])
        weight_N = rng.integers(0, 3, len(part)) / 2 if is_weighted else np.ones(len(part))
        moments.add(value_N, weight_N if is_weighted else None)
        values.append(value_N)
        weights.append(weight_N)
    x, w = np.concatenate(values), np.concatenate(weights)
    x, w = x[~np.isnan(x)], w[~np.isnan(x)]
    assert moments.count == len(x)
    x, w = x[w > 0], w[w > 0]  # what weighs nothing says nothing
    if not len(set(x)) > 1:
        with pytest.raises(DataError, match="column 'x' is .* for all events; a regression learns"):
            moments.check("log", "events")
        return
    moments.check("log", "events")
    y = np.log1p(x) if is_log else x
    mean = (w * y).sum() / w.sum()
    assert moments.mean == pytest.approx(mean)
    assert moments.deviation == pytest.approx(np.sqrt((w * (y - mean) ** 2).sum() / w.sum()), abs=1e-9 * y.max())


def test_sequences_have_values_and_their_scale_is_that_of_training_targets(tmp_path):
    events = add_values(tmp_path)
    prepared = prepare_here(tmp_path)
    without = prepare_here(tmp_path, tasks=("label",), name="without")
    assert prepared.tasks == ("label",) and prepared.predicted == ("label", "dwell", "stars")
    assert prepared.named_tasks == TASKS and "regressions" not in json.loads(
        (without.folder / "prepared.json").read_text()
    )
    by_time = events.to_pandas().set_index("timestamp")
    targets = {}
    for split in ("train", "validation", "test"):
        rows, plain = rows_of(prepared, split), rows_of(without, split)
        for row, other in zip(rows, plain, strict=True):
            own = by_time.loc[row.timestamp]
            np.testing.assert_allclose(row.values, own[["dwell", "stars"]].to_numpy(np.float32), rtol=1e-6)
            np.testing.assert_array_equal(row.action, other.action)  # a value is no part of it
            assert other.values.shape == (len(other), 0)
        targets[split] = by_time.loc[np.concatenate([row.timestamp[row.targets] for row in rows])]
        counts = prepared.counts[split]["labels"]
        assert counts == {"label": len(targets[split])} | targets[split][["dwell", "stars"]].count().to_dict()
    for own, x in zip(
        prepared.regressions, (np.log1p(targets["train"]["dwell"]), targets["train"]["stars"]), strict=True
    ):
        w = targets["train"]["weight"].where(x.notna(), 0)
        mean = (w * x).sum() / w.sum()
        assert (own.mean, own.deviation) == pytest.approx(
            (mean, np.sqrt((w * (x - mean) ** 2).sum() / w.sum())), rel=1e-5
        )
    rows = rows_of(prepared, "train")[:3]
    batch = Collator(prepared, NoFeatures())(rows)
    own = by_time.loc[np.concatenate([row.timestamp[row.targets] for row in rows])]
    expected = [own["weight"].where(own[name].notna(), 0).sum() for name in ("label", "dwell", "stars")]
    assert batch.global_labels_K.tolist() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(batch.values_NR.numpy(), np.concatenate([row.values for row in rows]))


def test_regressions_alone_need_no_labels_and_no_negatives(tmp_path):
    events = add_values(tmp_path)
    pq.write_table(events.drop_columns(["label"]), tmp_path / "events.parquet")
    prepared = prepare_here(tmp_path, ("stars:regression",))
    assert prepared.tasks == () and prepared.predicted == ("stars",) and not prepared.sampled_negatives
    for row in rows_of(prepared, "train"):
        assert row.visible.all() and set(row.action) == {1}


def test_data_prepared_like_others_keep_the_scale(tmp_path):
    events = add_values(tmp_path)
    own = prepare_here(tmp_path)
    place = events.schema.get_field_index("stars")
    stars_N = events["stars"].to_numpy() * 10.0
    pq.write_table(events.set_column(place, "stars", pa.array(stars_N, from_pandas=True)), tmp_path / "events.parquet")
    like = prepare_here(tmp_path, (), name="like", like=own)
    assert like.regressions == own.regressions
    found = drift(own, seen_by(own, like))["value_mean"]
    assert found["stars"][1] == pytest.approx(10 * found["stars"][0]) and found["dwell"][0] == found["dwell"][1]
    anew = prepare_here(tmp_path, ("label", "dwell:log", "stars:regression"), name="anew")
    assert anew.regressions[1].mean == pytest.approx(10 * own.regressions[1].mean)
    check_labels(own, anew)  # which a ranker reads with the scale it was trained on
    assert seen_by(own, anew).regressions == own.regressions
    for tasks in (("label",), ("label", "dwell:regression", "stars:regression")):
        other = prepare_here(tmp_path, tasks, name="-".join(tasks))
        with pytest.raises(SidrecError, match="the ranker predicts label, dwell:log, stars:regression"):
            check_labels(own, other)
        with pytest.raises(SidrecError, match="--tasks label.* is of label, dwell:log, stars:regression"):
            prepare_here(tmp_path, tasks, name="bad", like=own)


def test_a_value_may_be_a_feature_of_the_history_and_is_never_one_of_the_target(tmp_path):
    add_values(tmp_path)
    prepared = prepare_here(tmp_path, schema=DataSchema(history_features=("dwell:dense:4",)))
    assert [feature.name for feature in prepared.features.history] == ["dwell"]
    with pytest.raises(DataError, match="'dwell' is a number to predict; .* a history feature, and no event feature"):
        prepare_here(tmp_path, schema=DataSchema(event_features=("dwell",)), name="bad")


def test_validate_says_what_values_are_like(tmp_path):
    events = add_values(tmp_path)
    found = validate(DataFolder.of(tmp_path, SCHEMA), TASKS)
    assert found["unread"]["events"] == {}
    stars = events["stars"].to_pandas()
    assert found["labels"]["stars"] == {
        "mean": pytest.approx(stars.mean()),
        "deviation": pytest.approx(stars.std(ddof=0)),
        "is_log": False,
        "missing": stars.isna().sum(),
    }
    assert found["labels"]["dwell"]["mean"] == pytest.approx(np.log1p(events["dwell"].to_pandas()).mean())


BAD = {
    "row 3: inf; a value to predict is a finite number, or null": ("stars:regression", np.inf),
    r"row 3: 1e\+60; a value to predict is a finite": ("stars:regression", 1e60),
    "row 3: -1.0; a value to predict is 0 or more where its logarithm is learned": ("stars:log", -1.0),
    "'stars' is 2 for all events; a regression learns from values that differ": ("stars:regression", "constant"),
    "'stars' is null for all events": ("stars:regression", "null"),
    "'stars' is string; a regression predicts numbers": ("stars:regression", "text"),
    "no column to predict 'mood'": ("mood:regression", 1.0),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_values_are_refused(message, tmp_path):
    task, value = BAD[message]
    N = len(write_corpus(tmp_path))
    columns = {"constant": [2.0] * N, "null": pa.nulls(N, pa.float64()), "text": ["a"] * N}
    stars = columns[value] if isinstance(value, str) else [1.0, 2.0, 3.0, value, *[4.0] * (N - 4)]
    add_values(tmp_path, stars=pa.array(stars) if isinstance(stars, list) else stars)
    for job in (lambda: prepare_here(tmp_path, ("label", task)), lambda: validate(tmp_path, ("label", task))):
        with pytest.raises(DataError, match=message):
            job()
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_constant_in_training_alone_is_refused(tmp_path):
    events = write_corpus(tmp_path)
    user_N = events["user_id"].to_numpy()
    is_last_N = np.array([not (user_N[n + 1 :] == user_N[n]).any() for n in range(len(user_N))])
    pq.write_table(events.append_column("stars", pa.array(np.where(is_last_N, 1.0, 2.0))), tmp_path / "events.parquet")
    with pytest.raises(DataError, match="'stars' is 2 for all training targets; .* leave the task out"):
        prepare_here(tmp_path, ("stars:regression",), DataSchema(), test_fraction=0.5)
