"""Features: codes of events in sequences, in histories and of requests, against a plain definition; and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidrec_torchrec.data.batches import Collator
from sidrec_torchrec.data.drift import drift, stability_index
from sidrec_torchrec.data.events import open_events, open_users
from sidrec_torchrec.data.features import Coder, Draft, Feature, FeatureFit, FeatureName
from sidrec_torchrec.data.format import DataFolder, DataSchema, open_items, validate
from sidrec_torchrec.data.histories import Histories, UserCodes
from sidrec_torchrec.data.items import ItemRows
from sidrec_torchrec.data.parquet import ArrowTable
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.requests import GivenRequests, Known, NewestEvents
from sidrec_torchrec.data.seen_by import check_alike, seen_by
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.part_files import part_path
from tests.data.test_prepare import rows_of, write_corpus

SCHEMA = DataSchema(event_features=("device", "hour"), history_features=("dwell:dense:4",))
CONFIG = PrepareConfig(cold_fraction=0.0, validation_fraction=0.2, max_history=8, targets_per_row=4)
DEVICES = ("phone", "tv", "web")


def add_features(folder: Path, **columns) -> pa.Table:
    """A corpus whose events also have a device, an hour and a dwell time, each missing here and there."""
    events = write_corpus(folder)
    rng, N = np.random.default_rng(1), len(events)
    missing_KN = rng.random((3, N)) < 0.1
    made = {
        "device": pa.array(rng.choice(DEVICES, N), mask=missing_KN[0]),
        "hour": pa.array(rng.integers(0, 24, N).astype(np.int16), mask=missing_KN[1]),
        "dwell": pa.array(np.round(rng.lognormal(size=N), 2), mask=missing_KN[2]),
    }
    for name, column in (made | columns).items():
        events = events.append_column(name, column)
    pq.write_table(events, folder / "events.parquet", row_group_size=100)
    return events


def prepare_here(folder: Path, schema: DataSchema = SCHEMA, config: PrepareConfig = CONFIG, name="out") -> Prepared:
    return prepare(DataFolder.of(folder, schema), folder / name, config)


def test_codes_in_sequences_are_those_of_the_definition(tmp_path):
    events = add_features(tmp_path)
    prepared = prepare_here(tmp_path)
    device, hour, dwell = prepared.features.all
    assert device == Feature("device", DEVICES) and hour == Feature("hour", tuple(range(24)))
    assert [f.name for f in prepared.features.known] == ["device", "hour"]
    # the training users' events, each user's last fifth apart
    frame = events.to_pandas()
    test_users = {row.user_id for row in rows_of(prepared, "validation")}
    training = [
        own.iloc[: len(own) - round(0.2 * len(own))]["dwell"]
        for user, own in frame.groupby("user_id")
        if user not in test_users
    ]
    values = np.sort(np.concatenate(training))
    values = values[~np.isnan(values)]
    np.testing.assert_allclose(dwell.bounds, [values[int(np.ceil(len(values) * q)) - 1] for q in (0.25, 0.5, 0.75)])
    by_time = frame.set_index("timestamp")
    for split in ("train", "validation", "test"):
        for row in rows_of(prepared, split):
            own = by_time.loc[row.timestamp]
            expected_device = [1 + DEVICES.index(value) if value in DEVICES else 0 for value in own["device"]]
            expected_hour = [0 if np.isnan(value) else 1 + int(value) for value in own["hour"]]
            expected_dwell = [
                0 if np.isnan(value) else 1 + sum(value >= bound for bound in dwell.bounds) for value in own["dwell"]
            ]
            assert row.features.T.tolist() == [expected_device, expected_hour, expected_dwell]


def test_a_value_that_training_does_not_have_is_unknown(tmp_path):
    events = write_corpus(tmp_path)
    last_N = np.zeros(len(events), bool)
    user_N = events["user_id"].to_numpy()
    for user in np.unique(user_N):
        last_N[np.flatnonzero(user_N == user)[-1]] = True
    kind_N = np.where(last_N, "new", np.where(np.arange(len(events)) % 2, "odd", "even"))
    pq.write_table(events.append_column("kind", pa.array(kind_N)), tmp_path / "events.parquet")
    prepared = prepare_here(tmp_path, DataSchema(event_features=("kind",)), PrepareConfig(test_fraction=0.5))
    assert prepared.features.event == (Feature("kind", ("even", "odd")),)
    codes = np.concatenate([row.features[:, 0] for row in rows_of(prepared, "test")])
    assert (codes == 0).any() and set(codes) == {0, 1, 2}


def test_data_prepared_like_others_have_their_codes_and_what_has_moved_is_said(tmp_path):
    events = add_features(tmp_path)
    own = prepare_here(tmp_path)
    N = len(events)
    device = pa.array(np.where(np.arange(N) % 2, "watch", "tv"))  # half of them are new
    place = events.schema.get_field_index("device")
    pq.write_table(events.set_column(place, "device", device), tmp_path / "events.parquet")
    given = prepare(DataFolder.of(tmp_path, SCHEMA), tmp_path / "like", CONFIG, own)
    assert given.features == own.features
    codes = np.concatenate([row.features[:, 0] for row in rows_of(given, "test")])
    assert set(codes) == {0, 1 + DEVICES.index("tv")}
    report = drift(own, seen_by(own, given))
    counts = [np.zeros(4), np.zeros(4)]
    for prepared, count_4 in zip((own, given), counts, strict=True):
        for row in rows_of(prepared, "test"):
            count_4 += np.bincount(row.features[len(row) - row.num_targets :, 0], minlength=4)
    moved = report["event_features"]["device"]
    assert moved["unknown"] == pytest.approx([count_4[0] / count_4.sum() for count_4 in counts])
    assert moved["psi"] == pytest.approx(stability_index(*counts))
    assert report["event_features"]["hour"]["psi"] == 0
    warned = [line for line in report["warnings"] if "'device'" in line]
    assert len(warned) == 2 and "no value that the ranker knows" in warned[0] and "PSI" in warned[1]
    anew = prepare_here(tmp_path, name="anew")
    with pytest.raises(
        SidrecError, match="other codes of events than R .* feature 'device', code 1, is 'tv' there and 'phone'"
    ):
        check_alike(own, anew, "R")
    check_alike(own, given, "R")


def test_negatives_have_the_features_of_their_positive(tmp_path):
    write_corpus(tmp_path, labels=False)
    events = pq.read_table(tmp_path / "events.parquet")
    hour = pa.array(events["timestamp"].to_numpy() % 24)
    pq.write_table(events.append_column("hour", hour), tmp_path / "events.parquet")
    prepared = prepare_here(tmp_path, DataSchema(event_features=("hour",)))
    (feature,) = prepared.features.all
    for row in rows_of(prepared, "train"):
        assert row.features[:, 0].tolist() == feature.encode(pa.array(row.timestamp % 24)).tolist()
    assert any((~row.visible).any() for row in rows_of(prepared, "train"))


def test_without_features_files_are_what_they_were(tmp_path):
    add_features(tmp_path)
    prepared = prepare_here(tmp_path, DataSchema())
    assert pq.read_schema(part_path(prepared.path("train"), 0)).names == [
        "user_id", "user_codes", "item", "action", "timestamp", "order", "visible", "num_targets"
    ]  # fmt: skip
    assert "features" not in json.loads((prepared.folder / "prepared.json").read_text())
    with_features = prepare_here(tmp_path, name="more")
    for ours, theirs in zip(rows_of(prepared, "test"), rows_of(with_features, "test"), strict=True):
        np.testing.assert_array_equal(ours.item, theirs.item)
        assert ours.features.shape == (len(ours), 0) and theirs.features.shape == (len(ours), 3)


def test_histories_and_requests_have_the_same_codes(tmp_path):
    events = add_features(tmp_path)
    prepared = prepare_here(tmp_path)
    log, items = open_events(DataFolder.of(tmp_path, SCHEMA)), open_items(tmp_path)
    rows = ItemRows(items)
    known = Known(
        rows, Histories.read(log, rows, features=prepared.features), UserCodes.read(None, {}), prepared.features
    )
    places = [len(events) // 2, len(events) - 1]
    given = GivenRequests(ArrowTable.of(events.take(places), "requests"))
    for requests in (given, NewestEvents(items, known.histories, 3)):
        for batch in requests.batches(known):
            for places in batch.rows(4):
                row = batch.sequence(places, known.histories, 6)
                own = events.to_pandas().set_index("timestamp").loc[row.timestamp]
                for f, feature in enumerate(prepared.features.all):
                    expected = feature.encode(pa.array(own[feature.name], from_pandas=True))
                    if f == 2:  # the dwell time of a request is not known
                        expected[len(row) - row.num_targets :] = 0
                    np.testing.assert_array_equal(row.features[:, f], expected)


def test_requests_must_carry_what_is_known_of_a_target(tmp_path):
    events = add_features(tmp_path)
    features = prepare_here(tmp_path).features
    rows = ItemRows(open_items(tmp_path))
    known = Known(
        rows,
        Histories.read(open_events(DataFolder.of(tmp_path, SCHEMA)), rows, features=features),
        UserCodes.read(None, {}),
        features,
    )
    for columns, message in (
        (events.drop_columns(["hour"]), "no feature of requests 'hour'"),
        (events.set_column(5, "hour", events["device"]), "requests: column 'hour' is string; .* made from integers"),
    ):
        with pytest.raises(DataError, match=message):
            list(GivenRequests(ArrowTable.of(columns, "requests")).batches(known))
    without = ArrowTable.of(events.drop_columns(["dwell"]), "requests")  # known only afterwards
    assert sum(map(len, GivenRequests(without).batches(known))) == len(events)


def test_items_codes_are_joined_by_row_and_missing_items_have_none(tmp_path):
    add_features(tmp_path)
    rng, path = np.random.default_rng(2), tmp_path / "items.parquet"
    items = pq.read_table(path)
    price_I = np.where(rng.random(len(items)) < 0.2, np.nan, rng.random(len(items)))
    items = items.append_column("price", pa.array(price_I, from_pandas=True))
    pq.write_table(items.append_column("device", pa.array(rng.choice(["x", "y"], len(items)))), path)
    schema = DataSchema(
        event_features=("device",), item_features=("device", "price:dense:3"), history_features=("dwell",)
    )
    prepared = prepare_here(tmp_path, schema)
    assert list(prepared.features.sizes) == ["device", "item.device", "item.price", "dwell"]
    prepared.lay_out_item_codes(DataFolder.of(tmp_path, schema))
    kind, price = prepared.features.item
    seen_I = prepared.seen()
    present = np.sort(price_I[seen_I & ~np.isnan(price_I)])
    assert price.bounds == tuple(present[int(np.ceil(len(present) * q)) - 1] for q in (1 / 3, 2 / 3))
    batch_of = Collator(prepared, NoFeatures())
    rows = rows_of(prepared, "test")[:3]
    rows[0] = replace(rows[0], item=np.r_[np.int32(-1), rows[0].item[1:]])
    features_NF = batch_of(rows).features_NF
    item_N = np.concatenate([row.item for row in rows])
    table = pq.read_table(path)
    expected = [
        encoder.encode(table[name].combine_chunks())[item_N] for encoder, name in ((kind, "device"), (price, "price"))
    ]
    stored_NF = np.concatenate([row.features for row in rows])
    assert features_NF[0, 1:3].tolist() == [0, 0]
    expected_NF = np.stack([stored_NF[:, 0], *expected, stored_NF[:, 1]], axis=1)
    np.testing.assert_array_equal(features_NF[1:], expected_NF[1:])


def test_weights_travel_with_their_events_and_bad_ones_are_refused(tmp_path):
    events = write_corpus(tmp_path)
    N, rng = len(events), np.random.default_rng(3)
    weight_N = np.round(rng.random(N), 3)
    schema = DataSchema(event_weight="weight")
    pq.write_table(events.append_column("weight", pa.array(weight_N)), tmp_path / "events.parquet")
    prepared = prepare_here(tmp_path, schema)
    by_time = dict(zip(events["timestamp"].to_pylist(), weight_N, strict=True))
    for row in rows_of(prepared, "test"):
        np.testing.assert_allclose(row.weight, [by_time[time] for time in row.timestamp], rtol=1e-6)
    rows = rows_of(prepared, "train")[:4]
    batch = Collator(prepared, NoFeatures())(rows)
    expected = sum(row.weight[len(row) - row.num_targets :].astype(np.float64).sum() for row in rows)
    assert batch.global_labels_K.tolist() == pytest.approx([expected])
    for bad, message in ((-1.0, "row 7: -1.0; a weight is 0 or more"), (np.inf, "row 7: inf"), (None, "row 7: null")):
        column = pa.array([bad if row == 7 else weight for row, weight in enumerate(weight_N)])
        pq.write_table(events.append_column("weight", column), tmp_path / "events.parquet")
        for job in (
            lambda: prepare_here(tmp_path, schema, name="bad"),
            lambda: validate(DataFolder.of(tmp_path, schema)),
        ):
            with pytest.raises(DataError, match=message):
                job()
    with pytest.raises(DataError, match="no column of weights 'w'"):
        prepare_here(tmp_path, DataSchema(event_weight="w"))


def test_users_have_dense_features_beside_categories(tmp_path):
    write_corpus(tmp_path)
    users = pq.read_table(tmp_path / "users.parquet")
    age_U = np.random.default_rng(4).integers(18, 80, len(users))
    users = users.append_column("age", pa.array(age_U, mask=age_U > 70)).append_column(
        "tags", pa.array([["a"]] * len(users))
    )
    pq.write_table(users, tmp_path / "users.parquet")
    schema = DataSchema(user_columns=("kind", "age:dense:4"))
    prepared = prepare_here(tmp_path, schema)
    present = np.sort(age_U[age_U <= 70])
    bounds = [float(present[int(np.ceil(len(present) * q)) - 1]) for q in (0.25, 0.5, 0.75)]
    assert prepared.user_features == {"kind": 3, "age": 5}
    values = prepared.vocabularies
    assert values == {"kind": ["a", "b"], "age": {"bounds": bounds}}
    own = dict(
        zip(users["user_id"].to_pylist(), zip(users["kind"].to_pylist(), age_U.tolist(), strict=True), strict=True)
    )

    def codes_of(user_id: int) -> list[int]:
        if user_id not in own:
            return [0, 0]
        kind, age = own[user_id]
        return [1 + "ab".index(kind), 0 if age > 70 else 1 + sum(age >= bound for bound in bounds)]

    rows = rows_of(prepared, "test")
    assert {tuple(row.user_codes) for row in rows} > {(0, 0)}
    assert all(row.user_codes.tolist() == codes_of(row.user_id) for row in rows)
    read = UserCodes.read(open_users(DataFolder.of(tmp_path, schema)), values)
    ids = [row.user_id for row in rows]
    np.testing.assert_array_equal(read.of(pa.array(ids))[0], [row.user_codes for row in rows])
    with pytest.raises(DataError, match="column 'tags' is list.*a dense feature holds numbers, one a row"):
        prepare_here(tmp_path, DataSchema(user_columns=("tags:dense",)), name="bad")


def test_a_table_made_by_pandas_has_the_codes_of_the_file(tmp_path):
    """Which holds integers with nulls as floats, and nulls of text as NaN."""
    events = add_features(tmp_path)
    frame = pa.Table.from_pandas(events.to_pandas(), preserve_index=False)
    assert frame.schema.field("hour").type == pa.float64()
    for feature in prepare_here(tmp_path).features.all:
        ours, theirs = (table[feature.name].combine_chunks() for table in (events, frame))
        np.testing.assert_array_equal(feature.encode(theirs), feature.encode(ours))
    hour = Feature("hour", (1, 2))
    assert hour.encode(pa.array([1.0, 1.5, np.inf, 2.0, None, 1e300])).tolist() == [1, 0, 0, 2, 0, 0]


class NoFeatures:
    keys = ()

    def values(self, item_N):
        return {}


BAD = {
    "'dwell' is twice": {"event_features": ("dwell",), "history_features": ("dwell:dense",)},
    "'hour:minutes' is no feature": {"event_features": ("hour:minutes",)},
    "'hour:dense:1' is no feature": {"event_features": ("hour:dense:1",)},
    "no feature 'place'": {"event_features": ("place",)},
    "column 'device' is string; a dense feature holds numbers": {"event_features": ("device:dense",)},
    "column 'dwell' is double; a category holds": {"event_features": ("dwell:category",)},
    "column 'label' is a label to predict": {"history_features": ("label",)},
    "column 'tags' is list.*; a feature holds numbers, strings": {"event_features": ("tags",)},
    "'nothing' has no value in training": {"history_features": ("nothing:dense",)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_features_are_refused(message, tmp_path):
    N = len(write_corpus(tmp_path))
    add_features(tmp_path, tags=pa.array([["a"]] * N), nothing=pa.nulls(N, pa.float64()))
    with pytest.raises((DataError, ValueError), match=message):
        prepare_here(tmp_path, DataSchema(**BAD[message]))
    assert not (tmp_path / "out").exists()


def test_validate_says_what_is_wrong_and_what_is_not_read(tmp_path):
    N = len(write_corpus(tmp_path))
    events = add_features(tmp_path, token=pa.array([f"t{i}" for i in range(N)]))
    unread = validate(DataFolder.of(tmp_path, SCHEMA))["unread"]["events"]
    assert list(unread) == ["token"] and len(events) == N
    with pytest.raises(DataError, match="no feature 'place'"):
        validate(DataFolder.of(tmp_path, DataSchema(event_features=("place",))))


@given(
    values=st.lists(st.none() | st.floats(-5, 5) | st.sampled_from([1.0, 2.0]), min_size=1, max_size=60),
    buckets=st.integers(2, 8),
)
def test_buckets_are_even_and_as_many_as_asked_for_at_most(values, buckets):
    value_N = np.array([np.nan if value is None else value for value in values])
    fit = FeatureFit([draft := Draft(FeatureName("x", "dense", buckets), None)], len(value_N))
    fit.add(value_N[:, None])
    if np.isnan(value_N).all():
        with pytest.raises(DataError, match="'x' has no value"):
            fit.features()
        return
    (feature,) = fit.features()
    assert list(feature.bounds) == sorted(set(feature.bounds)) and feature.size <= buckets + 1
    code_N = feature.encode(pa.array(values, pa.float64()))
    np.testing.assert_array_equal(code_N, Coder([draft], [feature])(value_N[:, None])[:, 0])
    np.testing.assert_array_equal(code_N == 0, np.isnan(value_N))
    present = value_N[~np.isnan(value_N)]
    assert set(code_N[~np.isnan(value_N)]) == set(range(1, feature.size))  # no bucket is empty
    # a bucket holds as many as it should, but for values that are equal to the bound it begins with
    for code in range(1, feature.size):
        inside = present[code_N[~np.isnan(value_N)] == code]
        assert (inside > inside.min()).sum() <= int(np.ceil(len(present) / buckets))
