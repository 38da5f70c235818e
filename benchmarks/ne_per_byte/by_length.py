"""NE against the length of histories: studies of one data set that differ in ``--max-history``, side by side.

    python benchmarks/ne_per_byte/by_length.py OUT_1024 OUT_4096 OUT_10000 --plot by_length.png

Prints NE, warm / cold, mean over seeds and 95% interval, by variant and length, for the variants that two studies have at
least, and plots them. Each OUT is a folder that run.py wrote.
"""

import argparse
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from analysis import PARTS, summarize
from matplotlib.axes import Axes
from study import arm_of

from sidrec_torchrec.study.canvas import save_png
from sidrec_torchrec.study.figures import Curve, draw_curves
from sidrec_torchrec.study.looks import look_of


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
        ne = {
            name: {
                length: {part: study[name][f"ne_{part}"].mean for part in PARTS}
                for length, study in by_length.items()
                if name in study
            }
            for name in names
        }
        plot(ne, arguments.plot)


def _cell(row: dict[str, Any] | None) -> str:
    """NE, warm / cold; with its interval where there are several seeds."""
    if row is None:
        return "-"
    cells = []
    for part in PARTS:
        cells.append(row[f"ne_{part}"].text(".4f"))
    return " / ".join(cells)


def plot(ne: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Mean NE against the length of histories.

    Args:
        ne: by variant, length and part.
        path: of the picture.
    """
    lengths = sorted({length for of_variant in ne.values() for length in of_variant})
    arms = [arm_of(name) for name in ne]
    looks = {
        name: look_of(arm, arms[:place].count(arm)) for place, (name, arm) in enumerate(zip(ne, arms, strict=True))
    }

    def draw(axes: Axes, part: str) -> None:
        draw_curves(axes, [Curve(looks[n], [*ne[n]], [values[part] for values in ne[n].values()]) for n in ne])
        axes.set(xscale="log", xticks=lengths, xticklabels=[f"{length:,}" for length in lengths])
        axes.minorticks_off()

    labels = [{"title": f"{part} items", "xlabel": "events of history, T", "ylabel": "NE"} for part in PARTS]
    save_png(path, [partial(draw, part=part) for part in PARTS], labels, key=looks, width=12.5, height=5)


if __name__ == "__main__":
    main()
