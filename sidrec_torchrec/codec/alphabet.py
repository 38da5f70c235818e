"""Alphabets: the values a digit can take, and the vectors they stand for.

There are two kinds. A one-hot digit is one of K free codewords. Every other digit is a point of a grid: ``power``
coordinates, each at one of a few equally spaced levels around 0, which a search settles one after another. The digit of
several coordinates counts them in mixed radix, the first coordinate most significant.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sidrec_torchrec.codec.choices import Choice, Codewords, Coordinate
from sidrec_torchrec.registry import Registry

MAX_RADIX = 1 << 15  # digits travel as int16


class Alphabet(ABC):
    """What one digit of a SID can be. Registered by name in ``ALPHABETS``, it can be written in a list of stages.

    Attributes:
        has_count, has_power: whether its text form takes ``:K`` and ``^m``; the constructor takes them in this order.
    """

    has_count: ClassVar[bool] = False
    has_power: ClassVar[bool] = True

    @property
    @abstractmethod
    def radix(self) -> int:
        """Number of values; a digit lies in [0, radix). 0 for a real stage, which has no digits."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Floats one digit expands to, and rows of the basis it weighs."""

    @abstractmethod
    def values(self) -> Tensor:
        """float32 [radix, width]; row v is the vector digit v stands for."""

    @abstractmethod
    def choices(self) -> tuple[Choice, ...]:
        """What a search decides for one digit, in order; most significant first."""

    @abstractmethod
    def __str__(self) -> str:
        """Text form, as in ``parse_stages``."""


ALPHABETS: Registry[type[Alphabet]] = Registry("alphabet")


@ALPHABETS.register("onehot")
@dataclass(frozen=True)
class OneHot(Alphabet):
    """One of ``size`` free codewords: a stage of residual (vector) quantization.

    Args:
        size: number of codewords, 2 to 32,768.

    Raises:
        ValueError: on another size.
    """

    has_count = True
    has_power = False

    size: int

    def __post_init__(self) -> None:
        if not 2 <= self.size <= MAX_RADIX:
            raise ValueError(f"a one-hot alphabet has 2 to {MAX_RADIX} values, got {self.size}")

    @property
    def radix(self) -> int:
        return self.size

    @property
    def width(self) -> int:
        return self.size

    def values(self) -> Tensor:
        return torch.eye(self.size)

    def choices(self) -> tuple[Choice, ...]:
        return (Codewords(self.size),)

    def __str__(self) -> str:
        return f"onehot:{self.size}"


class Grid(Alphabet):
    """``power`` coordinates, each one of ``count`` levels, ``step`` apart and centred at 0.

    Attributes:
        count: levels of a coordinate; 0 if it can be any number.
        step: distance between neighbouring levels.
        power: number of coordinates.
    """

    count: int
    step: float
    power: int

    def __post_init__(self) -> None:
        if self.power < 1:
            raise ValueError(f"a {self.name} alphabet has at least 1 coordinate, got {self.power}")
        if self.count and (self.power > 15 or self.radix > MAX_RADIX):
            raise ValueError(f"a digit has at most {MAX_RADIX} values, {self} has more")

    @property
    def radix(self) -> int:
        return self.count**self.power

    @property
    def width(self) -> int:
        return self.power

    @property
    @abstractmethod
    def name(self) -> str:
        """Text form of one coordinate."""

    @property
    def lowest(self) -> float:
        """The least level of a coordinate."""
        return -self.step * (self.count - 1) / 2 if self.count else 0.0

    def values(self) -> Tensor:
        if not self.count:
            raise ValueError(f"a '{self}' stage has no digits: its coordinates are numbers")
        level_K = self.lowest + self.step * torch.arange(self.count, dtype=torch.float32)
        return torch.cartesian_prod(*[level_K] * self.power).view(self.radix, self.power)

    def choices(self) -> tuple[Choice, ...]:
        return (Coordinate(self.count, self.step, self.lowest),) * self.power

    def __str__(self) -> str:
        return self.name if self.power == 1 else f"{self.name}^{self.power}"


@ALPHABETS.register("ternary")
@dataclass(frozen=True)
class Ternary(Grid):
    """-1, 0 or 1, as digits 0, 1, 2: how much of one basis row an item has. ``Ternary(m)``: m rows under one digit.

    Args:
        power: number of coordinates, 1 to 9.

    Raises:
        ValueError: on another number.
    """

    power: int = 1
    name = "ternary"
    count = 3
    step = 1.0


@ALPHABETS.register("signs")
@dataclass(frozen=True)
class Signs(Grid):
    """-1 or 1, as digits 0 and 1: binary codes, as lookup-free quantization has them (Yu et al. 2023).

    Args:
        power: number of coordinates, 1 to 15.

    Raises:
        ValueError: on another number.
    """

    power: int = 1
    name = "signs"
    count = 2
    step = 2.0


@ALPHABETS.register("levels")
@dataclass(frozen=True)
class Levels(Grid):
    """``count`` levels 1 apart around 0, e.g. -1.5, -0.5, 0.5, 1.5: the rounding of FSQ (Mentzer et al. 2023).

    Args:
        count: levels of a coordinate, at least 2.
        power: number of coordinates; ``count ** power`` is at most 32,768.

    Raises:
        ValueError: on values out of range.
    """

    has_count = True

    count: int
    power: int = 1
    step = 1.0

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"a coordinate has at least 2 levels, got {self.count}")
        super().__post_init__()

    @property
    def name(self) -> str:
        return f"levels:{self.count}"


@ALPHABETS.register("real")
@dataclass(frozen=True)
class Real(Grid):
    """Any numbers: a stage of principal component analysis. It has codes (``DPCA.codes``) but no digits, so no SID.

    Args:
        power: number of coordinates, at least 1.

    Raises:
        ValueError: on another number.
    """

    power: int = 1
    name = "real"
    count = 0
    step = 1.0


_FORMS = "'ternary', 'signs', 'levels:K', 'real', each also '^m' for m coordinates, or 'onehot:K'; then '*n' to repeat"
_MAX_STAGES = (
    1024  # of a list that is written down; a SID of so many digits would be larger than the vectors it stands for
)
_PATTERN = re.compile(r"([a-z_-]+)(?::([0-9]+))?(?:\^([1-9][0-9]*))?(?:\*([1-9][0-9]*))?")


def parse_stages(text: str) -> tuple[Alphabet, ...]:
    """Alphabets from text: ``"onehot:256,ternary*20"`` is one one-hot digit of 256 values, then twenty ternary ones.

    Raises:
        ValueError: on anything else, shows the part and the forms expected; on more than 1,024 stages.
    """
    stages: list[Alphabet] = []
    for part in map(str.strip, text.split(",")):
        match = _PATTERN.fullmatch(part)
        kind = ALPHABETS[match[1]] if match and match[1] in ALPHABETS else None
        if not match or not kind or bool(match[2]) != kind.has_count or (match[3] and not kind.has_power):
            raise ValueError(
                f"stages '{text}': cannot read '{part}'; write like 'ternary*25' or 'onehot:256,ternary*20'. "
                f"A part is {_FORMS}"
            )
        numbers = [int(number) for number in (match[2], match[3]) if number]
        try:
            alphabet = kind(*numbers)
        except ValueError as error:
            raise ValueError(f"stages '{text}': '{part}': {error}") from None
        count = len(stages) + int(match[4] or 1)
        if count > _MAX_STAGES:
            raise ValueError(f"stages '{text}': {count:,} stages; there may be {_MAX_STAGES:,} at most")
        stages += [alphabet] * (count - len(stages))
    return tuple(stages)


def format_stages(stages: tuple[Alphabet, ...]) -> str:
    """The shortest text that ``parse_stages`` reads back as ``stages``."""
    runs: list[list] = []
    for stage in stages:
        if runs and runs[-1][0] == stage:
            runs[-1][1] += 1
        else:
            runs.append([stage, 1])
    return ",".join(f"{stage}*{count}" if count > 1 else str(stage) for stage, count in runs)
