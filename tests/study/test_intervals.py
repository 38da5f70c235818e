"""Intervals against numerical integration of Student's density, and what is paired by seed."""

import math

import numpy as np
import pytest

from sidrec_torchrec.study.intervals import _STUDENT, Interval, differences, gains


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 15, 30])
def test_quantiles_are_students(freedom):
    angle = np.linspace(0, math.atan(_STUDENT[freedom - 1]), 200_001)  # t = tan(angle), so that tails are finite
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = constant * (1 + np.tan(angle) ** 2 / freedom) ** (-(freedom + 1) / 2) / np.cos(angle) ** 2
    area = ((density[1:] + density[:-1]) / 2 * np.diff(angle)).sum()
    assert 0.5 + area == pytest.approx(0.975, abs=1e-5)


def test_intervals():
    values = [0.71, 0.74, 0.72]
    found = Interval.of(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half == pytest.approx(4.3027 * np.std(values, ddof=1) / math.sqrt(3))
    assert found.text(".4f") == f"{np.mean(values):.4f} ±{found.half:.4f}"
    assert (found * -100).half == pytest.approx(100 * found.half)
    assert Interval.of([0.5]) == Interval(0.5, None) and Interval(0.5).text("+.2f") == "+0.50"
    assert Interval.of([]) is Interval.of([0.5, None]) is None
    assert Interval.of([1.0, 2.0] * 50).half == pytest.approx(2.0 * np.std([1.0, 2.0] * 50, ddof=1) / 10, rel=0.03)


def test_what_a_seed_does_to_all_is_no_part_of_gains():
    base, own = [0.9, 1.0, 0.8], [0.81, 0.9, 0.72]
    assert gains(base, own) == pytest.approx([0.1] * 3)
    assert Interval.of(gains(base, own)).half < 1e-12
    assert Interval.of(own).half > 0.1
    assert gains([None, 1.0], [0.5, None]) == [None, None] and gains([1.0, 0.8], [0.9]) == pytest.approx([0.1])
    assert differences([0.9, 1.0], [0.8, 1.1]) == pytest.approx([-0.1, 0.1])
