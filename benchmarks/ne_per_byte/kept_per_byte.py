"""One figure of all corpora: what each arm keeps of the gain of raw embeddings, against the bytes it takes.

    python benchmarks/ne_per_byte/kept_per_byte.py benchmarks/ne_per_byte/results/*.json --out docs/figures/kept-per-byte.png

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
from study import arm_of

from sidrec_torchrec.study.looks import look_of

MARKERS = "osD^vP*X"


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


def draw(axes: Axes, variants: dict[str, Any], part: str, marker: str) -> None:
    """A corpus' variants."""
    for name, row in variants.items():
        value, low, high = row[f"kept_{part}"]
        if value is None or not row["bytes_per_event_stored"]:
            continue
        error = 100 * np.abs(np.array([value, value] if low is None else [low, high]) - value)[:, None]
        color = look_of(arm_of(name)).light
        bytes_stored = row["bytes_per_event_stored"]
        axes.errorbar(
            bytes_stored, 100 * value, error, fmt=marker, color=color, markersize=6, capsize=2, elinewidth=0.8
        )


def legend(corpora: dict[str, Any]) -> list[Line2D]:
    """A colour for each arm that is there, a marker for each corpus."""
    drawn = [name for variants in corpora.values() for name, row in variants.items() if row["bytes_per_event_stored"]]
    arms = dict.fromkeys(map(arm_of, drawn))
    colors = [Line2D([], [], color=look_of(arm).light, marker="o", linestyle="", label=arm) for arm in arms]
    marks = [
        Line2D([], [], color="#555555", marker=marker, linestyle="", fillstyle="none", label=name)
        for marker, name in zip(MARKERS, corpora, strict=False)
    ]
    return colors + marks


if __name__ == "__main__":
    main()
