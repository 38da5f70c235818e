"""From runs to gains with confidence intervals, a table and plots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from study import BASE, TRADITIONAL

from sidrec_torchrec.ranker.bootstrap import interval
from sidrec_torchrec.study.intervals import gain, kept

PARTS = ("warm", "cold")
WHOLE = "raw"
_COSTS = ("family", "setting", "bytes_per_event_stored", "bytes_per_event_kjt", "table_bytes")


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """By variant, for warm and cold items: NE, the gain over ``none``, and the share of raw's gain that is kept.

    NE is a mean over seeds and half of its 95% interval (Student's, over seeds). Gain and kept are made of means over seeds; their
    intervals are over users, paired (``study.intervals``). Also the gain as a multiple of the best traditional SID's.
    """
    summary = {name: {key: result[key] for key in _COSTS} for name, result in results.items()}
    for part in PARTS:
        for name, row in summary.items():
            row[f"ne_{part}"] = _interval(np.array(results[name][f"ne_{part}"]))
            row[f"gain_{part}"] = _share(gain, part, results, BASE, name)
            row[f"kept_{part}"] = _share(kept, part, results, BASE, WHOLE, name)
        gains = {name: row[f"gain_{part}"][0] for name, row in summary.items() if row["family"] == TRADITIONAL}
        best = max(gains.values(), default=0.0)
        for row in summary.values():
            row[f"multiple_{part}"] = row[f"gain_{part}"][0] / best if best > 0 else None
    return summary


def _share(make: Callable[..., Any], part: str, results: dict[str, Any], *names: str) -> list[float | None]:
    """What ``make`` makes of the means of some variants, and the ends of its interval over users; of an undefined one None."""
    if not results.keys() >= set(names):
        return [None, None, None]
    value = make(*(np.mean(results[name][f"ne_{part}"]) for name in names))
    ends = interval(make(*(np.array(results[name][f"replicates_{part}"], np.float64) for name in names)))
    return [float(value), *(ends or [None, None])] if np.isfinite(value) else [None, None, None]


def _interval(values: np.ndarray) -> tuple[float, float | None]:
    """Mean, and half the width of its 95% interval; None of one value."""
    n = len(values)
    half = float(student.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else None
    return float(values.mean()), half


_OF_PART = ("NE", "gain, %", "kept, %", "x")
_COLUMNS = (*(f"{part} {name}" for part in PARTS for name in _OF_PART), "B/event stored", "KJT", "table bytes")


def print_table(summary: dict[str, Any]) -> None:
    """The table of variants."""
    table = Table(
        title="NE: mean and 95% interval over seeds; gain over none, kept of raw's: 95% intervals over users; x: of the best traditional gain"
    )
    table.add_column("variant")
    for name in _COLUMNS:
        table.add_column(name, justify="right")
    for name, row in summary.items():
        table.add_row(name, *_cells(row))
    Console(width=200).print(table)


def markdown(summary: dict[str, Any]) -> str:
    """The same table, for a page."""
    lines = [("variant", *_COLUMNS), ("---", *["---:"] * len(_COLUMNS))]
    lines += [(name, *_cells(row)) for name, row in summary.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = []
    for part in PARTS:
        mean, half = row[f"ne_{part}"]
        cells.append(f"{mean:.4f}" + ("" if half is None else f" ±{half:.4f}"))
        cells += [_percent(row[f"{share}_{part}"]) for share in ("gain", "kept")]
        multiple = row[f"multiple_{part}"]
        cells.append("-" if multiple is None else f"{multiple:.2f}")
    size = (f"{row['bytes_per_event_stored']:.1f}", f"{row['bytes_per_event_kjt']:.0f}", f"{row['table_bytes']:,}")
    return [*cells, *size]


def _percent(share: list[float | None]) -> str:
    """A share in percent, and its interval."""
    value, low, high = (None if end is None else 100 * end for end in share)
    if value is None:
        return "-"
    return f"{value:.1f}" + ("" if low is None or low == high else f" [{low:.1f}, {high:.1f}]")


def plot_gains(summary: dict[str, Any], path: Path) -> None:
    """A bar per variant, warm and cold side by side, the bytes of an event beside its name."""
    rows = {n: r for n, r in summary.items() if r["gain_warm"][0] is not None and r["family"] != BASE}
    families = list(dict.fromkeys(row["family"] for row in rows.values()))
    figure = Figure(figsize=(12, 1.5 + 0.33 * len(rows)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(rows))[::-1]
    for axes, part in zip(panels, PARTS, strict=True):
        for family in families:
            own = [
                (y, row[f"gain_{part}"])
                for y, row in zip(places, rows.values(), strict=True)
                if row["family"] == family
            ]
            y, gains = zip(*own, strict=True)
            mean, low, high = 100 * np.array(gains, np.float64).T
            error = np.nan_to_num([mean - low, high - mean])
            axes.barh(y, mean, xerr=error, color=f"C{families.index(family)}", label=family, capsize=2)
        axes.axvline(0, color="#999", linewidth=0.8)
        axes.set(title=f"{part} items", xlabel="NE gain over none, %")
    panels[0].set_yticks(places, [f"{n}  ({r['bytes_per_event_kjt']:.0f} B)" for n, r in rows.items()], fontsize=8)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(families), frameon=False
    )
    figure.savefig(path, dpi=120)


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """Validation NE by epoch, the mean over seeds; a line per variant."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    families = list(dict.fromkeys(result["family"] for result in results.values()))
    styles = ["-", "--", ":", "-."]
    for i, (name, result) in enumerate(results.items()):
        curve = np.mean(result["validation"], axis=0)
        color = f"C{families.index(result['family'])}"
        axes.plot(range(1, len(curve) + 1), curve, color=color, linestyle=styles[i % 4], marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="validation NE, warm items")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
