"""Checks a data folder, and prints what is in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sidrec_torchrec.data.tasks import check_tasks
from sidrec_torchrec.data.validate import validate
from sidrec_torchrec.training.config import JobConfig


@dataclass(frozen=True, kw_only=True)
class DataValidateConfig(JobConfig):
    """What to check.

    Args:
        data: the data folder.
        tasks: columns of labels; none named means ``label``, if there is one.
    """

    data: Path
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tasks(self.tasks)


def main(config: DataValidateConfig) -> dict[str, Any]:
    """Prints and returns what ``validate`` found.

    Raises:
        DataError: as ``validate`` does.
    """
    summary = validate(config.data, config.tasks)
    table = Table(title=f"{config.data}: valid", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(justify="right")
    table.add_row("items", f"{summary['items']:,}")
    for name, source in summary["sources"].items():
        table.add_row(f"  source '{name}'", f"{source['dim']} wide, {source['missing']:,} missing")
    for name, missing in summary["missing_categories"].items():
        table.add_row(f"  category '{name}'", f"{missing:,} missing")
    table.add_row("  without any event", f"{summary['items_without_events']:,}")
    table.add_row("events", f"{summary['events']:,}")
    for name, label in summary["labels"].items():
        missing = f", {label['missing']:,} missing" if label["missing"] else ""
        table.add_row(f"  label '{name}'", f"rate {label['rate']:.4f}{missing}")
    if not summary["labels"]:
        table.add_row("  labels", "none: every event is a positive")
    table.add_row("users", f"{summary['users']:,}")
    history = summary["history"]
    table.add_row("  events of a user: p50, p90, max", f"{history['p50']:,}, {history['p90']:,}, {history['max']:,}")
    if summary["users_without_row"] is not None:
        table.add_row("  without a row in users.parquet", f"{summary['users_without_row']:,}")
    Console().print(table)
    return summary
