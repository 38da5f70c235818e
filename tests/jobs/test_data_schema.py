"""From a folder whose columns are called otherwise to a trained ranker, without renaming one."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.cli import main
from sidrec_torchrec.data.folder import DataFolder
from sidrec_torchrec.data.propose import propose
from sidrec_torchrec.errors import DataError

N, USERS, LENGTH = 60, 30, 20


@pytest.fixture
def logs(tmp_path):
    """String ids, logs cut by day, milliseconds."""
    rng = np.random.default_rng(0)
    time = 1_700_000_000_000 + np.cumsum(rng.integers(1, 10**7, (USERS, LENGTH)), 1).ravel()
    sku = pa.array([f"sku-{i:04d}" for i in range(N)])
    vectors = list(rng.standard_normal((N, 8)).astype(np.float32))
    pq.write_table(pa.table({"sku": sku, "emb": vectors, "title": sku}), tmp_path / "items.parquet")
    columns = {
        "uid": pa.array([f"u{u}" for u in np.repeat(np.arange(USERS), LENGTH)]),
        "sku": sku.take(pa.array(rng.integers(0, N, USERS * LENGTH))),
        "ts": time,
        "label": rng.integers(0, 2, USERS * LENGTH).astype(bool),
    }
    events = pa.table(columns).sort_by("ts")
    day = events["ts"].to_numpy() // 86_400_000
    for number in np.unique(day):
        folder = tmp_path / "events" / f"day={number}"
        folder.mkdir(parents=True)
        pq.write_table(events.filter(pa.array(day == number)), folder / "part-0.parquet")
    users = {
        "uid": [f"u{u}" for u in range(USERS)],
        "country": ["a", "b", "c"] * 10,
        "email": [f"{u}@x" for u in range(USERS)],
    }
    pq.write_table(pa.table(users), tmp_path / "users.parquet")
    return tmp_path


def test_what_is_proposed(logs):
    schema = propose(DataFolder.of(logs))
    assert schema.names == {"item_id": "sku", "user_id": "uid", "timestamp": "ts"}
    assert (schema.time_unit, schema.user_columns) == ("ms", ("country",))
    table = pq.read_table(logs / "items.parquet").append_column("asin", pa.array([1] * N))
    pq.write_table(table, logs / "items.parquet")
    with pytest.raises(
        DataError, match=r"no column 'item_id', and 'sku' and 'asin' could be it; say which it is: --columns"
    ):
        propose(DataFolder.of(logs))


def test_every_job_reads_it(logs, tmp_path, capfd):
    """Ids keep their own names in every output."""
    data, out = str(logs), tmp_path / "out"
    assert main(["train-tokenizer", "--data", data, "--out", str(out / "t"), "--epochs", "1"]) == 2
    assert "--columns item_id=ITS_NAME" in capfd.readouterr().err
    assert main(["data", "schema", "--data", data]) == 0
    assert json.loads((logs / "schema.json").read_text())["time_unit"] == "ms"
    assert main(["data", "validate", "--data", data]) == 0
    capfd.readouterr()
    assert main(["train-tokenizer", "--data", data, "--out", str(out / "t"), "--epochs", "1"]) == 0
    assert "items.parquet: not read: 'title' (string: not named as a target)" in " ".join(
        capfd.readouterr().err.split()
    )
    assert main(["encode-corpus", "--data", data, "--tokenizer", str(out / "t"), "--out", str(out / "sids")]) == 0
    assert main(["prepare", "--data", data, "--out", str(out / "p")]) == 0
    said = capfd.readouterr().err
    assert "'day' (int32: not named as a task)" in said
    assert "'email' (string: not among --user-columns)" in said
    ranker = ["--data", data, "--prepared", str(out / "p"), "--epochs", "1", "--out", str(out / "r")]
    assert main(["train-ranker", *ranker, "--arm", "side", "--sids", str(out / "sids")]) == 0
    assert main(["predict", "--ranker", str(out / "r"), "--newest", "1", "--out", str(out / "scores.parquet")]) == 0
    sids, scores = pq.read_table(out / "sids" / "sids.parquet"), pq.read_table(out / "scores.parquet")
    assert sids["item_id"].to_pylist() == [f"sku-{i:04d}" for i in range(N)]
    assert sorted(scores["user_id"].to_pylist()) == sorted(f"u{u}" for u in range(USERS))
    requests = pa.table({"uid": ["u3", "new"], "sku": ["sku-0001", "sku-0002"], "ts": [1_800_000_000_000] * 2})
    pq.write_table(requests, tmp_path / "requests.parquet")
    given = ["--requests", str(tmp_path / "requests.parquet"), "--out", str(out / "given.parquet")]
    assert main(["predict", "--ranker", str(out / "r"), *given]) == 0
    scored = pq.read_table(out / "given.parquet")
    assert scored.column_names == ["uid", "sku", "ts", "probability"]
    assert scored["uid"].to_pylist() == ["u3", "new"]
