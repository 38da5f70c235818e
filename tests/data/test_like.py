"""Preparing new data like earlier ones: codes, columns, tasks and policy stay; what cannot be alike is refused by name."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.format import DataFolder, DataSchema
from sidrec_torchrec.data.like import backtest_config, like_config, own_rows
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.seen_by import check_alike, check_labels, seen_by
from sidrec_torchrec.data.sequences import from_table
from sidrec_torchrec.errors import DataError, SidrecError
from tests.data.test_prepare import write_corpus


@pytest.fixture
def own(tmp_path):
    write_corpus(tmp_path / "old")
    return prepare(tmp_path / "old", tmp_path / "own", PrepareConfig(max_history=20, targets_per_row=7))


def replace_users(folder, users):
    pq.write_table(pa.table(users), folder / "users.parquet")


def codes_by_user(prepared):
    rows = [row for split in ("train", "test") for row in from_table(pq.read_table(prepared.path(split)))]
    return {row.user_id: int(row.user_codes[0]) for row in rows}


def test_codes_stay_whatever_else_the_file_holds(own, tmp_path):
    write_corpus(tmp_path / "new")
    users = pq.read_table(tmp_path / "old" / "users.parquet").to_pydict()
    users["user_id"] += [900, 901, 902]
    users["kind"] = ["renamed" if kind == "a" else kind for kind in users["kind"]] + ["0", "aa", "zz"]
    replace_users(tmp_path / "new", users)
    anew = prepare(tmp_path / "new", tmp_path / "anew", PrepareConfig())
    alike = prepare(tmp_path / "new", tmp_path / "alike", PrepareConfig(), own)
    before, after, shifted = map(codes_by_user, (own, alike, anew))
    kinds = dict(zip(users["user_id"], users["kind"], strict=True))
    assert {kinds.get(user) for user in after} == {"renamed", "b", None}
    for user, code in after.items():
        assert code == (before.get(user, code) if kinds.get(user) == "b" else 0)
    assert {shifted[user] for user in shifted if kinds.get(user) == "b"} == {3} != {2}
    assert alike.vocabularies == own.vocabularies and alike.user_features == own.user_features
    check_alike(own, alike, "runs/side")
    with pytest.raises(
        SidrecError, match="user feature 'kind', code 1, is '0' there and 'a' to the ranker; .* --like runs/side"
    ):
        check_alike(own, anew, "runs/side")


def test_what_was_chosen_then_is_chosen_again(own):
    config = like_config(PrepareConfig(), own)
    assert (config.max_history, config.targets_per_row, config.tasks) == (20, 7, ("label",))
    assert like_config(PrepareConfig(max_history=30), own).max_history == 30
    with pytest.raises(SidrecError, match="--tasks click: .*own is of label"):
        like_config(PrepareConfig(tasks=("click",)), own)
    kept = dataclasses.replace(own, policy=EventPolicy(unknown_items="keep", min_events=3))
    assert like_config(PrepareConfig(), kept).policy == kept.policy
    said = like_config(PrepareConfig(policy=EventPolicy(unknown_items="drop")), kept).policy
    assert said == EventPolicy(unknown_items="drop", min_events=3)
    assert backtest_config(own, None, EventPolicy()).period[1] == own.last_training_event + 1
    with pytest.raises(SidrecError, match="does not say when its last training event was; .* --test-from"):
        backtest_config(dataclasses.replace(own, last_training_event=None), None, EventPolicy())


def test_columns_and_times_are_read_as_they_were(tmp_path):
    for name in ("old", "new"):
        write_corpus(tmp_path / name)
        events = pq.read_table(tmp_path / name / "events.parquet")
        time = pa.array((events["timestamp"].to_numpy() + 1_700_000_000) * 1000)
        events = events.set_column(2, "at", time).rename_columns({"item_id": "sku"})
        pq.write_table(events, tmp_path / name / "events.parquet")
    schema = DataSchema(columns=("timestamp=at", "item_id=sku"), time_unit="ms", user_columns=("kind",))
    own = prepare(DataFolder.of(tmp_path / "old", schema), tmp_path / "own", PrepareConfig())
    alike = prepare(tmp_path / "new", tmp_path / "alike", PrepareConfig(), own)
    assert alike.schema == own.schema and alike.last_training_event == own.last_training_event
    assert pq.read_table(alike.path("test")).equals(pq.read_table(own.path("test")))


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ({"user_id": [1, 2], "sort": ["a", "b"]}, r"users\.parquet: no user feature 'kind'; the file has .*'sort'"),
        (
            {"user_id": [1, 2], "kind": [1, 2]},
            r"users\.parquet: column 'kind' is int64; its vocabulary was made from strings",
        ),
        (None, r"users\.parquet: not found; .*own has the user features kind"),
    ],
)
def test_a_feature_that_is_missing_is_refused_by_name(users, message, own, tmp_path):
    write_corpus(tmp_path / "new")
    (tmp_path / "new" / "users.parquet").unlink()
    if users:
        replace_users(tmp_path / "new", users)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "new", tmp_path / "alike", PrepareConfig(), own)
    assert not (tmp_path / "alike").exists()


def test_differences_of_features_have_names(own, tmp_path):
    assert own.vocabularies == {"kind": ["a", "b"]}
    for change, message in (
        ({"user_features": {}, "vocabularies": {}}, "user feature 'kind' is missing"),
        ({"user_features": {"kind": 3, "age": 2}, "vocabularies": {"kind": ["a", "b"], "age": ["x"]}}, "'age' is new"),
        (
            {"user_features": {"kind": 4}, "vocabularies": {"kind": ["a", "b", "c"]}},
            "code 3, is 'c' there and nothing to",
        ),
    ):
        with pytest.raises(SidrecError, match=message):
            check_alike(own, dataclasses.replace(own, **change), "runs/side")
    with pytest.raises(SidrecError, match="of the tasks click; the ranker predicts label"):
        check_labels(own, dataclasses.replace(own, tasks=("click",)))
    with pytest.raises(SidrecError, match="has labels; the ranker was trained on sampled negatives"):
        check_labels(dataclasses.replace(own, sampled_negatives=True), own)


def moved_items(tmp_path, own):
    """The corpus with its items in another order, some new among them, and some gone."""
    write_corpus(tmp_path / "new")
    ids = pq.read_table(tmp_path / "old" / "items.parquet")["item_id"].to_numpy()
    rng = np.random.default_rng(1)
    new_ids = rng.permutation(np.concatenate([ids[3:], [7001, 7002, 7003]]))
    pq.write_table(pa.table({"item_id": new_ids}), tmp_path / "new" / "items.parquet")
    events = pq.read_table(tmp_path / "new" / "events.parquet").to_pydict()
    item_N = np.array(events["item_id"])
    late = np.arange(len(item_N)) > len(item_N) * 0.9
    item_N[late] = rng.choice(new_ids, late.sum())
    pq.write_table(pa.table(events | {"item_id": item_N}), tmp_path / "new" / "events.parquet")
    return ids, new_ids


def test_items_are_known_by_their_ids(own, tmp_path):
    ids, new_ids = moved_items(tmp_path, own)
    config = dataclasses.replace(
        backtest_config(own, None, EventPolicy(unknown_items="keep")), test_from=str(int(own.last_training_event) - 500)
    )
    given = prepare(tmp_path / "new", tmp_path / "alike", config, own)
    view = seen_by(own, given)
    place = {item: row for row, item in enumerate(ids)}
    events = pq.read_table(tmp_path / "new" / "events.parquet")
    times = {item: [] for item in new_ids}
    for log in (events, pq.read_table(tmp_path / "old" / "events.parquet")):
        for item, time in zip(log["item_id"].to_pylist(), log["timestamp"].to_pylist(), strict=True):
            times.setdefault(item, []).append(time)
    for prepared in (view, given):  # what is only tested is prepared with the ranker's own training
        for row, item in enumerate(new_ids):
            known = place.get(item)
            assert prepared.seen()[row] == (known is not None and own.seen()[known])
            assert prepared.training_events()[row] == (0 if known is None else own.training_events()[known])
            if times[item]:
                assert prepared.first_events()[row] == min(times[item])
        assert prepared.last_training_event == own.last_training_event
    assert view.own_rows.tolist() == [place.get(item, -1) for item in new_ids]
    assert given.counts["train"]["rows"] == given.counts["validation"]["rows"] == 0 < given.counts["test"]["rows"]
    # prepared to train on, it has seen what it has; to the ranker it still is what the ranker has seen
    training = prepare(tmp_path / "new", tmp_path / "train", PrepareConfig(policy=config.policy), own)
    assert training.seen().tolist() != given.seen().tolist() == seen_by(own, training).seen().tolist()


def test_negatives_of_a_test_are_of_the_kind_that_the_ranker_sees(tmp_path):
    write_corpus(tmp_path / "old", labels=False)
    own = prepare(tmp_path / "old", tmp_path / "own", PrepareConfig(negatives=2, cold_fraction=0.4))
    given = prepare(
        tmp_path / "old", tmp_path / "alike", PrepareConfig(split="time", test_from=200 * 7, test_only=True), own
    )
    assert given.sampled_negatives and given.negatives == 2
    drawn = 0
    for row in from_table(pq.read_table(given.path("test"))):
        positive = None
        for event in range(len(row) - row.num_targets, len(row)):
            if row.visible[event]:
                positive = row.item[event]
            else:
                drawn += 1
                assert own.seen()[row.item[event]] == own.seen()[positive]
    assert drawn > 100
    # labels that the ranker never had are not read
    write_corpus(tmp_path / "labeled")
    assert prepare(tmp_path / "labeled", tmp_path / "l", PrepareConfig(), own).sampled_negatives


def test_ids_of_another_type_are_refused(own, tmp_path):
    with pytest.raises(
        DataError, match="new: item_id is large_string, in .*own it is int64; write items with one type"
    ):
        own_rows(own, pa.array(["a"], pa.large_string()), tmp_path / "new")


def test_a_test_alone_needs_somebody_to_test(tmp_path):
    write_corpus(tmp_path / "d")
    with pytest.raises(DataError, match="test_only needs sequences that a ranker was trained on"):
        prepare(tmp_path / "d", tmp_path / "o", PrepareConfig(split="time", test_from=700, test_only=True))
    for wrong, message in (({"split": "share"}, "test_only needs split time"), ({"train_from": 1}, "trains nothing")):
        with pytest.raises(ValueError, match=message):
            PrepareConfig(
                **{"split": "time", "test_only": True} | ({"test_from": 700} if "train_from" in wrong else {}) | wrong
            )


def test_new_days_alone_are_enough(own, tmp_path):
    """Without any event before the test: histories begin empty."""
    write_corpus(tmp_path / "new")
    events = pq.read_table(tmp_path / "new" / "events.parquet")
    later = events.set_column(2, "timestamp", pa.array(events["timestamp"].to_numpy() + 10**6))
    pq.write_table(later, tmp_path / "new" / "events.parquet")
    given = prepare(tmp_path / "new", tmp_path / "alike", backtest_config(own, None, EventPolicy()), own)
    assert given.counts["test"]["targets"] == len(events)
    with pytest.raises(DataError, match="no event at or after test_from"):
        prepare(tmp_path / "old", tmp_path / "x", backtest_config(own, str(10**7), EventPolicy()), own)


def test_a_day_of_one_label_can_be_tested(own, tmp_path):
    write_corpus(tmp_path / "new")
    events = pq.read_table(tmp_path / "new" / "events.parquet")
    events = events.set_column(3, "label", pa.array(np.ones(len(events), np.int8)))
    pq.write_table(events, tmp_path / "new" / "events.parquet")
    config = backtest_config(own, str(own.last_training_event - 700), EventPolicy())
    given = prepare(tmp_path / "new", tmp_path / "alike", config, own)
    assert given.profile["test"]["labels"] == {"label": [given.counts["test"]["targets"]] * 2}
    with pytest.raises(DataError, match="column 'label' is 1 in all"):
        prepare(tmp_path / "new", tmp_path / "train", PrepareConfig(), own)
