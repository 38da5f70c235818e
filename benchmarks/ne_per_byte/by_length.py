"""NE against the length of histories: studies of one data set that differ in ``--max-history``, side by side.

    python benchmarks/ne_per_byte/by_length.py OUT_1024 OUT_4096 OUT_10000 --plot by_length.png

Prints NE, warm / cold, mean over seeds and 95% interval, by variant and length, for the variants that two studies have at
least, and plots them. Each OUT is a folder that run.py wrote.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from analysis import PARTS, summarize
from matplotlib.figure import Figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", metavar="OUT")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    by_length = {}
    for folder in arguments.studies:
        study = json.loads((folder / "results.json").read_text())
        by_length[study["arguments"]["max_history"]] = summarize(study["variants"])
    lengths = sorted(by_length)
    counts = Counter(name for study in by_length.values() for name in study)
    names = [name for name, count in counts.items() if count > 1]
    print(f"| variant | {' | '.join(f'T = {length:,}' for length in lengths)} |")
    print(f"|---|{'---|' * len(lengths)}")
    for name in names:
        print(f"| {name} | {' | '.join(_cell(by_length[length].get(name)) for length in lengths)} |")
    if arguments.plot:
        _plot(by_length, lengths, names, arguments.plot)


def _cell(row: dict[str, Any] | None) -> str:
    """NE, warm / cold; with its interval where there are several seeds."""
    if row is None:
        return "-"
    cells = []
    for part in PARTS:
        mean, half = row[f"ne_{part}"]
        cells.append(f"{mean:.4f}" if half is None else f"{mean:.4f} ±{half:.4f}")
    return " / ".join(cells)


def _plot(by_length: dict[int, dict[str, Any]], lengths: list[int], names: list[str], path: Path) -> None:
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, part in zip(panels, PARTS, strict=True):
        for name in names:
            there = [length for length in lengths if name in by_length[length]]
            axes.plot(there, [by_length[t][name][f"ne_{part}"][0] for t in there], marker="o", label=name)
        axes.set(title=f"{part} items", xlabel="events of history, T", xscale="log", xticks=lengths)
        axes.set_xticklabels([f"{t:,}" for t in lengths])
        axes.minorticks_off()
    panels[0].set_ylabel("NE")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
