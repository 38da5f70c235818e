"""Runs side by side: paired by seed, refused where they are not comparable, and what differs is named."""

import json
import re

import numpy as np
import pytest

from sidrec_torchrec.cli import main
from sidrec_torchrec.errors import RunMismatchError, SidrecError
from sidrec_torchrec.study.comparison import compare
from tests.study.conftest import metrics, sequences


def test_pipelines_are_paired_by_seed(make_pipeline):
    one = make_pipeline("one", arms=("none", "side", "id"))
    other = make_pipeline("other", {"tune": False, "ranker": {"epochs": 9}}, arms=("none", "side"), seeds=2)
    report = json.loads((other / "report.json").read_text())
    shift = 0.01, 0.03
    report["arms"]["side"]["ne_cold"] = [ne + by for ne, by in zip(report["arms"]["side"]["ne_cold"], shift)]
    (other / "report.json").write_text(json.dumps(report))
    found = compare([one, other])
    assert list(found.report["arms"]) == ["none, one", "none, other", "side, one", "side, other", "id"]
    assert [summary["base"] for summary in found.report["arms"].values()] == [
        "none, one", "none, other", "none, one", "none, other", "none, one",
    ]  # fmt: skip
    by_name = {difference.name: difference for difference in found.differences}
    assert list(by_name) == ["none, other", "side, other"] and by_name["side, other"].beside == "side, one"
    assert by_name["side, other"].seeds == 2  # one run has a third
    cold = by_name["side, other"].values["cold"]
    assert cold.mean == pytest.approx(np.mean(shift))
    assert cold.half == pytest.approx(12.7062 * np.std(shift, ddof=1) / 2**0.5)
    assert by_name["side, other"].values["warm"].mean == pytest.approx(0, abs=1e-12)
    assert found.settings == {"tune": [True, False], "ranker.epochs": [5, 9]}


def test_rankers_that_differ_in_the_seed_alone_are_one_arm(make_ranker):
    folders = [make_ranker(arm, seed) for arm in ("side", "none") for seed in (3, 5)]
    folders.append(make_ranker("side", 3, made_of="another codec"))
    folders.append(make_ranker("id", 5))
    found = compare(folders)
    arms = found.report["arms"]
    assert [(summary["arm"], summary["seed"]) for summary in arms.values()] == [
        ("side", [3, 5]), ("side", [3]), ("none", [3, 5]), ("id", [5]),
    ]  # fmt: skip
    assert len(found.labels) == 4 and {summary["base"] for summary in arms.values()} == {"none"}
    (difference,) = found.differences  # two runs share an arm, so each arm stands beside its like
    assert difference.seeds == 1 and difference.values["warm"].half is None
    # none had been trained with seed 3 too, but id has 5 alone: gains are of shared seeds
    from sidrec_torchrec.study.results import Results

    gain = next(arm for arm in Results(found.report).arms if arm.kind == "id").gain("ne_warm")
    own, base = (metrics(arm, 5)["test"]["ne_warm"] for arm in ("id", "none"))
    assert gain.mean == pytest.approx(100 * (base - own) / base) and gain.half is None


def test_unlike_arms_stand_beside_the_first(make_ranker):
    found = compare([make_ranker(arm, 0) for arm in ("side", "id", "raw")])
    assert [(one.name, one.beside) for one in found.differences] == [("id", "side"), ("raw", "side")]
    own = metrics("id", 0)["test"]["ne_cold"] - metrics("side", 0)["test"]["ne_cold"]
    assert found.differences[0].values["cold"].mean == pytest.approx(own)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"items": "a1", "events": "zz", "users": "c3"}}, "the events files differ"),
        ({"max_history": 64}, "max_history 512 there, 64 here"),
        ({"counts": {"train": {"targets": 1}}}, "counts.train.targets 6000 there, 1 here"),
    ],
)
def test_other_data_are_refused_in_words(changes, words, make_ranker):
    one, other = make_ranker("side", 0), make_ranker("side", 1, **changes)
    with pytest.raises(RunMismatchError, match=rf"not comparable with side-0.*: .*{re.escape(words)}.*--across"):
        compare([one, other])
    found = compare([one, other], across=True)
    assert not found.differences and words in found.warnings[0]


def test_columns_may_be_called_otherwise(make_ranker):
    assert compare([make_ranker("side", 0), make_ranker("id", 0, schema={"items": "x.parquet"})]).differences


def test_a_pipeline_and_a_ranker(make_pipeline, make_ranker):
    found = compare([make_pipeline("run", arms=("none", "side")), make_ranker("id", 0)])
    assert list(found.report["arms"]) == ["none", "side", "id"]
    assert found.report["arms"]["id"]["base"] == "none"  # of the same data


def test_what_is_no_run_is_refused(tmp_path, make_ranker):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SidrecError, match="empty: neither a finished pipeline .*nor a finished ranker"):
        compare([tmp_path / "empty"])
    ranker = make_ranker("side", 0)
    with pytest.raises(SidrecError, match="name each run once"):
        compare([ranker, ranker])
    (ranker / "trained_on" / "prepared.json").unlink()
    with pytest.raises(SidrecError, match=r"prepared\.json: not found; .*train it again"):
        compare([ranker])


def test_reports_of_earlier_versions_are_read(make_pipeline):
    folder = make_pipeline("old", arms=("none", "side"))
    report = json.loads((folder / "report.json").read_text())
    for summary in report["arms"].values():
        for name in ("arm", "seed", "base", "targets", "validation", "reliability", "breakdown"):
            del summary[name]
    (folder / "report.json").write_text(json.dumps(report))
    assert compare([folder, make_pipeline("new", arms=("none", "side"))]).differences


def test_the_command(make_pipeline, tmp_path, capsys):
    runs = [str(make_pipeline(name, seeds=2)) for name in ("one", "other")]
    out = tmp_path / "compared.html"
    assert main(["report", *runs, "--out", str(out)]) == 0
    printed, page = capsys.readouterr().out, out.read_text()
    assert "Differences of NE, paired by seed" in printed and "side, other" in printed
    assert "2 runs side by side" in page and "side, other" in page and "below 0 is better" in page
    assert main(["report", *runs, "--out", str(tmp_path)]) == 2
    assert "a folder; name a file" in capsys.readouterr().err
    assert main(["report", "--out", str(out)]) == 2
    assert "needs RUN ..." in capsys.readouterr().err
    assert sequences()["tasks"] == ["label"]
