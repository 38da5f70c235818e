"""NE of users left out of training after each epoch, arm by arm: one picture for each comparison that ``sidrec pipeline`` made.

    python benchmarks/ne_per_byte/by_epoch.py RUN --title MovieLens-1M --out docs/figures/by-epoch.png

Each RUN is the folder of a comparison; a line is the mean over its seeds.
"""

import argparse
from functools import partial
from pathlib import Path

from sidrec_torchrec.files import read_object
from sidrec_torchrec.study.canvas import save_png
from sidrec_torchrec.study.figures import Curve, draw_curves
from sidrec_torchrec.study.results import Results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--title", action="append", default=[], help="of each run, in their order")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draws, labels, key = [], [], {}
    titles = [*arguments.title, *(run.name for run in arguments.runs[len(arguments.title) :])]
    for run, title in zip(arguments.runs, titles, strict=True):
        curves = curves_of(Results(read_object(run / "report.json")))
        draws.append(partial(draw_curves, curves=[*curves.values()]))
        labels.append({"title": title, "xlabel": "epoch", "ylabel": "" if len(draws) > 1 else "NE of validation users"})
        key |= {name: curve.look for name, curve in curves.items()}
    save_png(arguments.out, draws, labels, key=key, width=5.0 * len(draws))


def curves_of(results: Results) -> dict[str, Curve]:
    """Means over seeds, by arm."""
    found = {arm.name: (arm.look, results.validation(arm)) for arm in results.arms}
    return {name: Curve(look, range(1, len(ne) + 1), ne) for name, (look, ne) in found.items() if ne}


if __name__ == "__main__":
    main()
