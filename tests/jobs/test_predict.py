"""The predict job: what it writes is what evaluation's model says of the same targets, in the order of the requests."""

import dataclasses
import importlib.util
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import sidrec_torchrec
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data import request_buckets
from sidrec_torchrec.data import requests as requests_module
from sidrec_torchrec.data.batch_plan import pools
from sidrec_torchrec.data.batches import SequenceBatches
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.sequence_files import open_sequences
from sidrec_torchrec.data.sequences import Sequence
from sidrec_torchrec.engines.base import ENGINES, Inline
from sidrec_torchrec.engines.local import LocalEngine
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.jobs import encode_corpus, predict, train_ranker
from sidrec_torchrec.jobs.predict import PredictConfig
from sidrec_torchrec.ranker.by_user import ScoreBucket
from sidrec_torchrec.ranker.predictor import Predictor
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.storage.remote import Store
from sidrec_torchrec.training.group import process_group
from tests.data.test_frames import each_library, of
from tests.jobs.test_train_ranker import SMALL, make_config

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)")
CODES = dataclasses.replace(SMALL, attention="codes")
PLUS = {"learned_queries": 2, "blocks": 1, "block_events": 8}
RANKERS = {
    "codes": ("side", CODES),
    "codes-queries-blocks": ("side", dataclasses.replace(CODES, **PLUS)),
    "vectors-queries-blocks": ("side", dataclasses.replace(SMALL, **PLUS)),
    **{arm: (arm, SMALL) for arm in ("none", "raw", "prefix-ngram", "id", "hybrid")},
}
TESTED = {
    "test_fraction": 0.98,
    "targets_per_row": 1,
    "max_history": 48,
}  # a target a row, as a request is; first ones too


def train(name: str, corpus: Path, sequences: Path, sids: dict[str, Path], out: Path) -> Path:
    arm, model = RANKERS[name]
    train_ranker.main(make_config(corpus, sequences, sids, out, arm, model=model, epochs=1))
    return out


@pytest.fixture(scope="module")
def tested(corpus, tmp_path_factory) -> Path:
    return prepare(corpus, tmp_path_factory.mktemp("tested") / "sequences", PrepareConfig(**TESTED)).folder


@pytest.fixture(scope="module")
def ranker(corpus, prepared, sids, tmp_path_factory) -> Path:
    return train("codes", corpus, prepared, sids, tmp_path_factory.mktemp("ranker") / "codes")


def places(events: pa.Table) -> dict[tuple[int, int], int]:
    """The row of each user's first, second, ... event."""
    count: dict[int, int] = {}
    rows = {}
    for row, user in enumerate(events["user_id"].to_pylist()):
        count[user] = count.get(user, -1) + 1
        rows[user, count[user]] = row
    return rows


def rows_of(batches: SequenceBatches) -> Iterator[list[Sequence]]:
    """The rows of each batch, in its order, for one process that does not shuffle."""
    with open_sequences(batches.prepared.path(batches.split)) as files:
        for pool in pools(files, None):
            rows = [files.rows(group) for group in pool.groups]
            for batch in pool.batches(batches.batch_events, None):
                yield [rows[place][row] for place, row in zip(batch.place_B, batch.row_B, strict=True)]


def evaluated(ranker: Path, tested: Path, events: pa.Table) -> dict[int, np.ndarray]:
    """By row of the events, what evaluation's model predicts of the test targets."""
    rows = places(events)
    with process_group() as processes, torch.no_grad():
        trained = TrainedRanker.open(ranker)
        parts = trained.parts(tested)
        model = parts.sharded(processes)
        trained.load(model)
        batches = parts.batches("test", processes)
        found = {}
        for sequences, batch in zip(rows_of(batches), batches, strict=True):
            prediction = model.eval()(batch)[1].prediction.numpy()
            keys = [rows[s.user_id, int(s.order[-1])] for s in sequences]
            found |= dict(zip(keys, prediction, strict=True))
    return found


def untied(events: pa.Table, rows: list[int]) -> list[int]:
    """Without events that happened together with one before: a request at such a time reads neither."""
    seen: set[tuple[int, int]] = set()
    tied = []
    for row, key in enumerate(zip(events["user_id"].to_pylist(), events["timestamp"].to_pylist(), strict=True)):
        tied += [row] if key in seen else []
        seen.add(key)
    assert tied
    return [row for row in rows if row not in tied]


def requests_of(events: pa.Table, rows: list[int]) -> pa.Table:
    """Events as requests, with a column before and one behind those that are read."""
    table = events.take(rows).select(["user_id", "item_id", "timestamp"])
    ids = pa.array([f"request {row}" for row in rows])
    return table.add_column(0, "request_id", ids).append_column("note", pa.array([[row] for row in rows]))


@pytest.mark.parametrize("name", RANKERS)
def test_every_ranker_predicts_what_evaluation_does(name, corpus, prepared, tested, sids, tmp_path):
    out = train(name, corpus, prepared, sids, tmp_path / "run")
    events = pq.read_table(corpus / "events.parquet")
    expected = evaluated(out, tested, events)
    rows = untied(events, np.random.default_rng(0).permutation(list(expected)).tolist())
    requests = requests_of(events, rows)
    pq.write_table(requests, tmp_path / "requests.parquet", row_group_size=700)
    config = PredictConfig(ranker=out, requests=tmp_path / "requests.parquet", out=tmp_path / "out.parquet")
    counts = predict.main(config)
    written = pq.read_table(config.out)
    assert written.drop_columns("probability").equals(requests)
    probability_R = written["probability"].to_numpy()
    np.testing.assert_allclose(probability_R, np.concatenate([expected[row] for row in rows]), rtol=0, atol=1e-5)
    assert probability_R.std() > 1e-3
    assert counts["requests"] == len(rows) and counts["without_history"] > 3

    newest = predict.main(PredictConfig(ranker=out, newest=3, out=tmp_path / "newest.parquet"))
    table = pq.read_table(tmp_path / "newest.parquet")
    rows = table["event_row"].to_pylist()
    assert rows == sorted(rows) and newest["requests"] == len(rows) == 60 * 3
    assert table.select(["user_id", "item_id", "timestamp"]).equals(
        events.take(rows).select(["user_id", "item_id", "timestamp"])
    )
    kept = [row for row in rows if row in expected]
    probabilities = dict(zip(rows, table["probability"].to_pylist(), strict=True))
    assert len(kept) > 150
    np.testing.assert_allclose(
        [probabilities[row] for row in kept], np.concatenate([expected[row] for row in kept]), rtol=0, atol=1e-5
    )

    # nothing but empty histories in a batch: of users nobody knows, and before a user's first event
    predictor = Predictor.open(out)
    firsts = [row for (user, place), row in places(events).items() if place == 0 and row in expected]
    alone = predictor.predict(requests_of(events, firsts))
    np.testing.assert_allclose(alone, np.concatenate([expected[row] for row in firsts]), rtol=0, atol=1e-5)
    strangers = pa.table({"user_id": [-7, 10**12], "item_id": events["item_id"][:2], "timestamp": [0, 5]})
    assert ((predictor.predict(strangers) > 0) & (predictor.predict(strangers) < 1)).all()


def test_several_tasks(labeled, sequences, sids, tmp_path):
    tested = prepare(labeled, tmp_path / "tested", PrepareConfig(**TESTED, tasks=("label", "like"))).folder
    out = train("codes", labeled, sequences, sids, tmp_path / "run")
    events = pq.read_table(labeled / "events.parquet")
    expected = evaluated(out, tested, events)
    rows = untied(events, list(expected))
    expected_RK = np.stack([expected[row] for row in rows])
    pq.write_table(requests_of(events, rows), tmp_path / "requests.parquet")
    predict.main(PredictConfig(ranker=out, requests=tmp_path / "requests.parquet", out=tmp_path / "out.parquet"))
    written = pq.read_table(tmp_path / "out.parquet")
    for k, task in enumerate(("label", "like")):
        np.testing.assert_allclose(written[f"probability_{task}"].to_numpy(), expected_RK[:, k], rtol=0, atol=1e-5)
    np.testing.assert_allclose(Predictor.open(out).predict(requests_of(events, rows)), expected_RK, rtol=0, atol=1e-5)


def test_sampled_negatives_and_a_log_without_labels(corpus, sids, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("items.parquet", "users.parquet"):
        (data / name).symlink_to(corpus / name)
    events = pq.read_table(corpus / "events.parquet").drop_columns("label")
    pq.write_table(events, data / "events.parquet")
    folders = [prepare(data, tmp_path / str(n), PrepareConfig(targets_per_row=n)).folder for n in (1, 32)]
    out = train("raw", data, folders[1], sids, tmp_path / "run")
    predictor = Predictor.open(out)
    rows = list(range(0, len(events), 7))
    one = predictor.predict(requests_of(events, rows))
    # labels that the ranker has never seen are not read either
    with_labels = Predictor.open(out, events=corpus).predict(requests_of(events, rows))
    np.testing.assert_array_equal(one, with_labels)


def predict_here(config: PredictConfig) -> dict:
    return predict.main(config)


@pytest.mark.parametrize("name", ["codes"])
def test_two_processes_write_what_one_does(name, corpus, prepared, sids, tmp_path, run_distributed):
    out = train(name, corpus, prepared, sids, tmp_path / "run")
    events = pq.read_table(corpus / "events.parquet")
    folder = tmp_path / "requests"
    folder.mkdir()
    order = np.random.default_rng(0).permutation(len(events))[:601]
    whole = requests_of(events, order.tolist())
    parts = [whole[:300], whole[:0], whole[300:]]  # one without rows, as Spark writes them
    for number, part in enumerate(parts):
        pq.write_table(part, folder / f"part-{number}.parquet")
    (folder / "_SUCCESS").touch()
    one = PredictConfig(ranker=out, requests=folder, out=tmp_path / "one.parquet", batch_events=500)
    two = dataclasses.replace(one, out=tmp_path / "two.parquet")
    counts = predict.main(one)
    assert run_distributed(predict_here, 2, two) == [counts, counts]
    written = [pq.read_table(config.out) for config in (one, two)]
    columns = [table["probability"].to_numpy() for table in written]
    np.testing.assert_allclose(columns[0], columns[1], rtol=0, atol=1e-6)
    for table in written:
        assert table.drop_columns("probability").equals(whole)
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_file_says_what_made_it(ranker, corpus, sids, tmp_path):
    requests = requests_of(pq.read_table(corpus / "events.parquet"), [5]).replace_schema_metadata({"day": "1"})
    pq.write_table(requests, tmp_path / "requests.parquet")
    predict.main(PredictConfig(ranker=ranker, requests=tmp_path / "requests.parquet", out=tmp_path / "out.parquet"))
    metadata = pq.read_schema(tmp_path / "out.parquet").metadata
    assert metadata[b"day"] == b"1"
    assert metadata[b"sidrec.ranker"] == str(ranker).encode()
    assert metadata[b"sidrec.version"] == sidrec_torchrec.__version__.encode()
    fingerprint = Codec.load(sids["side"] / "codec").spec.fingerprint
    assert json.loads(metadata[b"sidrec.fingerprints"]) == {"side": fingerprint}


def test_the_newest_events_labels_are_not_read(ranker, corpus, tmp_path):
    events = pq.read_table(corpus / "events.parquet")
    rows = places(events)
    last = {user: row for (user, _), row in rows.items()}
    labels = events["label"].to_numpy().copy()
    labels[list(last.values())] = 1 - labels[list(last.values())]
    other = events.set_column(events.schema.get_field_index("label"), "label", pa.array(labels))
    pq.write_table(other, tmp_path / "events.parquet")
    tables = []
    for name, path in (("a", None), ("b", tmp_path / "events.parquet")):
        predict.main(PredictConfig(ranker=ranker, newest=1, events=path, out=tmp_path / f"{name}.parquet"))
        tables.append(pq.read_table(tmp_path / f"{name}.parquet"))
    assert tables[0].equals(tables[1])
    assert tables[0]["event_row"].to_pylist() == sorted(last.values())


def test_codes_of_users_are_those_of_training(ranker, corpus, tmp_path):
    """Whoever joins later, and however a value is called by then, the values that were known keep their codes."""
    events, users = (pq.read_table(corpus / f"{name}.parquet") for name in ("events", "users"))
    requests = requests_of(events, list(range(0, len(events), 3)))
    usual = Predictor.open(ranker).predict(requests)
    first = {name: ["AAA" if pa.types.is_string(users[name].type) else -5] for name in users.schema.names[1:]}
    joined = pa.concat_tables([pa.table({"user_id": [-1]} | first).cast(users.schema), users])
    np.testing.assert_array_equal(Predictor.open(ranker, users=joined).predict(requests), usual)
    nobody = Predictor.open(ranker, users=joined.slice(0, 1)).predict(requests)
    renamed = {name: joined[name].take([0] * len(joined)) for name in users.schema.names[1:]}
    renamed = pa.table({"user_id": joined["user_id"]} | renamed)
    np.testing.assert_array_equal(Predictor.open(ranker, users=renamed).predict(requests), nobody)
    assert not np.allclose(usual, nobody, atol=1e-6)
    np.testing.assert_array_equal(Predictor.open(ranker).predict(requests, users=renamed), nobody)
    name = users.schema.names[1]
    with pytest.raises(DataError, match=f"users: no user feature '{name}'"):
        Predictor.open(ranker, users=users.drop_columns(name))
    wrong = users.set_column(1, name, pa.array([1.5] * len(users)))
    with pytest.raises(DataError, match=f"users: column '{name}' is double"):
        Predictor.open(ranker, users=wrong)
    data = tmp_path / "data"
    data.mkdir()
    (data / "events.parquet").symlink_to(corpus / "events.parquet")
    with pytest.raises(DataError, match=r"users.parquet: no such file; the ranker reads .*: name it with --users"):
        Predictor.open(ranker, events=data)
    np.testing.assert_array_equal(Predictor.open(ranker, events=data, users=corpus).predict(requests), usual)


def test_frames(ranker, corpus):
    pandas = pytest.importorskip("pandas")
    table = pq.read_table(corpus / "events.parquet")
    requests = requests_of(table, [8, 3, 5, 900])
    predictor = Predictor.open(ranker)
    expected = predictor.predict(requests)
    frame = requests.to_pandas().set_index("request_id")
    series = predictor.predict(frame)
    assert series.name == "probability" and series.index.equals(frame.index)
    np.testing.assert_array_equal(series.to_numpy(), expected)
    np.testing.assert_array_equal(predictor.predict(frame, events=table.to_pandas()).to_numpy(), expected)
    assert len(predictor.predict(frame[:0])) == 0
    with pytest.raises(DataError, match="requests: column 'timestamp', row 0 and after: a time is not finite"):
        predictor.predict(frame.assign(timestamp=float("inf")))
    assert isinstance(
        predictor.predict(frame.assign(probability=1.0)), pandas.Series
    )  # what is not read may have any name


@each_library
def test_frames_of_any_library(library, ranker, corpus):
    table = pq.read_table(corpus / "events.parquet")
    requests, frame_of = requests_of(table, [8, 3, 5, 900]), of(library)
    predictor = Predictor.open(ranker)
    expected = predictor.predict(requests)
    predicted = predictor.predict_table(frame_of(requests), events=frame_of(table))
    assert predicted.schema.names == [*requests.schema.names, "probability"]
    np.testing.assert_array_equal(predicted["probability"].to_numpy(), expected)
    assert predicted["request_id"].to_pylist() == requests["request_id"].to_pylist()
    with pytest.raises(DataError, match="requests: has a column 'probability' already"):
        predictor.predict_table(predicted)
    place = requests.schema.get_field_index("item_id")
    bad = requests.set_column(place, "item_id", pa.array([1, 2, None, 4]))
    with pytest.raises(DataError, match="requests: column 'item_id'"):
        predictor.predict_table(frame_of(bad))


def test_other_events(ranker, corpus):
    """Events of this call alone: no more than the request's history matters, and none is no error."""
    table = pq.read_table(corpus / "events.parquet")
    rows = [row for (user, place), row in places(table).items() if place == 20]
    requests = requests_of(table, rows)
    predictor = Predictor.open(ranker)
    usual = predictor.predict(requests)
    earlier = table.filter(pc.less_equal(table["timestamp"], pc.max(requests["timestamp"])))
    np.testing.assert_allclose(predictor.predict(requests, events=earlier), usual, rtol=0, atol=1e-6)
    none = predictor.predict(requests, events=table.slice(0, 0))
    assert not np.allclose(none, usual, atol=1e-4)
    one_class = table.filter(pc.equal(table["label"], 1))
    assert np.isfinite(predictor.predict(requests, events=one_class)).all()
    np.testing.assert_array_equal(predictor.predict(requests), usual)
    short = Predictor.open(ranker, max_history=2).predict(requests)
    assert not np.allclose(short, usual, atol=1e-4)
    with pytest.raises(SidrecError, match="requests: must be a frame .*, is list"):
        predictor.predict([1])


def test_items_that_came_later(corpus, sids, tmp_path):
    """Of one more item the ranker knows the SID alone; all that was there keeps its probability."""
    data = shutil.copytree(corpus, tmp_path / "data")
    encoded = shutil.copytree(sids["side"], tmp_path / "side")
    config = PrepareConfig(max_history=48, targets_per_row=32)
    sequences = prepare(data, tmp_path / "sequences", config).folder
    out = train("codes", data, sequences, {"side": encoded}, tmp_path / "run")
    events, items = (pq.read_table(data / f"{name}.parquet") for name in ("events", "items"))
    requests = requests_of(events, list(range(500)))
    before = Predictor.open(out).predict(requests)
    new = items.slice(3, 1).set_column(items.schema.get_field_index("item_id"), "item_id", pa.array([10**6]))
    pq.write_table(pa.concat_tables([new, items]), data / "items.parquet")
    asked = requests.set_column(requests.schema.get_field_index("item_id"), "item_id", pa.array([10**6] * 500))
    with pytest.raises(DataError, match="not the items that"):
        Predictor.open(out)
    shutil.rmtree(encoded)
    tokenizer = sids["side"].parent / "tokenizers" / "side"
    encode_corpus.main(encode_corpus.EncodeCorpusConfig(data=data, tokenizer=tokenizer, out=encoded))
    anew = prepare(data, tmp_path / "anew", config).folder
    predictor = Predictor.open(out, prepared=anew)
    np.testing.assert_allclose(predictor.predict(requests), before, rtol=0, atol=1e-6)
    twin = requests.set_column(
        requests.schema.get_field_index("item_id"), "item_id", [items["item_id"].take([3] * 500)]
    )
    np.testing.assert_allclose(predictor.predict(asked), predictor.predict(twin), rtol=0, atol=1e-6)


def without(table: pa.Table, name: str) -> pa.Table:
    return table.drop_columns(name)


def put(table: pa.Table, name: str, row: int, value) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, table[name].type))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: without(t, "timestamp"),
            r"requests.parquet: no required column 'timestamp'; the file has 'request_id'",
        ),
        (
            lambda t: t.cast(t.schema.set(1, pa.field("user_id", pa.float64()))),
            "column 'user_id' is double; ids are integers, strings or bytes",
        ),
        (
            lambda t: t.cast(t.schema.set(1, pa.field("user_id", pa.string()))),
            "column 'user_id', row 0: ids are large_string here and int64 there",
        ),
        (
            lambda t: put(t, "timestamp", 42, -3),
            "requests.parquet: column 'timestamp', row 42: -3 is below 0; give seconds",
        ),
        (lambda t: put(t, "timestamp", 43, None), "requests.parquet: column 'timestamp', row 43: null"),
        (lambda t: put(t, "user_id", 41, None), "requests.parquet: column 'user_id', row 41: null"),
        (
            lambda t: put(t, "item_id", 40, 10**9),
            r"requests.parquet: column 'item_id', row 40: item_id 1000000000 is not in .*items.parquet; leave its requests out",
        ),
        (
            lambda t: t.rename_columns(["probability", *t.schema.names[1:]]),
            "has a column 'probability' already, .* rename",
        ),
    ],
)
def test_bad_requests_are_refused_in_words(change, words, ranker, corpus, tmp_path):
    requests = requests_of(pq.read_table(corpus / "events.parquet"), list(range(50)))
    pq.write_table(change(requests), tmp_path / "requests.parquet")
    config = PredictConfig(ranker=ranker, requests=tmp_path / "requests.parquet", out=tmp_path / "out.parquet")
    with pytest.raises(SidrecError, match=words):
        predict.main(config)
    assert [path.name for path in tmp_path.iterdir()] == ["requests.parquet"]


def test_what_else_is_refused(ranker, corpus, tmp_path):
    requests = requests_of(pq.read_table(corpus / "events.parquet"), list(range(5)))
    folder = tmp_path / "requests"
    folder.mkdir()
    config = PredictConfig(ranker=ranker, requests=folder, out=tmp_path / "out.parquet")
    with pytest.raises(DataError, match=r"requests: no file \*.parquet in this folder"):
        predict.main(config)
    pq.write_table(requests, folder / "a.parquet")
    note = requests.schema.get_field_index("note")
    pq.write_table(requests.set_column(note, "note", pa.array([1] * 5)), folder / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: column 'note' is int64, in .*a.parquet it is list"):
        predict.main(config)
    pq.write_table(without(requests, "note"), folder / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: no column 'note'"):
        predict.main(config)
    pq.write_table(requests.append_column("more", pa.array([1] * 5)), folder / "b.parquet")
    with pytest.raises(DataError, match=r"a.parquet: no column 'more'"):
        predict.main(config)
    with pytest.raises(SidrecError, match="would be one of the requests the next time"):
        predict.main(dataclasses.replace(config, out=folder / "out.parquet"))
    with pytest.raises(SidrecError, match="a folder is there; name a file"):
        predict.main(dataclasses.replace(config, out=tmp_path))
    with pytest.raises(DataError, match="no such file"):
        predict.main(dataclasses.replace(config, requests=tmp_path / "nothing.parquet"))
    with pytest.raises(SidrecError, match=r"run.json: not found"):
        predict.main(dataclasses.replace(config, ranker=tmp_path))
    for wrong in ({"newest": 1}, {"requests": None}):
        with pytest.raises(ValueError, match="name either --requests, a Parquet file, or --newest"):
            dataclasses.replace(config, **wrong)
    with pytest.raises(ValueError, match="batch_events must be at least 1"):
        dataclasses.replace(config, batch_events=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["requests"]


def cut_by_user(monkeypatch) -> None:
    """Nothing is too little to be cut by user, and there are several shares of everything; this process scores all buckets."""
    monkeypatch.setattr(predict, "_FEW_EVENTS", 0)
    monkeypatch.setattr(request_buckets, "_PER_SHARE", 100)
    monkeypatch.setitem(ENGINES._entries, "local", Inline)


@pytest.fixture
def by_user(monkeypatch) -> None:
    """As ``cut_by_user``, but two processes score them."""
    cut_by_user(monkeypatch)
    monkeypatch.setitem(ENGINES._entries, "local", lambda: LocalEngine(2))


@pytest.mark.parametrize("name", ["local", pytest.param("ray", marks=needs_ray)])
def test_an_engine_writes_the_same_file(name, ranker, corpus, tmp_path, by_user, monkeypatch):
    events = pq.read_table(corpus / "events.parquet")
    order = np.random.default_rng(0).permutation(len(events))[:601].tolist()
    requests = requests_of(events, order)
    strangers = pa.array([-7, 10**12, *requests["user_id"].to_pylist()[2:]])
    requests = requests.set_column(1, "user_id", strangers)
    pq.write_table(requests, tmp_path / "requests.parquet", row_group_size=150)
    one = PredictConfig(ranker=ranker, requests=tmp_path / "requests.parquet", out=tmp_path / "one.parquet")
    with monkeypatch.context() as context:
        context.setattr(predict, "_FEW_EVENTS", 10**9)
        counts = predict.main(one)
    assert counts["without_history"] > 1
    shared = dataclasses.replace(one, out=tmp_path / "shared.parquet", engine=name)
    monkeypatch.setattr(Predictor, "_probabilities", None)  # in this process
    assert predict.main(shared) == counts
    tables = [pq.read_table(config.out) for config in (one, shared)]
    assert tables[0].drop_columns("probability").equals(tables[1].drop_columns("probability"))
    columns = [table["probability"].to_numpy() for table in tables]
    np.testing.assert_allclose(*columns, rtol=0, atol=1e-6)  # other users are beside one in a batch
    assert not list(tmp_path.glob(".*"))


def test_only_what_is_asked_for_is_put_at_a_url(ranker, corpus, tmp_path, by_user, monkeypatch):
    events = pq.read_table(corpus / "events.parquet")
    pq.write_table(requests_of(events, list(range(0, len(events), 7))), tmp_path / "requests.parquet")
    here = PredictConfig(ranker=ranker, requests=tmp_path / "requests.parquet", out=tmp_path / "here.parquet")
    put, store = [], Store.put
    monkeypatch.setattr(Store, "put", lambda own, path, place: (put.append(place.key), store(own, path, place))[1])
    predict.main(here)
    assert not put
    predict.main(dataclasses.replace(here, out=f"file://{tmp_path}/there/p.parquet"))
    assert pq.read_table(here.out).equals(pq.read_table(tmp_path / "there" / "p.parquet"))
    assert put and not any("scratch" in key for key in put)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["p.parquet"]


def test_a_bucket_that_is_scored_is_not_scored_again(ranker, corpus, tmp_path, by_user, monkeypatch):
    events = pq.read_table(corpus / "events.parquet")
    pq.write_table(requests_of(events, list(range(0, len(events), 7))), tmp_path / "requests.parquet")
    config = PredictConfig(ranker=ranker, out=tmp_path / "out.parquet", requests=tmp_path / "requests.parquet")
    monkeypatch.setitem(ENGINES._entries, "local", Inline)
    scored: list[int] = []
    score = ScoreBucket.__call__

    def dying(self, bucket):
        scored.append(bucket)
        if len(scored) == 5:
            raise OSError("the disk is gone")
        return score(self, bucket)

    monkeypatch.setattr(ScoreBucket, "__call__", dying)
    with pytest.raises(OSError, match="the disk is gone"):
        predict.main(config)
    assert not config.out.exists()
    (scratch,) = tmp_path.glob(".*.scratch.tmp")
    (scratch / ".scores-5.arrow.host-7-0123456789abcdef.tmp").write_text("half of it")
    monkeypatch.setattr(request_buckets, "write_by_user", None)  # nothing is cut again
    counts = predict.main(config)
    assert scored == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    assert counts["requests"] == len(pq.read_table(config.out)) == -(-len(events) // 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "requests.parquet"]


def test_bad_rows_are_named_by_whoever_meets_them(ranker, corpus, tmp_path, by_user):
    requests = requests_of(pq.read_table(corpus / "events.parquet"), list(range(500)))
    pq.write_table(put(requests, "item_id", 440, 10**9), tmp_path / "requests.parquet", row_group_size=100)
    config = PredictConfig(ranker=ranker, requests=tmp_path / "requests.parquet", out=tmp_path / "out.parquet")
    with pytest.raises(DataError, match=r"requests.parquet: column 'item_id', row 440: item_id 1000000000 is not in"):
        predict.main(config)
    text = requests.cast(requests.schema.set(1, pa.field("user_id", pa.string())))
    pq.write_table(text, tmp_path / "requests.parquet")
    with pytest.raises(DataError, match=r"column 'user_id', row \d+: ids are large_string here and int64 there"):
        predict.main(config)
    assert [path.name for path in tmp_path.iterdir()] == ["requests.parquet"]


def test_it_can_be_pickled(ranker, corpus):
    predictor = Predictor.open(ranker)
    requests = requests_of(pq.read_table(corpus / "events.parquet"), [8, 3, 5, 900])
    again = pickle.loads(pickle.dumps(predictor))
    assert again.predict_table(requests).equals(predictor.predict_table(requests))


def test_a_killed_run_goes_on_behind_its_last_part(ranker, corpus, tested, tmp_path, monkeypatch):
    events = pq.read_table(corpus / "events.parquet")
    requests = requests_of(events, list(range(0, len(events), 7)))
    pq.write_table(requests, tmp_path / "requests.parquet")
    config = PredictConfig(ranker=ranker, out=tmp_path / "whole.parquet", requests=tmp_path / "requests.parquet")
    counts = predict.main(config)
    whole = pq.read_table(config.out)
    size = len(requests) // 9
    monkeypatch.setattr(requests_module, "_BATCH", size)
    monkeypatch.setattr(predict, "_PART_BATCHES", 2)
    config = dataclasses.replace(config, out=tmp_path / "parts.parquet")
    scored: list[int] = []
    score = Predictor._probabilities

    def dying(self, batch, histories):
        scored.append(len(batch))
        if len(scored) == 5:
            raise OSError("the disk is gone")
        return score(self, batch, histories)

    monkeypatch.setattr(Predictor, "_probabilities", dying)
    with pytest.raises(OSError, match="the disk is gone"):
        predict.main(config)
    assert not config.out.exists()
    (parts,) = tmp_path.glob(".parts.parquet.parts-*")
    (parts / ".part-00003.parquet.host-7-0123456789abcdef.tmp").write_text("half of it")  # by a process that was killed
    scored.clear()
    scored += [0] * 5
    assert predict.main(config) == counts
    assert len(scored) - 5 == -(-len(requests) // size) - 4  # two parts of two batches were whole
    assert config.out.is_dir() and pq.read_table(config.out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.parquet", "requests.parquet", "whole.parquet"]
    assert predict.main(config) == counts  # into what it wrote itself
    (config.out / "mine.txt").write_text("")
    with pytest.raises(SidrecError, match="parts.parquet: a folder is there; name a file"):
        predict.main(config)
