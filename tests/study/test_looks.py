"""An arm's colour is the same everywhere, seen on both grounds, and no arm is told from another by colour alone."""

import itertools

import pytest
from matplotlib.lines import Line2D

from sidrec_torchrec.ranker.arms import ARMS
from sidrec_torchrec.study.canvas import page_variables
from sidrec_torchrec.study.looks import LOOKS, look_of


def luminance(color: str) -> float:
    """As WCAG defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted(luminance(color) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("is_dark", [False, True])
def test_colours_are_seen(is_dark):
    colors = page_variables(is_dark=is_dark)
    for name in (name for name in colors if name.startswith("look-")):
        assert contrast(colors[name], colors["ground"]) >= 2.8, name  # 3 asks WCAG of what is drawn
    assert contrast(colors["ink"], colors["ground"]) > 12 and contrast(colors["muted"], colors["ground"]) > 4.5


def test_every_arm_has_a_look_of_its_own():
    looks = [look_of(arm) for arm in ARMS]
    assert len(looks) <= len(LOOKS)
    for one, other in itertools.combinations(looks, 2):
        assert one.light != other.light and one.dark != other.dark
        assert (one.marker, one.dash) != (other.marker, other.dash)
    assert {look.marker for look in looks} <= {*Line2D.markers}


def test_a_new_arm_gets_the_next_one(monkeypatch):
    before = {arm: look_of(arm) for arm in ARMS}
    monkeypatch.setattr(ARMS, "_entries", ARMS._entries | {"of-another-package": object})
    assert look_of("of-another-package") not in before.values()
    assert {arm: look_of(arm) for arm in before} == before


def test_runs_differ_in_the_fill_alone():
    one, other = look_of("side"), look_of("side", 1)
    assert one != other and (one.light, one.marker, one.dash) == (other.light, other.marker, other.dash)
