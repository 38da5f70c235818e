"""What every benchmark prints and writes: our figure, a named peer's in the same run, and the ratio of the two."""

import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table


class Comparisons:
    """Collects comparisons of one run.

    Args:
        title: of the table.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[dict] = []

    def add(
        self, case: str, metric: str, ours: float, peer: str, peer_value: float, *, lower_is_better: bool = False
    ) -> None:
        """Adds our figure beside a peer's; the ratio is above 1 where ours is better."""
        over, under = (peer_value, ours) if lower_is_better else (ours, peer_value)
        ratio = over / under if under else math.inf
        self.rows.append(
            {"case": case, "metric": metric, "ours": ours, "peer": peer, "peer_value": peer_value, "ratio": ratio}
        )

    def finish(self, json_file: Path | None) -> None:
        """Prints the table with the command and the machine; writes the rows as JSON where a file is named."""
        table = Table(title=self.title)
        for name in ("case", "metric"):
            table.add_column(name)
        for name in ("ours", "peer's", "ratio"):
            table.add_column(name, justify="right")
        table.add_column("peer")
        for row in self.rows:
            figures = [f"{row[name]:.4g}" for name in ("ours", "peer_value")]
            table.add_row(row["case"], row["metric"], *figures, f"{row['ratio']:.2f}", row["peer"])
        # in a file or pipe there is no width to fit
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(table)
        console.print(f"python {' '.join(sys.argv)}\n{machine()}", highlight=False)
        if json_file is not None:
            json_file.write_text(json.dumps(self.rows, indent=2) + "\n")


def machine() -> str:
    """The processor, threads and versions, in a line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{device}{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def seconds(*runs: Callable[[], object], repeats: int = 9, least: float = 0.05) -> list[float]:
    """The median time of a call of each, in seconds.

    The calls take turns, so that what else the machine does falls on all alike.

    Args:
        runs: what to time.
        repeats: rounds.
        least: each round repeats a call until it has taken this long.
    """
    counts = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        counts.append(max(1, round(least / max(time.perf_counter() - start, 1e-9))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, count, taken in zip(runs, counts, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                run()
            taken.append((time.perf_counter() - start) / count)
    return [median(taken) for taken in times]


def gpu_seconds(*runs: Callable[[], object], repeats: int = 9, calls: int = 10) -> list[float]:
    """The median time of a call of each on the current GPU, in seconds: as ``seconds``, between CUDA events."""
    for run in runs * 3:  # compile, and fill the allocator's cache
        run()
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1000 / calls)
    return [median(taken) for taken in times]
