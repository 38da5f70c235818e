"""What a comparison of arms came to: report.json and the table on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from sidrec_torchrec.ranker.evaluation import BREAKDOWN, RELIABILITY
from sidrec_torchrec.study.intervals import Interval
from sidrec_torchrec.study.resampled import Runs, gain, interval_of, kept

_OVER_SEEDS = {"ne", "nmse", "calibration"}
_TARGETS = "targets_"
REPORT_FILE = "report.json"  # in a pipeline's folder


def summarize_arm(
    runs: list[dict[str, Any]], base: list[dict[str, Any]] | None, bound: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """One arm over its seeds.

    Args:
        runs: ``metrics.json`` of each seed.
        base: the same of the arm that gains are relative to; None if it was not run, then there are no gains.
        bound: the same of the arm that has all of the content; None if it was not run, then nothing is said to be kept of its gain.

    Returns:
        Values per seed (of several tasks, those of each and their means), NE gains of the means,
        (NE_base - NE_arm) / NE_base, and the share ``ne_kept_`` that this is of the bound's, each with its 95% interval over users as
        ``_interval`` (None where it is not defined); what the arm costs, numbers of test ``targets`` by slice, validation metrics by seed and
        epoch, and, as ``breakdown``, NE and calibration per seed by bucket of each table and task, as ``reliability`` the counts
        of a calibration curve per task and seed; nothing where a run of an earlier version has none.
    """
    test = runs[0]["test"]
    numbers = [name for name, value in test.items() if value is None or isinstance(value, int | float)]
    metrics = [name for name in numbers if not name.startswith(_TARGETS)]
    summary: dict[str, Any] = {"arm": runs[0].get("arm"), "seed": [run.get("seed", i) for i, run in enumerate(runs)]}
    summary |= {name: [run["test"][name] for run in runs] for name in metrics}
    for name in metrics:
        if name.startswith(("ne_", "nmse_")):
            summary |= _shares(name, runs, base, bound)
    for name in ("bytes_per_event_stored", "bytes_per_event_kjt", "table_bytes"):
        summary[name] = runs[0][name]
    summary["train_events_per_s"] = _mean([run["train_events_per_s"] for run in runs])
    summary["best_epoch"] = [run["best_epoch"] + 1 for run in runs]
    summary["train_seconds"] = [run["train_seconds"] for run in runs]
    summary["targets"] = {name.removeprefix(_TARGETS): test[name] for name in numbers if name.startswith(_TARGETS)}
    summary["validation"] = [run.get("validation", []) for run in runs]
    summary[BREAKDOWN] = _over_seeds([run["test"].get(BREAKDOWN, {}) for run in runs])
    curves = [run["test"].get(RELIABILITY, {}) for run in runs]
    summary[RELIABILITY] = {task: [curve[task] for curve in curves] for task in curves[0] if all(curves)}
    return summary


def _shares(name: str, runs: Runs, base: Runs | None, bound: Runs | None) -> dict[str, Any]:
    """What of NE or NMSE is gained and kept, with intervals over users."""
    own, its, all_its = (_mean([run["test"][name] for run in of or []]) for of in (runs, base, bound))
    can_keep = own is not None and its is not None and all_its is not None and all_its < its
    gained, keeps = (name.replace("_", f"_{what}_", 1) for what in ("gain", "kept"))
    return {
        f"{name}_interval": interval_of(lambda own_B: own_B, name, runs),
        gained: None if own is None or its is None else gain(its, own),
        f"{gained}_interval": interval_of(gain, name, base, runs),
        keeps: kept(its, all_its, own) if can_keep else None,
        f"{keeps}_interval": interval_of(kept, name, base, bound, runs) if can_keep else None,
    }


def _over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The breakdowns of several seeds, of the same targets, as one whose rows hold a list of NE, and one of calibrations."""
    shared = [table for table in runs[0] if all(table in run for run in runs)]
    return {
        table: {
            task: [
                row | {kind: [run[table][task][place][kind] for run in runs] for kind in row.keys() & _OVER_SEEDS}
                for place, row in enumerate(rows)
            ]
            for task, rows in runs[0][table].items()
        }
        for table in shared
    }


def print_report(report: dict[str, Any]) -> None:
    """The table of arms, as a user reads it."""
    seeds = report["seeds"]
    protocol = report["protocol"]
    over = f"mean of {seeds} seeds with its 95% interval" if seeds > 1 else "one seed"
    title = f"NE by arm, {over}: lower is better; cold = items unseen in training"
    table = Table(title=title, title_justify="left")
    has_kept = any(
        arm.get(f"{kind}_kept_all") is not None for arm in report["arms"].values() for kind in ("ne", "nmse")
    )
    shares = ("gain", "kept") if has_kept else ("gain",)
    columns = ["NE warm", "NE cold", *(f"{share} {part}" for share in shares for part in ("warm", "cold"))]
    table.add_column("arm", no_wrap=True)
    for column in (*columns, "B/event stored", "B/event KJT", "table bytes", "train events/s"):
        table.add_column(column, justify="right", no_wrap=column.startswith(shares))
    for name, arm in report["arms"].items():
        costs = (
            f"{arm['bytes_per_event_stored']:,.1f}",
            f"{arm['bytes_per_event_kjt']:,.0f}",
            f"{arm['table_bytes']:,}",
            f"{arm['train_events_per_s']:,.0f}",
        )
        for task, (kind, suffix) in task_metrics(report).items():
            names = [f"{kind}_{share}_{part}{suffix}" for share in shares for part in ("warm", "cold")]
            table.add_row(
                f"{name}{task}",
                *(spread(arm.get(f"{kind}_{part}{suffix}", [])) for part in ("warm", "cold")),
                *(with_interval(arm, name) for name in names),
                *costs,
            )
    console = Console(width=max(Console().width, 150))
    console.print(table)
    console.print(
        "gain: over the arm without content; kept: the share of raw's; below them 95% intervals over users, paired",
        highlight=False,
    )
    console.print(protocol, highlight=False)


def task_metrics(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What a row's name ends in; what its metric is, ``ne`` or ``nmse``, and how the names of metrics end.

    The arm's own row comes first (over several tasks, the means), then each task's.
    """
    tasks = dict.fromkeys(report["sequences"]["tasks"], "ne")
    values = [own["name"] for own in report["sequences"].get("regressions", [])]
    rows = {"": ("ne", "")} if tasks else {" (NMSE)": ("nmse", "")}
    if len(tasks) + len(values) == 1:
        return rows
    return rows | {f": {t}": ("ne", f"_{t}") for t in tasks} | {f": {t} (NMSE)": ("nmse", f"_{t}") for t in values}


def spread(values: list[float | None]) -> str:
    """Mean and, over several seeds, half of its 95% interval; a dash where a value is not defined."""
    interval = Interval.of(values)
    return "-" if interval is None else interval.text(".4f")


def _mean(values: list[float | None]) -> float | None:
    interval = Interval.of(values)
    return None if interval is None else interval.mean


def percent(value: float | None) -> str:
    """A share in signed percent; a dash where it is not defined."""
    return "-" if value is None else f"{100 * value:+.2f}%"


def with_interval(arm: dict[str, Any], name: str) -> str:
    """A share in percent and, below it, its interval over users, if it has one that is not trivial."""
    value, ends = arm.get(name), arm.get(f"{name}_interval")
    digits = 0 if "_kept_" in name else 1
    if value is None:
        return "-"
    text = f"{100 * value:.{digits}f}%"
    return (
        text
        if ends is None or ends[0] == ends[1]
        else text + "\n{:.{d}f} to {:.{d}f}".format(*(100 * end for end in ends), d=digits)
    )
