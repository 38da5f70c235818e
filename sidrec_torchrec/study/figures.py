"""The pictures of a comparison, on matplotlib's axes; the report draws them into its page, benchmarks into files."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from sidrec_torchrec.study.canvas import GRID, INK, MUTED, SMALL, marked
from sidrec_torchrec.study.intervals import Interval
from sidrec_torchrec.study.looks import Look


@dataclass(frozen=True)
class Dot:
    """An arm at a place.

    Args:
        name: said beside it.
        look: of its arm.
        value: with its interval.
        x: where it stands, in a plot that has such an axis.
    """

    name: str
    look: Look
    value: Interval
    x: float = 0.0


@dataclass(frozen=True)
class Curve:
    """An arm's values along an axis.

    Args:
        look: of its arm.
        x: places.
        y: values.
    """

    look: Look
    x: Sequence[float]
    y: Sequence[float]


def draw_dots(axes: Axes, dots: Sequence[Dot], format_spec: str, lines: Sequence[tuple[str, float]] = ()) -> None:
    """A row per arm: its value with the interval, and in words at the right; upright lines where others are.

    Args:
        axes: to draw on.
        dots: from top to bottom.
        format_spec: of values in words.
        lines: what to compare with: name and value.
    """
    for y, dot in enumerate(dots):
        half = dot.value.half
        axes.errorbar(dot.value.mean, y, xerr=half, **marked(dot.look), linestyle="", capsize=0 if half is None else 3)
        axes.annotate(
            dot.value.text(format_spec), (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL
        )
    for place, (name, value) in enumerate(lines):
        axes.axvline(value, color=INK, linewidth=0.9, linestyle=(0, (1.2, 1.6)) if place else (0, (4.0, 1.6)), zorder=0)
        axes.annotate(
            name, (value, 1 + 0.085 * place), xycoords=("data", "axes fraction"), ha="center", va="bottom",
            fontsize=SMALL, color=MUTED, annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(dots)), [dot.name for dot in dots])
    axes.set_ylim(len(dots) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.xaxis.set_major_locator(MaxNLocator(4))


def draw_by_bytes(axes: Axes, dots: Sequence[Dot]) -> None:
    """Values against bytes, on a logarithmic axis whose ticks are read as they are; names beside the dots, none over another."""
    for dot in dots:
        half = dot.value.half
        axes.errorbar(
            dot.x, dot.value.mean, yerr=half, **marked(dot.look), linestyle="",
            capsize=0 if half is None else 3,
        )  # fmt: skip
    axes.set_xscale("log")
    low, high = min(dot.x for dot in dots), max(dot.x for dot in dots)
    axes.set_xlim(low / 2, high * 2)
    decades = math.log10(high / low * 4)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2.5 else (1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: size(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.7)
    axes.axhline(0, color=MUTED, linewidth=0.9, zorder=0)
    _name(axes, dots)


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """A line per arm along steps that are whole numbers."""
    for curve in curves:
        _line(axes, curve)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="y", color=GRID, linewidth=0.7)


def draw_by_bucket(axes: Axes, curves: Sequence[Curve], buckets: Sequence[str]) -> None:
    """A line per arm over buckets, which are named below."""
    for curve in curves:
        _line(axes, curve)
    axes.xaxis.set_major_locator(FixedLocator(range(len(buckets))))
    axes.set_xticklabels([short(bucket) for bucket in buckets], fontsize=SMALL)
    axes.set_xlim(-0.35, len(buckets) - 0.65)
    axes.grid(axis="y", color=GRID, linewidth=0.7)


def draw_reliability(axes: Axes, curves: Sequence[Curve]) -> None:
    """Share that came true against what was predicted; logarithmic where all of it is rare. On the diagonal nothing is off."""
    highest = max((max(*curve.x, *curve.y) for curve in curves if len(curve.x)), default=1.0)
    lowest = min((min(p for p in (*curve.x, *curve.y) if p > 0) for curve in curves if len(curve.x)), default=0.0)
    for curve in curves:
        _line(axes, curve)
    is_rare = highest < 0.3 and lowest > 0
    if is_rare:
        for axis in (axes.xaxis, axes.yaxis):
            axis.axes.set(xscale="log", yscale="log")
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
            axis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f}%"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f}%"))
    ends = (lowest / 1.3, highest * 1.3) if is_rare else (0.0, 1.0)
    axes.plot(ends, ends, color=MUTED, linewidth=0.9, zorder=0)
    axes.set(xlim=ends, ylim=ends)
    axes.grid(color=GRID, linewidth=0.7)


def draw_digits(axes: Axes, bits: Sequence[float], most: Sequence[float]) -> None:
    """What each digit says, in bits, as bars before what it could say at most."""
    places = range(1, len(bits) + 1)
    axes.bar(places, most, width=0.82, color=GRID)
    axes.bar(places, bits, width=0.82, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlim(0.3, len(bits) + 0.7)
    axes.set_ylim(0, 1.08 * max(most))


def draw_reconstruction(axes: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """A line per source; they are no arms, so they have no colours, but markers and names."""
    for (name, (x, y)), marker in zip(curves.items(), "osD^vXPdph*<>" * len(curves), strict=False):
        axes.plot(x, y, color=MUTED, marker=marker, markersize=4.5, linewidth=1.2, label=name)
    axes.set_ylim(0, None)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.legend(frameon=False, fontsize=SMALL)


def size(x: float) -> str:
    """Bytes, as a tick says them."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e4)):
        if x >= factor:
            return f"{x / (1e3 if unit == 'kB' else factor):g} {unit}"
    return f"{x:,g}"


def short(bucket: str) -> str:
    """A bucket's name in lines of few letters: ``100–999``, ``1,000+``."""
    text = bucket.replace(" to ", "–").replace(" and more", "+")
    return "\n".join(textwrap.wrap(text, 8, break_on_hyphens=False))


def _line(axes: Axes, curve: Curve) -> None:
    look = curve.look
    axes.plot(curve.x, curve.y, **marked(look), linestyle=look.dash)


# Where a name may stand, in points from its dot: right beside it, above or below, then farther off, with a line to the dot.
_PLACES = [
    *((7, 0), (-7, 0), (7, 11), (7, -11), (-7, 11), (-7, -11), (0, 13), (0, -13)),
    *((dx, dy) for dy in (20, -20, 32, -32, 46, -46, 64, -64) for dx in (12, -12, 26, -26, 0)),
]
_LEADER = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
_BESIDE = 8  # points; names farther off have a line


def _name(axes: Axes, dots: Sequence[Dot]) -> None:
    """Writes each dot's name where it covers no other name, no dot and no interval, and stays inside; nowhere without room."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # only then is it known where things are
    inside, point = axes.get_window_extent(), figure.dpi / 72
    taken = [_around(axes, dot, point) for dot in dots]
    for dot in sorted(dots, key=lambda dot: -dot.x):
        for dx, dy in _PLACES:
            is_far = max(abs(dx), abs(dy)) > _BESIDE
            text = axes.annotate(
                dot.name,
                (dot.x, dot.value.mean),
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=SMALL,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center",
                arrowprops=_LEADER if is_far else None,
            )
            text.get_window_extent()  # puts it in its place; what it gives would have the line in it
            box = Text.get_window_extent(text).padded(point)
            covers = any(box.overlaps(other) for other in taken)
            if not covers and inside.contains(*box.p0) and inside.contains(*box.p1):
                taken.append(box)
                break
            text.remove()  # if there is room nowhere, the key beside the picture names it


def _around(axes: Axes, dot: Dot, point: float) -> Bbox:
    """What a dot and its interval cover."""
    half = dot.value.half or 0.0
    (x, low), (_, high) = axes.transData.transform([(dot.x, dot.value.mean - half), (dot.x, dot.value.mean + half)])
    return Bbox.from_extents(x - 4 * point, min(low, high) - 4 * point, x + 4 * point, max(low, high) + 4 * point)
