"""Checks a data folder, and prints what is in it."""

from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from sidrec_torchrec.data.format import DataConfig
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.tasks import check_tasks
from sidrec_torchrec.data.validate import validate
from sidrec_torchrec.engines.base import open_engine
from sidrec_torchrec.storage.urls import as_urls
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import stage


@dataclass(frozen=True, kw_only=True)
class DataValidateConfig(DataConfig):
    """What to check.

    Args:
        data: the data folder.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
        tasks: columns of labels, and of numbers (``dwell:regression``); none named means ``label``, if there is one.
        policy: what may be wrong with events.
        engine: what reads shares of large files: ``local``, all cores of this machine, or ``ray``, a Ray cluster that shares the folder; none
            named: ``local``, or torchrun's processes. The result is the same.
    """

    tasks: tuple[str, ...] = ()
    policy: EventPolicy = field(default_factory=EventPolicy)
    engine: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tasks(self.tasks)


def main(config: DataValidateConfig) -> dict[str, Any]:
    """Prints and returns what ``validate`` found; torchrun's processes share the work, and the first prints.

    Raises:
        DataError: as ``validate`` does.
    """
    with process_group() as processes:
        with stage("check data", None, show=processes.is_main, line=False), closing(open_engine(config.engine)) as own:
            summary = validate(config.folder, config.tasks, config.policy, own)
        if processes.is_main:
            _print(config, summary)
    return summary


def _print(config: DataValidateConfig, summary: dict[str, Any]) -> None:
    table = Table(title=as_urls(f"{config.data}: valid"), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_row("items", f"{summary['items']:,}")
    for name, source in summary["sources"].items():
        table.add_row(f"  source '{name}'", f"{source['dim']} wide, {source['missing']:,} missing")
    for name, missing in summary["missing_categories"].items():
        table.add_row(f"  category '{name}'", f"{missing:,} missing")
    if summary["events"] is None:
        table.add_row("events", "none: a tokenizer can be trained, a ranker cannot")
    else:
        _add_events(table, summary)
    console = Console()
    console.print(table)
    for kind, unread in summary["unread"].items():
        for column, why in unread.items():
            console.print(f"{kind}: '{column}' is not read: {why}", highlight=False, markup=False, soft_wrap=True)


def _add_events(table: Table, summary: dict[str, Any]) -> None:
    table.add_row("  without any event", f"{summary['items_without_events']:,}")
    table.add_row("events", f"{summary['events']:,}")
    for name, met in summary["met"].items():
        if met["count"]:
            table.add_row(f"  {name.replace('_', ' ')}", f"{met['count']:,} ({met['policy']})")
    for name, label in summary["labels"].items():
        missing = f", {label['missing']:,} missing" if label["missing"] else ""
        said = f"rate {label['rate']:.4f}" if "rate" in label else f"mean {label['mean']:g} ± {label['deviation']:g}"
        said += " of log(1 + y)" if label.get("is_log") else ""
        table.add_row(f"  label '{name}'", f"{said}{missing}")
    if not summary["labels"]:
        table.add_row("  labels", "none: every event is a positive")
    table.add_row("users", f"{summary['users']:,}")
    history = summary["history"]
    table.add_row("  events of a user: p50, p90, max", f"{history['p50']:,}, {history['p90']:,}, {history['max']:,}")
    if summary["users_without_row"] is not None:
        table.add_row("  without a row in users", f"{summary['users_without_row']:,}")
