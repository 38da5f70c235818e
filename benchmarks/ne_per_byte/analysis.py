"""From runs to gains with confidence intervals, a table and plots."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from study import BASE, TRADITIONAL, arm_of

from sidrec_torchrec.study.canvas import save_png
from sidrec_torchrec.study.figures import Curve, Dot, draw_by_bytes, draw_curves, draw_dots
from sidrec_torchrec.study.intervals import Interval, differences, gains
from sidrec_torchrec.study.looks import look_of

PARTS = ("warm", "cold")
_GAIN = "NE gain over none, %"


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
            row[f"ne_{part}"] = Interval.of(result[f"ne_{part}"])
            if BASE in results:
                row[f"gain_{part}"] = Interval.of(gains(results[BASE][f"ne_{part}"], result[f"ne_{part}"]))
        summary[name] = row
    for part in PARTS:
        found = {
            name: row[f"gain_{part}"].mean
            for name, row in summary.items()
            if row["family"] == TRADITIONAL and f"gain_{part}" in row
        }
        if not found:
            continue
        best = max(found, key=found.get)
        for name, row in summary.items():
            row[f"below_{part}"] = Interval.of(differences(results[name][f"ne_{part}"], results[best][f"ne_{part}"]))
            if found[best] > 0:
                row[f"multiple_{part}"] = row[f"gain_{part}"].mean / found[best]
    return summary


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
        cells.append(row[f"ne_{part}"].text(".4f"))
        cells.append("-" if gain is None else (gain * 100).text("+.2f").replace(" ", "% ", 1))
        cells.append(f"{row[f'multiple_{part}']:.2f}" if f"multiple_{part}" in row else "-")
        cells.append("-" if below is None else below.text("+.4f"))
    size = (f"{row['bytes_per_event_stored']:.1f}", f"{row['bytes_per_event_kjt']:.0f}", f"{row['table_bytes']:,}")
    return [*cells, *size]


def plot_gains(summary: dict[str, Any], path: Path) -> None:
    """A row per variant, warm and cold items side by side, the bytes of an event in the batch beside its name."""
    rows = {n: r for n, r in summary.items() if r.get("gain_warm") and r["family"] != BASE}
    draws = []
    for part in PARTS:
        dots = [
            Dot(
                f"{name}  ({row['bytes_per_event_kjt']:,.0f} B)" if part == PARTS[0] else "",
                look_of(arm_of(name)),
                row[f"gain_{part}"] * 100,
            )
            for name, row in rows.items()
        ]
        draws.append(partial(draw_dots, dots=dots, format_spec="+.1f"))
    labels = [{"title": f"{part} items", "xlabel": _GAIN} for part in PARTS]
    save_png(path, draws, labels, width=12.5, height=1.3 + 0.27 * len(rows))


def plot_per_byte(summary: dict[str, Any], path: Path) -> None:
    """Gain against the bytes that a log holds of an event.

    Of variants of one arm that store as many bytes, the one of most gain on warm items: the table has the others.
    """
    best: dict[tuple[str, float], tuple[str, dict[str, Any]]] = {}
    for name, row in summary.items():
        if row.get("gain_warm") and row["bytes_per_event_stored"] > 0:
            place = arm_of(name), round(row["bytes_per_event_stored"], 1)
            if place not in best or row["gain_warm"].mean > best[place][1]["gain_warm"].mean:
                best[place] = name, row
    draws = []
    for part in PARTS:
        dots = [
            Dot(_digits(name), look_of(arm_of(name)), row[f"gain_{part}"] * 100, row["bytes_per_event_stored"])
            for name, row in best.values()
        ]
        draws.append(partial(draw_by_bytes, dots=dots))
    labels = [
        {"title": f"{part} items", "xlabel": "bytes of an event's item in a compressed log", "ylabel": _GAIN}
        for part in PARTS
    ]
    key = {arm: look_of(arm) for arm, _ in best}
    save_png(path, draws, labels, key=key, width=12.5, height=5.6)


def _digits(name: str) -> str:
    """What tells a variant from others of its arm, which its colour says: its digits; its name where there are none."""
    found = re.search(r"\d+ trits( per source)?|RQ \d+x\d+( per source| fused)?", name)
    return found[0] if found else name


def plot_curves(results: dict[str, Any], path: Path) -> None:
    """NE of the validation users by epoch, the mean over seeds; of each arm the variant that comes lowest."""
    lowest: dict[str, tuple[str, list[float]]] = {}
    for name, result in results.items():
        curve = [sum(values) / len(values) for values in zip(*result["validation"], strict=True)]
        arm = arm_of(name)
        if arm not in lowest or min(curve) < min(lowest[arm][1]):
            lowest[arm] = name, curve
    curves = [Curve(look_of(arm), range(1, len(y) + 1), y) for arm, (_, y) in lowest.items()]
    key = {name: look_of(arm) for arm, (name, _) in lowest.items()}
    labels = {"xlabel": "epoch", "ylabel": "NE of validation users; lower is better"}
    save_png(path, [partial(draw_curves, curves=curves)], [labels], key=key, width=8.5, height=4.6)
