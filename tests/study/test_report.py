"""The page of a comparison: what it says, by bucket too, where a run of an earlier version has less."""

import html
import re

import pytest

from sidrec_torchrec.study.explorer import Explorer
from sidrec_torchrec.study.pictures import bucket_title
from sidrec_torchrec.study.report import print_report, summarize_arm
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
    write_html(report, folder / "report.html")
    return (folder / "report.html").read_text()


def cells(page: str) -> list[list[str]]:
    title = bucket_title("history_length", "label")
    table = re.search(rf"<caption>{title}</caption>(.*?)</table>", page, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def text_of(page: str) -> str:
    """What is read of it, in one line."""

    without = re.sub(r"<(style|script)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", without)).split())


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
        ["bucket", "targets", "positive<small>%</small>", "none", "a&lt;b"],
        ["1 to 9", "1,200", "25.0", "0.8000 ±1.2706<br><small>1.20</small>", "0.6000 ±0.0000<br><small>1.00</small>"],
        ["10 to 49", "5", "0.0", "-<br><small>-</small>", "-<br><small>-</small>"],
    ]


def test_runs_of_earlier_versions_have_no_tables(tmp_path):
    old = run(0.9, 1.0)
    old["test"] = TEST
    assert summarize_arm([old, run(0.9, 1.0)], None)["breakdown"] == {}
    page = write({"none": [old]}, tmp_path)
    assert "Where the gain comes from" not in page and "Calibration and order" in page
    page = write({"none": [old], "side": [run(0.6, 1.0)]}, tmp_path)
    assert cells(page)[0][3:] == ["side"]


def test_the_page_says_what_a_reader_needs(make_report, tmp_path, capsys):
    report = make_report()
    write_html(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    text = text_of(page)
    values = report["arms"]["side"]
    gain = [100 * (1 - own / base) for own, base in zip(values["ne_warm"], report["arms"]["none"]["ne_warm"])]
    mean = sum(gain) / 3
    half = 4.3027 * (sum((value - mean) ** 2 for value in gain) / 2 / 3) ** 0.5
    assert f"{mean:+.2f} ±{half:.2f}" in text and f"{mean:+.1f} ±{half:.1f}" in text  # in the table, and in the picture
    positives = sum(90 * place + 13 for place in range(6)) / sum(200 * place + 30 for place in range(6))
    assert f"here {positives:.1%} of the test targets" in text and "true probabilities have NE 0.640" in text.replace(
        "this corpus is synthetic, and its own probabilities", "true probabilities"
    )
    for words in ("600 users", "2,000 items", "120,000 events", "4,500 test targets on warm items", "3 seeds"):
        assert words in text
    assert "The embeddings themselves, as they come" in text  # what an arm is
    assert "idle digits which" in text and re.search(r"side 20 31\.7 1\.43 20 4 of 2,000 \(0\.2%\) 2", text)
    assert report["command"] in text and "Seconds by step" in text and "sidrec train-ranker --help" in text
    assert not re.search(r"https?:|<img|<link|@import|url\((?!#)", page)  # nothing is fetched
    print_report(report)
    assert "mean of 3 seeds with its 95% interval" in capsys.readouterr().out


def test_text_of_the_data_is_text(make_report, tmp_path):
    evil = "</script><script>alert(1)</script>"
    report = make_report(arms=("none", "side"), protocol=f"protocol {evil}", command=evil)
    report["tokenizer"][evil] = report["tokenizer"].pop("side")
    report["sequences"]["tasks"] = [evil]
    explorer = Explorer(1, (evil,), [evil], [f"{evil} `x` & y"], {evil: [[0, 1]]})
    write_html(report, tmp_path / "report.html", explorer)
    page = (tmp_path / "report.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page
    assert page.count("<script") == 2 == page.count("</script")


@pytest.mark.parametrize("arms", [("side",), ("raw", "side"), ("none",), ("none", "raw")])
def test_any_arms_make_a_page(arms, make_report, tmp_path):
    write_html(make_report(arms=arms, seeds=1), tmp_path / "report.html")
    text = text_of((tmp_path / "report.html").read_text())
    assert "One seed: nothing says how much of a difference is chance" in text or len(arms) == 1 or "none" not in arms
    assert "NE, warm" in text and "NE by epoch" in text
    assert ("gains most" in text) == (arms == ("none", "side"))
