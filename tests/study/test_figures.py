"""What pictures must keep: no name over another, ticks that are read as they are, both grounds."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from sidrec_torchrec.study.canvas import inline_svg, page_variables, save_png
from sidrec_torchrec.study.figures import Curve, Dot, draw_by_bytes, draw_curves, draw_reliability, short, size
from sidrec_torchrec.study.intervals import Interval
from sidrec_torchrec.study.looks import LOOKS


def dots(count: int, spread: float) -> list[Dot]:
    rng = np.random.default_rng(count)
    return [
        Dot(f"an arm, {place} trits", LOOKS[place], Interval(20 + spread * rng.normal(), 0.4), 1.8 * (1 + place % 3))
        for place in range(count)
    ]


@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_no_name_is_written_over_another(spread):
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = dots(7, spread)
    draw_by_bytes(axes, drawn)
    figure.draw_without_rendering()
    names = [text for text in axes.texts if isinstance(text, Annotation)]
    assert len(names) >= (6 if spread else 4)
    boxes = [Text.get_window_extent(text) for text in names]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    places = axes.transData.transform([(dot.x, dot.value.mean) for dot in drawn])
    assert not any(box.contains(x, y) for box in boxes for x, y in places)


def test_ticks_of_bytes_are_numbers():
    figure = Figure(figsize=(9.2, 3.6))
    FigureCanvasAgg(figure)
    few, many = figure.subplots(1, 2)
    draw_by_bytes(few, dots(3, 1.0))
    draw_by_bytes(many, [Dot("a", LOOKS[0], Interval(1.0), 1.2), Dot("b", LOOKS[1], Interval(2.0), 1_225.0)])
    figure.draw_without_rendering()

    def ticks(axes) -> list[str]:
        low, high = axes.get_xlim()
        return [t.get_text() for t, x in zip(axes.get_xticklabels(), axes.get_xticks()) if low <= x <= high]

    assert ticks(few) == ["1", "2", "5", "10"]
    assert ticks(many) == ["1", "10", "100", "1,000"]
    assert [size(x) for x in (1, 5_000, 20_000, 3e6, 2e9)] == ["1", "5,000", "20 kB", "3 MB", "2 GB"]


def test_buckets_have_short_names():
    assert short("100 to 999") == "100–999" and short("1,000 and more") == "1,000+"
    assert max(map(len, short("no earlier event").split("\n"))) <= 8


def test_a_picture_follows_its_page():
    curves = [Curve(look, [1, 2], [0.9, 0.8]) for look in LOOKS]
    svg = inline_svg(lambda axes: draw_curves(axes, curves), 'a "b" <c>', labels={"xlabel": "epoch"})
    assert svg.startswith("<svg viewBox=") and 'role="img" aria-label="a &quot;b&quot; &lt;c&gt;"' in svg
    assert ">epoch</text>" in svg  # text, not outlines
    assert not re.search("https?:|#000000|<metadata|<g id", svg)
    used = set(re.findall(r"var\(--([\w-]+)\)", svg))
    assert (
        {f"look-{place}" for place in range(len(LOOKS))} | {"ink", "muted", "grid"}
        <= used
        <= {*page_variables(is_dark=True)}
    )
    left = {color.lower() for color in re.findall("#[0-9a-fA-F]{6}", svg)}
    assert not left, left
    assert svg == inline_svg(lambda axes: draw_curves(axes, curves), 'a "b" <c>', labels={"xlabel": "epoch"})


@pytest.mark.parametrize(("rate", "scale"), [(0.01, "log"), (0.6, "linear")])
def test_rare_labels_are_seen_on_a_logarithmic_scale(rate, scale):
    figure = Figure()
    axes = figure.add_subplot()
    draw_reliability(axes, [Curve(LOOKS[0], [rate / 2, rate], [rate / 3, rate])])
    assert axes.get_xscale() == axes.get_yscale() == scale
    assert axes.get_xlim() == axes.get_ylim() and axes.get_xlim()[1] >= rate


def test_files_are_pictures(tmp_path):
    path = tmp_path / "new" / "curves.png"
    draw = lambda axes: draw_curves(axes, [Curve(LOOKS[0], [1, 2], [1, 2])])
    save_png(path, [draw, draw], [{"title": "a"}, {"title": "b"}], key={"x": LOOKS[0]}, width=8, height=3)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") == 8 * 130
