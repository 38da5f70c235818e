"""What an arm looks like: one colour, marker and dash in every plot, on the page and in the docs. This is the one place that says it."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sidrec_torchrec.ranker.arms import ARMS

Fill = Literal["full", "none", "left", "right", "bottom", "top"]
Dash = Literal["-"] | tuple[float, Sequence[float]]


@dataclass(frozen=True)
class Look:
    """How a line and its points are drawn.

    Args:
        light: colour on a light ground, as ``#rrggbb``.
        dark: on a dark one.
        marker: matplotlib's name of it.
        dash: matplotlib's line style.
        fill: how much of the marker is; tells runs apart that have the same arm.
    """

    light: str
    dark: str
    marker: str
    dash: Dash = "-"
    fill: Fill = "full"


_DASHED, _DOTTED, _DASHDOT = (0, (4.0, 1.6)), (0, (1.2, 1.4)), (0, (5.0, 1.4, 1.2, 1.4))

# After Okabe and Ito, and Tol: told apart by who sees few colours; markers and dashes do so without any. The first two are those of no
# content and of all of it: grey, and the colour of text.
LOOKS = (
    Look("#85858a", "#9a9aa2", "o", _DOTTED),
    Look("#1d1d20", "#f2f2f4", "s", _DASHED),
    Look("#8c4a00", "#d9a066", "v", _DASHDOT),
    Look("#c2568f", "#e58fbe", "D", _DASHED),
    Look("#d9820b", "#f2a63a", "^", "-"),
    Look("#a8880f", "#d9c04a", "<", _DASHED),
    Look("#7a7a1f", "#b9b95a", ">", _DOTTED),
    Look("#882255", "#d0709f", "p", _DASHDOT),
    Look("#0067ad", "#5ab0f0", "o", "-"),
    Look("#00855f", "#3fcf9f", "X", _DASHDOT),
    Look("#3d3aa8", "#9d9af5", "P", _DASHED),
    Look("#2f9bb5", "#7fd3e6", "h", _DOTTED),
    Look("#b33a2b", "#f08a7d", "d", "-"),
    Look("#6b4c9a", "#b79ae0", "*", _DASHDOT),
)


_FILLS: tuple[Fill, ...] = ("full", "none", "left", "right", "bottom", "top")


def look_of(arm: str, run: int = 0) -> Look:
    """An arm's look: that of its place in ``ARMS``, so that a new one, of whatever package, gets the next that is free.

    Args:
        arm: its name; of one that is not installed here, the name alone decides.
        run: which of several runs it is of, from 0.
    """
    names = [*ARMS]
    place = names.index(arm) if arm in names else len(names) + zlib.crc32(arm.encode())
    return replace(LOOKS[place % len(LOOKS)], fill=_FILLS[run % len(_FILLS)])
