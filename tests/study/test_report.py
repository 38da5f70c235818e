"""The tables of a comparison: over seeds, by bucket, where a run of an earlier version has none."""

import re

from sidrec_torchrec.study.report import summarize_arm
from sidrec_torchrec.study.report_html import write_html

COSTS = {"bytes_per_event_stored": 5.0, "bytes_per_event_kjt": 8, "table_bytes": 100, "train_events_per_s": 1.0}
TEST = {f"{kind}_{part}": 0.5 for kind in ("ne", "auc") for part in ("warm", "cold")} | {"targets_warm": 30.0}


def run(ne: float, calibration: float | None) -> dict:
    rows = [
        {"bucket": "0", "targets": 0, "positives": 0, "ne": None, "calibration": None, "note": "no targets"},
        {"bucket": "1 to 9", "targets": 1_200, "positives": 300, "ne": ne, "calibration": calibration},
        {
            "bucket": "10 to 49",
            "targets": 5,
            "positives": 0,
            "ne": None,
            "calibration": None,
            "note": "negatives alone",
        },
    ]
    test = TEST | {"breakdown": {"history_length": {"label": rows}}}
    return {"test": test, **COSTS, "best_epoch": 0, "train_seconds": 1.0}


def write(runs: dict[str, list[dict]], folder) -> str:
    report = {
        "arms": {arm: summarize_arm(its, None) for arm, its in runs.items()},
        "sequences": {"tasks": ["label"]},
        "tokenizer": {},
        "protocol": "",
        "command": "",
        "seconds": 1.0,
        "processes": 1,
        "hardware": {},
        "versions": {},
    }
    write_html(report, folder)
    return (folder / "report.html").read_text()


def cells(page: str) -> list[list[str]]:
    table = re.search(r"<caption>events that the target reads</caption>(.*?)</table>", page)[1]
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)]


def test_buckets_are_rows_and_arms_are_columns(tmp_path):
    runs = {"none": [run(0.9, 1.1), run(0.7, 1.3)], "a<b": [run(0.6, 1.0), run(0.6, None)]}
    summary = summarize_arm(runs["none"], None)
    assert "breakdown" not in summary["ne_warm"] and summary["ne_warm"] == [0.5, 0.5]
    rows = summary["breakdown"]["history_length"]["label"]
    assert rows[1] == {
        "bucket": "1 to 9",
        "targets": 1200,
        "positives": 300,
        "ne": [0.9, 0.7],
        "calibration": [1.1, 1.3],
    }
    assert rows[2]["ne"] == [None, None] and rows[2]["note"] == "negatives alone"
    assert cells(write(runs, tmp_path)) == [
        ["", "targets", "positive", "none", "a&lt;b"],
        ["1 to 9", "1,200", "25.0%", "0.8000 ±0.1414<small>1.20</small>", "0.6000 ±0.0000<small>1.00</small>"],
        ["10 to 49", "5", "0.0%", "-<small>-</small>", "-<small>-</small>"],
    ]


def test_runs_of_earlier_versions_have_no_tables(tmp_path):
    old = run(0.9, 1.0)
    old["test"] = TEST
    assert summarize_arm([old, run(0.9, 1.0)], None)["breakdown"] == {}
    assert "Where NE comes from" not in write({"none": [old]}, tmp_path)
    page = write({"none": [old], "side": [run(0.6, 1.0)]}, tmp_path)
    assert cells(page)[0] == ["", "targets", "positive", "side"]
