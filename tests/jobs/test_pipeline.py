"""The main job on a small corpus: report, resuming, refusals."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.errors import DataError, RunMismatchError, SidrecError
from sidrec_torchrec.files import read_json, read_object
from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.fusion.training import TokenizerTrainingConfig
from sidrec_torchrec.jobs import pipeline, train_ranker, train_tokenizer
from sidrec_torchrec.jobs.pipeline import PipelineConfig
from sidrec_torchrec.ranker.arms import ArmConfig
from sidrec_torchrec.ranker.breakdown import TABLES
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from sidrec_torchrec.study.pictures import bucket_title
from tests.jobs.test_train_ranker import SMALL

RANKER = RankerTrainingConfig(epochs=1, batch_events=1024, model=SMALL)


def make_config(corpus, out, **changes):
    values = {
        "data": corpus,
        "out": out,
        "arms": ("none", "prefix-ngram", "side"),
        "target": ("category", "tags"),
        "fused": QuantizerConfig(stages="ternary*10"),
        "residual": QuantizerConfig(kind="rq", stages="onehot:8*2"),
        "tokenizer": TokenizerTrainingConfig(epochs=1),
        "ranker": RANKER,
        "arm_options": ArmConfig(table_dim=16, ngram_rows=200),
    }
    return PipelineConfig(**values | changes)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline") / "run"
    return out, pipeline.main(make_config(corpus, out))


def test_report_holds_what_it_promises(finished, corpus):
    out, report = finished
    assert read_object(out / "report.json") == json.loads(json.dumps(report))
    assert list(report["arms"]) == ["none", "prefix-ngram", "side"]
    for name, arm in report["arms"].items():
        metrics = json.loads((out / "rankers" / name / "seed-0" / "metrics.json").read_text())
        base = json.loads((out / "rankers" / "none" / "seed-0" / "metrics.json").read_text())
        for part in ("warm", "cold"):
            assert arm[f"ne_{part}"] == [metrics["test"][f"ne_{part}"]]
            gain = 1 - metrics["test"][f"ne_{part}"] / base["test"][f"ne_{part}"]
            assert arm[f"ne_gain_{part}"] == pytest.approx(gain)
        for field in ("bytes_per_event_stored", "bytes_per_event_kjt", "table_bytes", "train_events_per_s"):
            assert arm[field] == metrics[field]
        assert list(arm["breakdown"]) == list(TABLES)
        for table, rows_of in arm["breakdown"].items():
            for row, of_seed in zip(rows_of["label"], metrics["test"]["breakdown"][table]["label"], strict=True):
                assert row == of_seed | {"ne": [of_seed["ne"]], "calibration": [of_seed["calibration"]]}
    assert set(report["tokenizer"]) == {"side", "rq-text_emb", "rq-image_emb"}
    assert report["command"] == "sidrec_torchrec.jobs.pipeline.main, called from Python"
    assert report["versions"]["torch"] and report["hardware"]["cores"] and report["seconds"] > 0
    page = (out / "report.html").read_text()
    assert page.count("<svg viewBox") > 10 and "prefix-ngram" in page
    assert [bucket_title(table, "label") in page for table in TABLES] == [True] * len(TABLES)
    assert report["data"]["ne_oracle"] == json.loads((corpus / "synthetic.json").read_text())["ne_oracle"]
    assert "http://" not in page and "https://" not in page


def test_a_dry_run_finds_what_is_finished(finished, corpus):
    out, _ = finished
    steps = pipeline.plan(make_config(corpus, out, arms=("none", "prefix-ngram", "side", "id")))
    assert steps.pop("train ranker id seed 0").startswith("new (")
    assert steps.pop("data") == "made and checked"
    assert steps.pop("report").startswith("there is one, to be written again")
    assert len(steps) == 12, steps
    assert {state.partition(" (")[0] for state in steps.values()} == {"finished"}
    (state,) = pipeline.plan(make_config(corpus, out, collaborative=False, fused=QuantizerConfig())).values()
    assert "(collaborative was True, is False; fused.stages was 'ternary*10', is 'ternary*39')" in state


def test_second_run_trains_nothing(finished, corpus, monkeypatch, capsys):
    out, report = finished

    def fail(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(train_ranker, "_train_and_test", fail)
    monkeypatch.setattr(train_tokenizer, "_train", fail)
    assert pipeline.main(make_config(corpus, out)) == report
    assert "prefix-ngram" in capsys.readouterr().out


def test_refusals(finished, corpus, tmp_path):
    out, _ = finished
    with pytest.raises(RunMismatchError, match="another run .ranker.epochs was 1, is 2"):
        pipeline.main(make_config(corpus, out, ranker=dataclasses.replace(RANKER, epochs=2)))
    with pytest.raises(DataError, match="no target 'genres'; available: .*'category'"):
        pipeline.main(make_config(corpus, tmp_path / "a", target=("genres",)))
    with pytest.raises(DataError, match="no source 'plot_emb'; available: 'text_emb', 'image_emb'"):
        pipeline.main(make_config(corpus, tmp_path / "b", source=("plot_emb",)))
    codes = dataclasses.replace(SMALL, attention="codes")
    with pytest.raises(SidrecError, match="needs an arm whose SIDs travel: side, learned-side; got 'none'"):
        make_config(corpus, tmp_path / "run", arms=("none", "side"), ranker=dataclasses.replace(RANKER, model=codes))
    with pytest.raises(SidrecError, match="unknown arm 'sidee'"):
        make_config(corpus, tmp_path / "c", arms=("none", "sidee"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").touch()
    with pytest.raises(RunMismatchError, match="holds files of something else"):
        pipeline.main(make_config(corpus, tmp_path / "d"))


def test_changed_data_is_noticed(finished, corpus, tmp_path):
    data = shutil.copytree(corpus, tmp_path / "data")
    out = tmp_path / "run"
    pipeline.main(make_config(data, out, arms=("none",)))
    events = pq.read_table(data / "events.parquet")
    pq.write_table(events.slice(0, events.num_rows - 1), data / "events.parquet")
    with pytest.raises(RunMismatchError, match=r"made from other inputs \(.*events.parquet has changed\)"):
        pipeline.main(make_config(data, out, arms=("none",)))


def test_bad_data_is_refused_before_anything_is_trained(corpus, tmp_path):
    data = shutil.copytree(corpus, tmp_path / "data")
    items = pq.read_table(data / "items.parquet")
    vectors = items["text_emb"].to_pylist()
    row = next(i for i, vector in enumerate(vectors) if vector is not None)
    vectors[row][3] = float("nan")
    place = items.schema.get_field_index("text_emb")
    kind = items.schema.field("text_emb").type
    pq.write_table(items.set_column(place, "text_emb", pa.array(vectors, kind)), data / "items.parquet")
    with pytest.raises(DataError, match=rf"items\.parquet: column 'text_emb', row {row} .*value 3 is nan"):
        pipeline.main(make_config(data, tmp_path / "run"))
    assert not (tmp_path / "run" / "tokenizers").exists()


def test_positives_only(corpus, tmp_path):
    data = shutil.copytree(corpus, tmp_path / "data")
    events = pq.read_table(data / "events.parquet").drop_columns(["label"])
    pq.write_table(events, data / "events.parquet")
    report = pipeline.main(make_config(data, tmp_path / "run", arms=("none",)))
    assert report["sequences"]["sampled_negatives"] and "matched in popularity" in report["protocol"]
    # nothing tells a negative from a positive without content
    assert report["arms"]["none"]["ne_warm"][0] == pytest.approx(1, abs=0.03)


def test_a_split_by_date(corpus, tmp_path):
    time_N = pq.read_table(corpus / "events.parquet")["timestamp"].to_numpy()
    cut = int(np.quantile(time_N, 0.8))
    protocol = PrepareConfig(split="time", test_from=cut, validation_fraction=0.2)
    report = pipeline.main(make_config(corpus, tmp_path / "run", arms=("none", "side"), protocol=protocol))
    assert report["protocol"].startswith(f"The events from {cut} on (UTC) are the test targets")
    assert report["sequences"]["counts"]["test"]["targets"] == (time_N >= cut).sum()
    for table in ("model_age", "item_age"):
        rows = report["arms"]["side"]["breakdown"][table]["label"]
        assert sum(row["targets"] for row in rows) == (time_N >= cut).sum()
    assert report["arms"]["side"]["breakdown"]["model_age"]["label"][0]["targets"] == 0  # none before training's end


def test_more_arms_join_a_finished_run(finished, corpus):
    out, _ = finished
    before = (out / "rankers" / "none" / "seed-0" / "metrics.json").read_text()
    report = pipeline.main(make_config(corpus, out, arms=("none", "id")))
    assert list(report["arms"]) == ["none", "id"]
    assert (out / "rankers" / "none" / "seed-0" / "metrics.json").read_text() == before


def test_rankers_take_tokenizers_of_several_seeds_in_turn(corpus, tmp_path):
    changes = {"arms": ("none", "raw", "side"), "seeds": 3, "tokenizer_seeds": 2, "collaborative": False, "tune": False}
    report = pipeline.main(make_config(corpus, tmp_path / "run", **changes))
    assert list(report["tokenizer"]) == ["side", "seed-1/side"]
    first, second = (tmp_path / "run" / "tokenizers" / name / "run.json" for name in ("side", "seed-1/side"))
    assert [json.loads(path.read_text())["seed"] for path in (first, second)] == [0, 1]
    runs = [read_json(tmp_path / "run" / "rankers" / "side" / f"seed-{seed}" / "run.json") for seed in range(3)]
    sids = [run["sids"] for run in runs]
    assert sids[0] == sids[2] and sids[1] != sids[0] and "sids/seed-1/side" in json.dumps(sids[1])
    side, raw = report["arms"]["side"], report["arms"]["raw"]
    low, high = side["ne_gain_all_interval"]
    assert low < side["ne_gain_all"] < high
    assert raw["ne_kept_all"] in (None, 1.0)
    with pytest.raises(ValueError, match="tokenizer_seeds 2 is more than seeds 1: no ranker would read the last"):
        make_config(corpus, tmp_path / "other", tokenizer_seeds=2)
