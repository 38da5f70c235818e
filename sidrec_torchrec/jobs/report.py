"""Puts runs side by side: pipelines, or rankers trained one by one, on one page."""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.study.comparison import Comparison, compare
from sidrec_torchrec.study.report import print_report
from sidrec_torchrec.study.report_html import write_comparison
from sidrec_torchrec.study.results import PARTS, Results
from sidrec_torchrec.training.config import POSITIONAL, JobConfig
from sidrec_torchrec.training.progress import stage


@dataclass(frozen=True, kw_only=True)
class ReportConfig(JobConfig):
    """What to compare.

    Args:
        run: folders that pipeline or train-ranker wrote; rankers that differ in the seed alone become one arm of several seeds.
        out: the page to write, such as ``compared.html``.
        across: whether to show runs of different data or protocols, too; then no difference is taken.

    Raises:
        SidrecError: without a run, or if ``out`` is a folder.
    """

    run: tuple[Path, ...] = field(metadata=POSITIONAL)
    out: Path
    across: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run:
            raise SidrecError("name the folder of at least one run")
        if self.out.is_dir():
            raise SidrecError(f"{self.out}: a folder; name a file, such as {self.out / 'compared.html'}")


def main(config: ReportConfig) -> Comparison:
    """Prints the arms of all runs, and what differs; writes the page.

    Raises:
        SidrecError: on a folder that is no finished run.
        RunMismatchError: on runs of different data or protocols, unless ``across``.
    """
    with stage("report", None, show=True, line=False):
        comparison = compare(config.run, across=config.across)
        write_comparison(comparison, config.out)
    print_report(comparison.report)
    if comparison.differences:
        _print_differences(comparison)
    return comparison


def _print_differences(comparison: Comparison) -> None:
    metric = Results(comparison.report).kind.upper()
    table = Table(title=f"Differences of {metric}, paired by seed, and their 95% intervals", title_justify="left")
    for column in ("arm", "beside", "seeds", *PARTS):
        table.add_column(column, justify="left" if column in ("arm", "beside") else "right")
    for one in comparison.differences:
        values = (one.values[part].text("+.4f") if part in one.values else "-" for part in PARTS)
        table.add_row(one.name, one.beside, str(one.seeds), *values)
    Console(width=max(Console().width, 110)).print(table)
