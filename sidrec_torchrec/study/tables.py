"""The tables of a report's page."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from sidrec_torchrec.ranker.breakdown import TABLES
from sidrec_torchrec.study.comparison import Difference
from sidrec_torchrec.study.intervals import Interval
from sidrec_torchrec.study.pictures import bucket_title
from sidrec_torchrec.study.report import spread
from sidrec_torchrec.study.results import PARTS, Results


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Args:
        heads: name and unit of each column.
        rows: cells in words.
        title: above it.
    """

    heads: list[tuple[str, str]]
    rows: list[list[str]] = field(default_factory=list)
    title: str = ""


def result_table(results: Results) -> Table:
    """Each arm, and below it each of its tasks: how good it is."""
    metric = results.kind.upper()
    of_bound = [("kept of", f"{results.bounds[0].kind}'s gain")] if results.bounds else []
    heads = [("arm", "")]
    for part in PARTS:
        heads += [(f"{metric}, {part}", ""), ("gain", "%"), *of_bound]
    table = Table(heads)
    for arm in results.arms:
        for of_task, (kind, end) in results.metrics.items():
            row = [f"{arm.name}{of_task}"]
            for name in (f"{kind}_{part}{end}" for part in PARTS):
                row += [spread(arm.summary.get(name, [])), _text(arm.gain(name), "+.2f")]
                row += [_share(results.kept(arm, name))] * len(of_bound)
            table.rows.append(row)
    return table


def cost_table(results: Results) -> Table:
    """What each arm costs."""
    heads = [("arm", ""), ("item of an event", "bytes, in a log"), ("item of an event", "bytes, in the batch")]
    table = Table([*heads, ("tables", "bytes, in the model"), ("training", "events/s")])
    for arm in results.arms:
        its = arm.summary
        costs = f"{its['bytes_per_event_stored']:,.1f}", f"{its['bytes_per_event_kjt']:,.0f}", f"{its['table_bytes']:,}"
        table.rows.append([arm.name, *costs, f"{its['train_events_per_s']:,.0f}"])
    return table


def bucket_tables(results: Results) -> Iterator[Table]:
    """Test targets sorted into buckets: a table for each way and task, a column per arm."""
    for name in TABLES:
        for task in results.tasks:
            rows_of = results.rows(name, task)
            if not rows_of:
                continue
            is_number = all("nmse" in rows[0] for rows in rows_of.values())
            title = bucket_title(name, task) + (" (NMSE)" if is_number else "")
            heads = [("bucket", ""), ("targets", ""), ("positive", "%"), *((arm, "") for arm in rows_of)]
            table = Table(heads, title=title)
            for bucket in zip(*rows_of.values(), strict=True):
                its = bucket[0]  # targets are the same for every arm
                if its["targets"]:
                    positive = f"{100 * its['positives'] / its['targets']:.1f}" if "positives" in its else "-"
                    cells = [spread(row.get("ne", row.get("nmse"))) for row in bucket]
                    cells = [
                        Markup("{}<br><small>{}</small>").format(cell, _mean(row["calibration"]))
                        for cell, row in zip(cells, bucket, strict=True)
                    ]
                    table.rows.append([its["bucket"], f"{its['targets']:,}", positive, *cells])
            yield table


def calibration_table(results: Results) -> Table | None:
    """Mean prediction over mean label, and AUC, by task; None if there are no tasks."""
    kinds = {"calibration": ".3f", "auc": ".4f"}
    heads = [(f"{kind.upper() if kind == 'auc' else kind}, {part}", "") for kind in kinds for part in PARTS]
    table = Table([("arm", ""), *heads])
    for arm in results.arms:
        for of_task, (kind, end) in results.metrics.items():
            values = [(arm.metric(f"{name}_{part}{end}"), how) for name, how in kinds.items() for part in PARTS]
            if kind == "ne" and any(value for value, _ in values):
                table.rows.append([f"{arm.name}{of_task}", *(_text(value, how) for value, how in values)])
    return table if table.rows else None


def difference_table(differences: Sequence[Difference], metric: str) -> Table:
    """Each arm beside another run's."""
    table = Table(
        [("arm", ""), ("beside", ""), ("seeds", "of both"), *((f"{metric}, {part}", "difference") for part in PARTS)]
    )
    for one in differences:
        values = [_text(one.values.get(part), "+.4f") for part in PARTS]
        table.rows.append([one.name, one.beside, f"{one.seeds}", *values])
    return table


def setting_table(settings: dict[str, list[Any]], labels: list[str]) -> Table:
    """What differs between the configs of runs."""
    rows = [[name, *("-" if value is None else str(value) for value in values)] for name, values in settings.items()]
    return Table([("setting", ""), *((label, "") for label in labels)], rows, title="What differs")


def digit_table(tokenizers: dict[str, Any]) -> Table:
    """Each tokenizer: its digits, and the items that collide."""
    heads = [
        ("tokenizer", ""),
        ("digits", ""),
        ("SID", "bits"),
        ("entropy of a digit", "bits, mean"),
        ("idle digits", "which"),
        ("items that collide", ""),
        ("most items of a SID", ""),
    ]
    table = Table(heads)
    for name, tokenizer in tokenizers.items():
        corpus = tokenizer["corpus"]
        entropy, idle, collisions = corpus["digits"]["entropy"], corpus["digits"]["idle"], corpus["collisions"]
        share = collisions["items"] / max(corpus["items"], 1)
        table.rows.append(
            [
                name,
                f"{len(entropy)}",
                f"{corpus['bits']:.1f}",
                f"{math.fsum(entropy) / len(entropy):.2f}",
                ", ".join(str(digit + 1) for digit in idle) or "none",
                f"{collisions['items']:,} of {corpus['items']:,} ({share:.1%})",
                f"{collisions['largest']:,}",
            ]
        )
    return table


def step_table(steps: dict[str, float]) -> Table:
    """Seconds by step."""
    return Table([("step", ""), ("time", "s")], [[name, f"{seconds:,.1f}"] for name, seconds in steps.items()])


def _text(interval: Interval | None, format_spec: str) -> str:
    return "-" if interval is None else interval.text(format_spec)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.2f}" if known else "-"
