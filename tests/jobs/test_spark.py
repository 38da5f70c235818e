"""The Spark recipe: the rows that the local jobs give, and a prepared folder that trains."""

import importlib.util
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.sids import open_sids
from sidrec_torchrec.data.splits import SPLITS
from sidrec_torchrec.jobs import train_ranker
from sidrec_torchrec.ranker.predictor import Predictor
from tests.conftest import ROOT
from tests.jobs.test_train_ranker import SMALL, make_config

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("pyspark") is None, reason="pyspark is not installed"),
    pytest.mark.skipif(
        shutil.which("java") is None and "JAVA_HOME" not in os.environ, reason="no Java, which Spark needs"
    ),
]


def rows_of(table) -> list[str]:
    return sorted(map(repr, table.to_pylist()))


def test_spark_gives_what_the_jobs_do(corpus, prepared, sids, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(corpus / "events.parquet", data)
    items = pq.read_table(corpus / "items.parquet")
    wide = [pa.list_(pa.float32()) if "halffloat" in str(field.type) else field.type for field in items.schema]
    items = items.cast(pa.schema(list(zip(items.schema.names, wide, strict=True))))  # Spark has no float16
    pq.write_table(items, data / "items.parquet")
    config = PrepareConfig(max_history=48, targets_per_row=32)
    here = prepare(data, tmp_path / "here", config)
    names = sorted(path.relative_to(here.folder) for path in here.folder.rglob("*") if path.is_file())
    trained = train_ranker.main(
        make_config(data, here.folder, sids, tmp_path / "ranker", "side", model=SMALL, epochs=1)
    )
    folders = [data, sids["side"].parent / "tokenizers" / "side", tmp_path / "ranker", tmp_path / "out"]
    small = f"--master local[2] --conf spark.ui.enabled=false --conf spark.sql.shuffle.partitions=2 --conf spark.local.dir={tmp_path}"
    environment = os.environ | {
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_SUBMIT_ARGS": f"{small} pyspark-shell",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "spark_recipe.py", *folders],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    out = tmp_path / "out"

    for name in names:
        assert (out / "prepared" / name).read_bytes() == (here.folder / name).read_bytes(), name
    again = make_config(data, out / "prepared", sids, tmp_path / "again", "side", model=SMALL, epochs=1)
    assert train_ranker.main(again)["test"] == trained["test"]

    rows = pq.read_table(out / "rows")
    for split in SPLITS:
        own = rows.filter(np.array(rows["split"].to_pylist()) == split).drop_columns("split")
        written = pq.read_table(here.path(split))
        assert rows_of(own) == rows_of(written) and len(own)

    ids, words_NW = open_sids(sids["side"]).read()
    made = pq.read_table(out / "sids")
    assert dict(zip(made["item_id"].to_pylist(), made["sid"].to_pylist(), strict=True)) == dict(
        zip(ids.to_pylist(), words_NW[:, 0].tolist(), strict=True)
    )

    scores = pq.read_table(out / "scores")
    requests = scores.drop_columns("probability")
    assert len(requests) == 200
    expected = Predictor.open(tmp_path / "ranker").predict(requests)
    np.testing.assert_allclose(scores["probability"].to_numpy(), expected, rtol=0, atol=1e-6)
