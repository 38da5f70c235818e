"""From runs to gains with confidence intervals, a table and plots."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from study import BASE, TRADITIONAL, arm_of

from sidrec_torchrec.ranker.bootstrap import interval
from sidrec_torchrec.study.canvas import save_png
from sidrec_torchrec.study.figures import Curve, Dot, draw_by_bytes, draw_curves, draw_dots
from sidrec_torchrec.study.intervals import Interval, gains
from sidrec_torchrec.study.looks import look_of
from sidrec_torchrec.study.resampled import gain, kept

PARTS = ("warm", "cold")
WHOLE = "raw"
_GAIN = "NE gain over none, %"


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """By variant, for warm and cold items: NE and the gain over ``none``, with 95% intervals over seeds (Student's).

    And made of means over seeds, as value and ends of a 95% interval over users, paired (``study.resampled``), the gain
    (``gain_of_users``) and the share of raw's that is kept; and the gain as a multiple of the best traditional SID's.
    """
    summary: dict[str, Any] = {}
    for name, result in results.items():
        row = {
            key: result[key]
            for key in ("family", "setting", "told", "bytes_per_event_stored", "bytes_per_event_kjt", "table_bytes")
            if key in result  # how much of what users do content tells is known of tokenizers that are told
        }
        for part in PARTS:
            row[f"ne_{part}"] = Interval.of(result[f"ne_{part}"])
            if BASE in results:
                row[f"gain_{part}"] = Interval.of(gains(results[BASE][f"ne_{part}"], result[f"ne_{part}"]))
            row[f"gain_of_users_{part}"] = _share(gain, part, results, BASE, name)
            row[f"kept_{part}"] = _share(kept, part, results, BASE, WHOLE, name)
        summary[name] = row
    for part in PARTS:
        found = {
            name: row[f"gain_{part}"].mean
            for name, row in summary.items()
            if row["family"] == TRADITIONAL and f"gain_{part}" in row
        }
        best = max(found.values(), default=0.0)
        for row in summary.values():
            if best > 0:
                row[f"multiple_{part}"] = row[f"gain_{part}"].mean / best
    return summary


def as_json(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary as JSON has it: an interval over seeds is a mean and half of its width."""
    return {
        name: {key: [value.mean, value.half] if isinstance(value, Interval) else value for key, value in row.items()}
        for name, row in summary.items()
    }


def _share(make: Callable[..., Any], part: str, results: dict[str, Any], *names: str) -> list[float | None]:
    """What ``make`` makes of the means of some variants, and the ends of its interval over users; of an undefined one None."""
    if not results.keys() >= set(names):
        return [None, None, None]
    value = make(*(np.mean(results[name][f"ne_{part}"]) for name in names))
    ends = interval(make(*(np.array(results[name][f"replicates_{part}"], np.float64) for name in names)))
    return [float(value), *(ends or [None, None])] if np.isfinite(value) else [None, None, None]


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
        cells.append(row[f"ne_{part}"].text(".4f"))
        cells += [_percent(row[f"{share}_{part}"]) for share in ("gain_of_users", "kept")]
        cells.append(f"{row[f'multiple_{part}']:.2f}" if f"multiple_{part}" in row else "-")
    size = (f"{row['bytes_per_event_stored']:.1f}", f"{row['bytes_per_event_kjt']:.0f}", f"{row['table_bytes']:,}")
    return [*cells, *size]


def _percent(share: list[float | None]) -> str:
    """A share in percent, and its interval if that is not trivial."""
    value, low, high = (None if end is None else 100 * end for end in share)
    if value is None:
        return "-"
    return f"{value:.1f}" + ("" if low is None or low == high else f" [{low:.1f}, {high:.1f}]")


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
