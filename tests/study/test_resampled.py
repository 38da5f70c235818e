"""What is said of several arms under the same resamplings of users, against the same by hand."""

import numpy as np
import pytest

from sidrec_torchrec.study.report import print_report, summarize_arm
from sidrec_torchrec.study.resampled import gain, interval_of, kept
from tests.study.test_report import COSTS

RESAMPLINGS = 200


def runs_of(ne: float, difference_SB: np.ndarray, common_B: np.ndarray) -> list[dict]:
    """A run for each seed: NE as it is, and under resamplings that all arms meet alike."""
    runs = []
    for own_B in difference_SB:
        metrics = {f"ne_{part}": ne for part in ("warm", "cold", "all")}
        resampled = {name: {"interval": None, "replicates": (ne + common_B + own_B).tolist()} for name in metrics}
        runs.append({"test": metrics | {"bootstrap": resampled}, **COSTS, "best_epoch": 0, "train_seconds": 1.0})
    return runs


@pytest.fixture
def arms() -> dict[str, list[dict]]:
    rng = np.random.default_rng(0)
    common_B = rng.normal(0, 0.02, RESAMPLINGS)  # what users drawn do to every arm
    return {
        name: runs_of(ne, rng.normal(0, 0.001, (2, RESAMPLINGS)), common_B)
        for name, ne in (("none", 0.9), ("raw", 0.8), ("side", 0.81))
    }


def replicates(runs: list[dict]) -> np.ndarray:
    return np.mean([run["test"]["bootstrap"]["ne_warm"]["replicates"] for run in runs], axis=0)


def test_a_summary_has_intervals_of_paired_differences(arms):
    summary = summarize_arm(arms["side"], arms["none"], arms["raw"])
    none_B, raw_B, side_B = (replicates(arms[name]) for name in ("none", "raw", "side"))
    ends = [0.025, 0.975]
    assert summary["ne_warm"] == [0.81, 0.81] and "bootstrap" not in summary
    assert summary["ne_warm_interval"] == pytest.approx(np.quantile(side_B, ends))
    assert summary["ne_gain_warm"] == pytest.approx(0.1)
    assert summary["ne_gain_warm_interval"] == pytest.approx(np.quantile((none_B - side_B) / none_B, ends))
    assert summary["ne_kept_warm"] == pytest.approx(0.9)
    assert summary["ne_kept_warm_interval"] == pytest.approx(np.quantile((none_B - side_B) / (none_B - raw_B), ends))
    alone, paired = (np.ptp(summary[f"{name}_interval"]) for name in ("ne_warm", "ne_gain_warm"))
    assert paired < alone / 5  # what users do to both arms cancels


def test_what_is_not_known_has_no_interval(arms):
    old = [{"test": {"ne_warm": 0.8}}]  # of a version without a bootstrap
    assert interval_of(gain, "ne_warm", arms["none"], old) is None
    assert interval_of(gain, "ne_warm", None, arms["side"]) is None
    arms["raw"][1]["test"]["bootstrap"]["ne_warm"]["replicates"][7] = None  # too few users
    assert interval_of(kept, "ne_warm", arms["none"], arms["raw"], arms["side"]) is None
    worse = summarize_arm(arms["side"], arms["raw"], arms["none"])  # where all content gains nothing, nothing is kept
    assert worse["ne_kept_warm"] is None and worse["ne_kept_warm_interval"] is None


def test_the_table_has_intervals_below_shares(arms, capsys):
    shown = {name: summarize_arm(runs, arms["none"], arms["raw"]) for name, runs in arms.items()}
    print_report({"arms": shown, "seeds": 2, "protocol": "", "sequences": {"tasks": ["label"]}})
    printed = capsys.readouterr().out
    low, high = (100 * end for end in shown["side"]["ne_gain_warm_interval"])
    assert "10.0%" in printed and f"{low:.1f} to {high:.1f}" in printed and "90%" in printed
    print_report(
        {
            "arms": {"side": summarize_arm(arms["side"], None)},
            "seeds": 2,
            "protocol": "",
            "sequences": {"tasks": ["label"]},
        }
    )
    assert "kept warm" not in capsys.readouterr().out
