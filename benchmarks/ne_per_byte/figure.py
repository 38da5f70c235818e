"""One figure of all corpora: what each arm keeps of the gain of raw embeddings, against the bytes it takes.

    python benchmarks/ne_per_byte/figure.py benchmarks/ne_per_byte/results/*.json --out docs/figures/kept-per-byte.png

Each file is a ``summary.json`` that run.py wrote, called after its corpus; a colour is an arm, a marker a corpus, a bar a 95% interval
over users.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from analysis import PARTS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

MARKERS = "osD^vP*X"
# by how a variant's name begins: what it is called, and its colour; of several the first
COLORS = {
    "raw as 32 int8": ("embeddings as 32 int8", "#8c8c8c"),
    "raw as PQ": ("embeddings, product-quantized", "#c49a00"),
    "raw": ("embeddings", "#333333"),
    "id": ("ids, hashed", "#9467bd"),
    "prefix n-grams": ("traditional SIDs: n-grams", "#d62728"),
    "pieces": ("traditional SIDs: pieces", "#ff9896"),
    "SIDE +": ("SIDE + pieces", "#2ca02c"),
    "SIDE": ("SIDE", "#1f77b4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    corpora = {path.stem: json.loads(path.read_text())["variants"] for path in arguments.results}
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, part in zip(panels, PARTS, strict=True):
        for marker, variants in zip(MARKERS, corpora.values(), strict=False):
            draw(axes, variants, part, marker)
        axes.axhline(100, color="#333333", linewidth=0.8)
        axes.axhline(0, color="#cccccc", linewidth=0.8)
        axes.set(title=f"{part} items", xscale="log", xlabel="bytes of an event's item in a compressed log")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of the embeddings' NE gain that is kept, %")
    figure.legend(handles=legend(corpora), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(arguments.out, dpi=130)


def look(name: str) -> tuple[str, str] | None:
    """What a variant is called, and its colour; None if it is not drawn."""
    return next((shown for start, shown in COLORS.items() if name.startswith(start)), None)


def draw(axes: Axes, variants: dict[str, Any], part: str, marker: str) -> None:
    """A corpus' variants."""
    for name, row in variants.items():
        shown, (value, low, high) = look(name), row[f"kept_{part}"]
        if shown is None or value is None:
            continue
        ends = (value, value) if low is None else (low, high)
        error = 100 * np.abs(np.array(ends) - value)[:, None]
        axes.errorbar(
            row["bytes_per_event_stored"],
            100 * value,
            error,
            fmt=marker,
            color=shown[1],
            markersize=6,
            capsize=2,
            elinewidth=0.8,
        )


def legend(corpora: dict[str, Any]) -> list[Line2D]:
    """A colour for each arm that is there, a marker for each corpus."""
    there = {look(name) for variants in corpora.values() for name in variants} - {None}
    arms = [
        Line2D([], [], color=color, marker="o", linestyle="", label=name)
        for name, color in COLORS.values()
        if (name, color) in there
    ]
    marks = [
        Line2D([], [], color="#555555", marker=marker, linestyle="", fillstyle="none", label=name)
        for marker, name in zip(MARKERS, corpora, strict=False)
    ]
    return arms + marks


if __name__ == "__main__":
    main()
