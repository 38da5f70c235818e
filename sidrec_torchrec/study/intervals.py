"""Means over seeds with their 95% intervals, and what arms are compared by: differences paired by seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

# 0.975 quantiles of Student's t at 1, 2, ... degrees of freedom; beyond them the last one, which is 0.09 above the normal's at most.
_STUDENT = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)

Values = Sequence[float | None]


@dataclass(frozen=True)
class Interval:
    """A mean and how sure it is.

    Args:
        mean: of the values.
        half: half of the width of its 95% interval (Student's); None for a single value, which says nothing of it.
    """

    mean: float
    half: float | None = None

    @staticmethod
    def of(values: Values) -> "Interval | None":
        """Of one value per seed; None where there are none, or one of them is not defined."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        if len(known) == 1:
            return Interval(known[0])
        quantile = _STUDENT[min(len(known) - 1, len(_STUDENT)) - 1]
        return Interval(fmean(known), quantile * stdev(known) / math.sqrt(len(known)))

    def __mul__(self, factor: float) -> "Interval":
        return Interval(factor * self.mean, None if self.half is None else abs(factor) * self.half)

    def text(self, format_spec: str) -> str:
        """``+1.20 ±0.31`` for ``+.2f``."""
        half = "" if self.half is None else f" ±{self.half:{format_spec.lstrip('+')}}"
        return f"{self.mean:{format_spec}}{half}"


def gains(base: Values, own: Values) -> list[float | None]:
    """(base - own) / base, seed by seed, for the seeds that both have; None where one of them is not defined."""
    return [None if b is None or o is None or not b else (b - o) / b for b, o in zip(base, own, strict=False)]


def differences(one: Values, other: Values) -> list[float | None]:
    """other - one, seed by seed, as ``gains``."""
    return [None if a is None or b is None else b - a for a, b in zip(one, other, strict=False)]
