"""Alphabets: the values a digit can take, and the vectors they stand for."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_RADIX = 1 << 15  # digits travel as int16


class Alphabet(ABC):
    """What one digit of a SID can be.

    Attributes:
        radix: number of values; a digit lies in [0, radix).
        width: floats one digit expands to.
    """

    radix: int
    width: int

    @abstractmethod
    def values(self) -> Tensor:
        """float32 [radix, width]; row v is the vector digit v stands for."""

    @abstractmethod
    def __str__(self) -> str:
        """Text form, as in ``parse_stages``."""


@dataclass(frozen=True)
class Ternary(Alphabet):
    """-1, 0 or 1, as digits 0, 1, 2: how much of one basis vector an item has."""

    radix = 3
    width = 1

    def values(self) -> Tensor:
        return torch.tensor([[-1.0], [0.0], [1.0]])

    def __str__(self) -> str:
        return "ternary"


@dataclass(frozen=True)
class OneHot(Alphabet):
    """One of ``size`` free codewords: a stage of residual (vector) quantization.

    Args:
        size: number of codewords, 2 to 32,768.

    Raises:
        ValueError: on another size.
    """

    size: int

    def __post_init__(self) -> None:
        if not 2 <= self.size <= MAX_RADIX:
            raise ValueError(f"a one-hot alphabet has 2 to {MAX_RADIX} values, got {self.size}")

    @property
    def radix(self) -> int:  # type: ignore[override]
        return self.size

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.size

    def values(self) -> Tensor:
        return torch.eye(self.size)

    def __str__(self) -> str:
        return f"onehot:{self.size}"


def parse_stages(text: str) -> tuple[Alphabet, ...]:
    """Alphabets from text: ``"onehot:256,ternary*20"`` is one one-hot digit of 256 values, then twenty ternary ones.

    Raises:
        ValueError: on anything else; shows the part and the form expected.
    """
    stages: list[Alphabet] = []
    for part in map(str.strip, text.split(",")):
        match = re.fullmatch(r"(ternary|onehot:([0-9]+))(?:\*([1-9][0-9]*))?", part)
        if match is None:
            raise ValueError(
                f"stages '{text}': cannot read '{part}'; write like 'ternary*25' or 'onehot:256,ternary*20'"
            )
        try:
            alphabet = OneHot(int(match[2])) if match[2] else Ternary()
        except ValueError as error:
            raise ValueError(f"stages '{text}': '{part}': {error}") from None
        stages += [alphabet] * int(match[3] or 1)
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
