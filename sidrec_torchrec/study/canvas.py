"""Figures in one style: as part of a page, whose colours follow its light or dark ground, or as a file."""

import html
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.study.looks import LOOKS, Look

# Colours that are no arm's. Each is a variable of the page's style, too.
INK, MUTED, GRID, GROUND = "#1b1b1e", "#6a6a72", "#dededf", "#fffffe"
SMALL = 9.3
_STYLE: Any = {
    "font.size": 10.3,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 9.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    **dict.fromkeys(("text.color", "axes.titlecolor", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED),
    "svg.fonttype": "none",  # text stays text: it is read aloud, found and copied
    "svg.hashsalt": "sidrec",  # the same picture, the same file
}
Draw = Callable[[Axes], None]


def page_variables(*, is_dark: bool) -> dict[str, str]:
    """The page's colours that pictures use, by name."""
    dark = {"ink": "#ececef", "muted": "#a2a2aa", "grid": "#3a3a40", "ground": "#17171a"}
    own = dark if is_dark else {"ink": INK, "muted": MUTED, "grid": GRID, "ground": GROUND}
    return own | {f"look-{place}": look.dark if is_dark else look.light for place, look in enumerate(LOOKS)}


def inline_svg(draw: Draw, words: str, *, labels: dict[str, str], width: float = 4.6, height: float = 3.1) -> str:
    """A picture as an ``<svg>`` element that scales with its place.

    Args:
        draw: draws on the axes.
        words: what it shows, for who does not see it.
        labels: ``title``, ``xlabel``, ``ylabel``; those that are wanted.
        width: in inches, of 72 units each.
        height: likewise.
    """
    with rc_context(_STYLE):
        figure = _figure([draw], [labels], (width, height))
        return _inlined(figure, words)


def swatch(look: Look) -> str:
    """A stretch of a line as an arm's is drawn, for keys."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(0.5, 0.2))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(-1, 1), ylim=(-1, 1))
        axes.plot([-0.95, 0.95], [0, 0], color=look.light, linestyle=look.dash)
        axes.plot([0], [0], **marked(look))
        return _inlined(figure, "")


def marked(look: Look) -> dict[str, Any]:
    """How a look is drawn, by matplotlib's names; without the line. The empty part of a marker is the ground's colour, so that no line is seen through it."""
    empty = {"markerfacecoloralt": GROUND} | ({"markerfacecolor": GROUND} if look.fill == "none" else {})
    fill = "full" if look.fill == "none" else look.fill
    return {"color": look.light, "marker": look.marker, "fillstyle": fill, **empty}


def save_png(
    path: Path,
    draws: list[Draw],
    labels: list[dict[str, str]],
    *,
    key: Mapping[str, Look] = MappingProxyType({}),
    width: float = 10.0,
    height: float = 4.2,
) -> None:
    """Pictures side by side as a PNG of a white ground.

    Args:
        path: the file.
        draws: draw on the axes of each.
        labels: of each, as ``inline_svg`` has them.
        key: looks by name, said below.
        width: of all, in inches.
        height: likewise.
    """
    with rc_context(_STYLE):
        figure = _figure(draws, labels, (width, height))
        lines = [Line2D([], [], **marked(look), linestyle=look.dash, label=name) for name, look in key.items()]
        if lines:
            figure.legend(
                handles=lines,
                loc="outside lower center",
                ncols=min(len(lines), 6 if max(map(len, key)) < 16 else 3),
                frameon=False,
            )
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=130, format="png", metadata={"Software": None})


def _figure(draws: list[Draw], labels: list[dict[str, str]], inches: tuple[float, float]) -> Figure:
    # not by pyplot, whose backend is the caller's to choose: a notebook goes on showing its own plots
    figure = Figure(figsize=inches, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (draw, its) in enumerate(zip(draws, labels, strict=True)):
        axes = figure.add_subplot(1, len(draws), place + 1)
        axes.set(**its)
        draw(axes)
    return figure


def _inlined(figure: Figure, words: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", svg)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf"<svg \1 {_named(words)}>", svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # axes_1 and so on, in every picture
    svg = svg.replace("xlink:href", "href")
    for name, color in page_variables(is_dark=False).items():
        svg = svg.replace(color, f"var(--{name})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def _named(words: str) -> str:
    return f'role="img" aria-label="{html.escape(words)}"' if words else 'aria-hidden="true"'
