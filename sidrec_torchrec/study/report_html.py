"""report.html: the table and the pictures of a comparison, one file that needs no network."""

import base64
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from sidrec_torchrec.data.tasks import DEFAULT_TASKS
from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.ranker.breakdown import TABLES
from sidrec_torchrec.ranker.evaluation import BREAKDOWN
from sidrec_torchrec.study.report import percent, spread, task_metrics

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68em; margin: 2em auto; padding: 0 1em; color: #1a1a1a }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .3em .8em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
caption { text-align: left; font-weight: bold; padding: .3em 0 } small { color: #777; margin-left: .6em }
figure { margin: 2em 0 } img { max-width: 100% } figcaption { color: #555 } code { background: #f4f4f4; padding: .1em .3em }
"""
_PARTS = {"warm": "#3b6fb6", "cold": "#d9822b"}


def write_html(report: dict[str, Any], folder: Path) -> None:
    """Writes ``report.html`` and its pictures (``plots/*.png``, also inside the page) into ``folder``."""
    figures = [
        _figure(
            folder,
            "ne_by_arm",
            "NE by arm, mean and standard deviation over seeds (lower is better).",
            report,
            _plot_ne_by_arm,
        ),
        _figure(
            folder,
            "gain_by_bytes",
            "NE gain over the arm <code>none</code> against the bytes an event costs in a log.",
            report,
            _plot_gain_by_bytes,
        ),
        _figure(
            folder,
            "reconstruction_by_prefix",
            "Relative squared error of each source decoded from the first digits of its SID, over the whole corpus.",
            report,
            _plot_reconstruction,
        ),
    ]
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>sidrec report</title><style>{_STYLE}</style>
<h1>What each way of feeding items is worth</h1>
<p>{html.escape(report["protocol"])}</p>
{_table(report)}
{"".join(figures)}
{_breakdowns(report)}
<h2>How it was made</h2>
<p><code>{html.escape(report["command"])}</code></p>
<p>{report["seconds"]:.0f} s on {html.escape(_flat(report["hardware"]))}, {report["processes"]} process(es).
{html.escape(_flat(report["versions"]))}.</p></html>"""
    with atomic_path(folder / "report.html") as path:
        path.write_text(page)


def _table(report: dict[str, Any]) -> str:
    columns: dict[str, Callable[[dict[str, Any], tuple[str, str]], str]] = {
        "NE warm": lambda arm, task: spread(arm[f"{task[0]}_warm{task[1]}"]),
        "NE cold": lambda arm, task: spread(arm[f"{task[0]}_cold{task[1]}"]),
        "gain warm": lambda arm, task: percent(arm[f"{task[0]}_gain_warm{task[1]}"]),
        "gain cold": lambda arm, task: percent(arm[f"{task[0]}_gain_cold{task[1]}"]),
        "AUC warm": lambda arm, task: spread(arm.get(f"auc_warm{task[1]}", [])),
        "AUC cold": lambda arm, task: spread(arm.get(f"auc_cold{task[1]}", [])),
        "bytes/event stored": lambda arm, _: f"{arm['bytes_per_event_stored']:,.1f}",
        "bytes/event KJT": lambda arm, _: f"{arm['bytes_per_event_kjt']:,.0f}",
        "table bytes": lambda arm, _: f"{arm['table_bytes']:,}",
        "train events/s": lambda arm, _: f"{arm['train_events_per_s']:,.0f}",
    }
    head = "".join(f"<th>{name}</th>" for name in ("arm", *columns))
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, arm in report["arms"].items()
        for task, metric in task_metrics(report).items()
        for cells in [(f"{name}{task}", *(show(arm, metric) for show in columns.values()))]
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _breakdowns(report: dict[str, Any]) -> str:
    """Test targets sorted into buckets: a table for each way and task; an empty string if no arm has any."""
    arms = {name: arm[BREAKDOWN] for name, arm in report["arms"].items()}
    tables = [
        _breakdown(table, task, {arm: tables[table][task] for arm, tables in arms.items() if table in tables})
        for table in TABLES
        for task in _predicted(report)
    ]
    if not any(tables):
        return ""
    return (
        "<h2>Where NE comes from</h2><p>NE of the test targets of a bucket, mean and standard deviation over seeds; beside it "
        "<small>calibration</small>, the mean prediction over the mean label. NE is relative to each bucket's own label rate, so "
        "compare arms within a row. A dash: all labels of the bucket are the same.</p>" + "".join(tables)
    )


def _predicted(report: dict[str, Any]) -> list[str]:
    sequences = report["sequences"]
    return [*sequences["tasks"], *(own["name"] for own in sequences.get("regressions", []))]


def _breakdown(table: str, task: str, rows_of: dict[str, list[dict[str, Any]]]) -> str:
    """One table: a row per bucket that has targets, a column per arm."""
    if not rows_of:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("", "targets", "positive", *rows_of))
    body = ""
    for bucket in zip(*rows_of.values(), strict=True):
        its = bucket[0]  # targets are the same for every arm
        if its["targets"]:
            positive = f"{its['positives'] / its['targets']:.1%}" if "positives" in its else "-"
            cells = [its["bucket"], f"{its['targets']:,}", positive]
            body += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            body += (
                "".join(
                    f"<td>{spread(row.get('ne', row.get('nmse')))}<small>{_mean(row['calibration'])}</small></td>"
                    for row in bucket
                )
                + "</tr>"
            )
    title = TABLES[table].title + ("" if task == DEFAULT_TASKS[0] else f"; {task}")
    title += " (NMSE)" * all("nmse" in rows[0] for rows in rows_of.values())
    return f"<table><caption>{html.escape(title)}</caption><tr>{head}</tr>{body}</table>"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else "-"


def _figure(
    folder: Path, name: str, caption: str, report: dict[str, Any], plot: Callable[[Axes, dict[str, Any]], bool]
) -> str:
    """Draws one picture; an empty string if there is nothing to draw."""
    # not by pyplot, whose backend is the caller's to choose: a notebook goes on showing its own plots
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    drawn = plot(axes, report)
    path = folder / "plots" / f"{name}.png"
    if drawn:
        axes.spines[["top", "right"]].set_visible(False)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")
    if not drawn:
        return ""
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{name}" src="data:image/png;base64,{image}"><figcaption>{caption}</figcaption></figure>'


def _plot_ne_by_arm(axes: Axes, report: dict[str, Any]) -> bool:
    arms = list(report["arms"])
    values = []
    for shift, (part, color) in zip((-0.18, 0.18), _PARTS.items(), strict=True):
        for place, arm in enumerate(arms):
            seeds = [v for v in report["arms"][arm].get(f"ne_{part}", []) if v is not None]
            if not seeds:
                continue
            mean = sum(seeds) / len(seeds)
            deviation = (sum((v - mean) ** 2 for v in seeds) / max(len(seeds) - 1, 1)) ** 0.5
            label = part if part not in axes.get_legend_handles_labels()[1] else None
            axes.bar(place + shift, mean, 0.34, yerr=deviation or None, capsize=3, color=color, label=label)
            axes.annotate(f"{mean:.3f}", (place + shift, mean + deviation), ha="center", va="bottom", fontsize=8)
            values += seeds
    if not values:
        return False
    margin = 0.15 * (max(values) - min(values)) + 0.01
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.set_xticks(range(len(arms)), arms)
    axes.set_ylabel("normalized entropy (axis does not start at 0)")
    axes.legend(frameon=False)
    return True


def _plot_gain_by_bytes(axes: Axes, report: dict[str, Any]) -> bool:
    drawn = False
    for part, color in _PARTS.items():
        points = [
            (arm["bytes_per_event_stored"], 100 * arm[f"ne_gain_{part}"], name)
            for name, arm in report["arms"].items()
            if arm.get(f"ne_gain_{part}") is not None and arm["bytes_per_event_stored"] > 0
        ]
        if points:
            drawn = True
            axes.scatter(*zip(*[(x, y) for x, y, _ in points], strict=True), color=color, label=part)
        for x, y, name in points:
            axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9)
    if drawn:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axhline(0, color="#999", linewidth=0.8)
        axes.set_xlabel("bytes per event stored")
        axes.set_ylabel("NE gain, %")
        axes.legend(frameon=False)
    return drawn


def _plot_reconstruction(axes: Axes, report: dict[str, Any]) -> bool:
    for name, tokenizer in report["tokenizer"].items():
        corpus = tokenizer["corpus"]
        bits = [corpus["bits"] * depth / corpus["depths"][-1] for depth in corpus["depths"]]
        for source, errors in corpus["reconstruction"].items():
            axes.plot(bits, errors, marker=".", linestyle="-" if name == "side" else "--", label=f"{name}: {source}")
    if not report["tokenizer"]:
        return False
    axes.set_xlabel("bits of the SID's prefix")
    axes.set_ylabel("relative squared error")
    axes.set_ylim(0, None)
    axes.legend(frameon=False, fontsize=8)
    return True


def _flat(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
