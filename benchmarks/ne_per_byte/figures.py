"""Draws the pictures of docs/ne_per_byte.md anew from its own tables, which hold all that was measured.

    python benchmarks/ne_per_byte/figures.py docs/ne_per_byte.md docs/figures

Under each heading that is listed in ``PICTURES`` the first table of variants is read. What run.py and by_length.py draw of new results is
drawn in the same way.
"""

import re
import sys
from pathlib import Path
from typing import Any

from analysis import PARTS, plot_gains, plot_per_byte
from by_length import plot
from study import BASE

from sidrec_torchrec.study.intervals import Interval

PICTURES = {  # heading: the end of the files' names, and which to draw
    "MovieLens-1M, 30% of the users": ("ml-1m", (plot_gains, plot_per_byte)),
    "Amazon Industrial & Scientific": ("amazon", (plot_gains,)),
    "Every day brings new items": ("churn", (plot_gains,)),
    "Content that is beside the point": ("idle", (plot_gains,)),
}
# Against bytes: embeddings, ids, traditional SIDs, and SIDE by the number of digits; all stand in the table and the bars.
_BY_BYTES = re.compile(r"raw|id|prefix n-grams, RQ 256x3 per source|SIDE, \d+ trits, collaborative, tuned")
_FILES = {plot_gains: "gains", plot_per_byte: "per-byte"}


def main(page: Path, folder: Path) -> None:
    sections = re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)
    by_heading = {section.partition("\n")[0]: section for section in sections}
    for heading, (end, plots) in PICTURES.items():
        summary = _summary(_rows(by_heading[heading], "| variant | NE, warm"))
        for draw in plots:
            some = {n: row for n, row in summary.items() if draw is not plot_per_byte or _BY_BYTES.fullmatch(n)}
            draw(some, folder / f"{_FILES[draw]}-{end}.png")
    rows = _rows(by_heading["Long histories, 10^5 items"], "| variant | T = ")
    plot(_by_length(rows), folder / "by-length.png")


def _rows(section: str, start: str) -> list[list[str]]:
    """Cells of the table that begins so, heads first."""
    lines = section[section.index(start) :].splitlines()
    table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table if not set(line) <= set("|-: ")]


def _summary(rows: list[list[str]]) -> dict[str, Any]:
    """As ``analysis.summarize`` gives it, but for what no picture needs."""
    summary = {}
    for name, *cells in rows[1:]:
        summary[name] = {
            "family": BASE if name == BASE else "",
            "gain_warm": _interval(cells[1]),
            "gain_cold": _interval(cells[5]),
            "bytes_per_event_stored": float(cells[8]),
            "bytes_per_event_kjt": float(cells[9].replace(",", "")),
        }
    return summary


def _by_length(rows: list[list[str]]) -> dict[str, dict[int, dict[str, float]]]:
    lengths = [int(head.removeprefix("T = ").replace(",", "")) for head in rows[0][1:]]
    return {
        name: {
            length: {part: float(value.split()[0]) for part, value in zip(PARTS, cell.split(" / "), strict=True)}
            for length, cell in zip(lengths, cells, strict=True)
            if cell != "-"
        }
        for name, *cells in rows[1:]
    }


def _interval(cell: str) -> Interval:
    """``+1.20% ±0.31``, as a share."""
    mean, _, half = cell.partition("%")
    return Interval(float(mean) / 100, float(half.strip(" ±")) / 100 if half.strip() else None)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
