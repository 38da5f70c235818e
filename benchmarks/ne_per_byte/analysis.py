"""From runs to gains with confidence intervals, a table and a plot."""

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student
from study import BASE, TRADITIONAL

PARTS = ("warm", "cold")


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """By variant: mean NE and gain over ``none`` with 95% intervals, and the gain as a multiple of the best traditional's.

    Gains are paired: seed by seed, (NE_none - NE_variant) / NE_none, and the interval is Student's over seeds.
    """
    summary: dict[str, Any] = {}
    for name, result in results.items():
        row = {
            key: result[key]
            for key in ("family", "setting", "bytes_per_event_stored", "bytes_per_event_kjt", "table_bytes")
        }
        for part in PARTS:
            own = np.array(result[f"ne_{part}"])
            row[f"ne_{part}"] = _interval(own)
            if BASE in results:
                base = np.array(results[BASE][f"ne_{part}"][: len(own)])
                row[f"gain_{part}"] = _interval((base - own) / base)
        summary[name] = row
    for part in PARTS:
        gains = [
            row[f"gain_{part}"][0] for row in summary.values() if row["family"] == TRADITIONAL and f"gain_{part}" in row
        ]
        for row in summary.values():
            if gains and max(gains) > 0 and f"gain_{part}" in row:
                row[f"multiple_{part}"] = row[f"gain_{part}"][0] / max(gains)
    return summary


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval; not a number for one value."""
    n = len(values)
    half = float(student.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5) if n > 1 else float("nan")
    return float(values.mean()), half


def print_table(summary: dict[str, Any]) -> None:
    """The table of variants."""
    table = Table(
        title="NE and gain over none, mean and 95% interval over seeds; x: multiple of the best traditional SID's gain"
    )
    table.add_column("variant")
    for name in ("NE warm", "NE cold", "gain warm", "x", "gain cold", "x", "B/event stored", "KJT", "table bytes"):
        table.add_column(name, justify="right")
    for name, row in summary.items():
        cells = [f"{row[f'ne_{part}'][0]:.4f} ±{row[f'ne_{part}'][1]:.4f}" for part in PARTS]
        for part in PARTS:
            gain = row.get(f"gain_{part}")
            cells.append("-" if gain is None else f"{100 * gain[0]:+.2f}% ±{100 * gain[1]:.2f}")
            cells.append(f"{row[f'multiple_{part}']:.2f}" if f"multiple_{part}" in row else "-")
        table.add_row(
            name,
            *cells,
            f"{row['bytes_per_event_stored']:.1f}",
            f"{row['bytes_per_event_kjt']:.0f}",
            f"{row['table_bytes']:,}",
        )
    Console(width=200).print(table)


def plot(summary: dict[str, Any], path: Path) -> None:
    """Gain against bytes per event, one panel for warm items and one for cold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    families = list(dict.fromkeys(row["family"] for row in summary.values()))
    for axes, part in zip(figure.subplots(1, 2), PARTS, strict=True):
        for i, family in enumerate(families):
            rows = {
                n: r for n, r in summary.items() if r["family"] == family and f"gain_{part}" in r and family != BASE
            }
            if rows:
                x = [row["bytes_per_event_kjt"] for row in rows.values()]
                y, error = zip(
                    *[(100 * r[f"gain_{part}"][0], 100 * r[f"gain_{part}"][1]) for r in rows.values()], strict=True
                )
                axes.errorbar(x, y, yerr=np.nan_to_num(error), fmt="o", color=f"C{i}", label=family, capsize=3)
        axes.axhline(0, color="#999", linewidth=0.8)
        axes.set(
            xscale="log", title=f"{part} items", xlabel="bytes per event in the batch", ylabel="NE gain over none, %"
        )
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
