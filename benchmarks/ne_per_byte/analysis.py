"""From runs to gains with confidence intervals, a table and plots."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from study import BASE, TRADITIONAL

PARTS = ("warm", "cold")


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """By variant, with 95% intervals (Student's, over seeds): NE; the gain over ``none``; how far below the best traditional.

    Differences are paired: seed by seed, (NE_none - NE) / NE_none, and NE_traditional - NE. Also the gain as a multiple of
    the best traditional's.
    """
    summary: dict[str, Any] = {}
    for name, result in results.items():
        row = {
            key: result[key]
            for key in ("family", "setting", "bytes_per_event_stored", "bytes_per_event_kjt", "table_bytes")
        }
        for part in PARTS:
            row[f"ne_{part}"] = _interval(np.array(result[f"ne_{part}"]))
            if BASE in results:
                base, own = _paired(results[BASE], result, part)
                row[f"gain_{part}"] = _interval((base - own) / base)
        summary[name] = row
    for part in PARTS:
        gains = {
            name: row[f"gain_{part}"][0]
            for name, row in summary.items()
            if row["family"] == TRADITIONAL and f"gain_{part}" in row
        }
        if not gains:
            continue
        best = max(gains, key=gains.get)
        for name, row in summary.items():
            traditional, own = _paired(results[best], results[name], part)
            row[f"below_{part}"] = _interval(traditional - own)
            if gains[best] > 0:
                row[f"multiple_{part}"] = row[f"gain_{part}"][0] / gains[best]
    return summary


def _paired(one: dict[str, Any], other: dict[str, Any], part: str) -> tuple[np.ndarray, np.ndarray]:
    """NE of two variants by seed, for the seeds that both have."""
    values = one[f"ne_{part}"], other[f"ne_{part}"]
    seeds = min(map(len, values))
    return np.array(values[0][:seeds]), np.array(values[1][:seeds])


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval; not a number for one value."""
    n = len(values)
    half = float(student.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    return float(values.mean()), half


_OF_PART = ("NE", "gain", "x", "below traditional")
_COLUMNS = (*(f"{part} {name}" for part in PARTS for name in _OF_PART), "B/event stored", "KJT", "table bytes")


def print_table(summary: dict[str, Any]) -> None:
    """The table of variants."""
    table = Table(
        title="mean and 95% interval over seeds: NE, gain over none, NE below the best traditional SID's; x: multiple of its gain"
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
        gain, below = row.get(f"gain_{part}"), row.get(f"below_{part}")
        cells.append(f"{row[f'ne_{part}'][0]:.4f} ±{row[f'ne_{part}'][1]:.4f}")
        cells.append("-" if gain is None else f"{100 * gain[0]:+.2f}% ±{100 * gain[1]:.2f}")
        cells.append(f"{row[f'multiple_{part}']:.2f}" if f"multiple_{part}" in row else "-")
        cells.append("-" if below is None else f"{below[0]:+.4f} ±{below[1]:.4f}")
    size = (f"{row['bytes_per_event_stored']:.1f}", f"{row['bytes_per_event_kjt']:.0f}", f"{row['table_bytes']:,}")
    return [*cells, *size]


def plot_gains(summary: dict[str, Any], path: Path) -> None:
    """A bar per variant, warm and cold side by side, the bytes of an event beside its name."""
    rows = {n: r for n, r in summary.items() if "gain_warm" in r and r["family"] != BASE}
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
            mean, half = 100 * np.array(gains).T
            axes.barh(y, mean, xerr=np.nan_to_num(half), color=f"C{families.index(family)}", label=family, capsize=2)
        axes.axvline(0, color="#999", linewidth=0.8)
        axes.set(title=f"{part} items", xlabel="NE gain over none, %")
    panels[0].set_yticks(places, [f"{n}  ({r['bytes_per_event_kjt']:.0f} B)" for n, r in rows.items()], fontsize=8)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(families), frameon=False
    )
    figure.savefig(path, dpi=120)


def plot_per_byte(summary: dict[str, Any], path: Path) -> None:
    """Gain against the bytes that a log holds of an event; a point per variant that travels at all."""
    rows = {n: r for n, r in summary.items() if "gain_warm" in r and r["bytes_per_event_stored"] > 0}
    families = list(dict.fromkeys(row["family"] for row in rows.values()))
    figure = Figure(figsize=(12, 5), layout="constrained")
    for axes, part in zip(figure.subplots(1, 2), PARTS, strict=True):
        for family in families:
            own = [row for row in rows.values() if row["family"] == family]
            size = [row["bytes_per_event_stored"] for row in own]
            mean, half = 100 * np.array([row[f"gain_{part}"] for row in own]).T
            axes.errorbar(
                size,
                mean,
                yerr=np.nan_to_num(half),
                fmt="o",
                color=f"C{families.index(family)}",
                label=family,
                capsize=2,
            )
        axes.axhline(0, color="#999", linewidth=0.8)
        axes.set(title=f"{part} items", xlabel="bytes of an event in a compressed log", xscale="log")
        axes.set_ylabel("NE gain over none, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(families), frameon=False)
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
