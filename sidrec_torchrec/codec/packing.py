"""Packed SIDs: the digits of an item in one or more int64 words.

The format (docs/sid_format.md): digits fill a word from the most significant on, as long as the word stays below 2^63;
then the next word begins. Within a word of digits d_1 .. d_n with radices r_1 .. r_n,

    word = ((d_1 r_2 + d_2) r_3 + d_3) ... r_n + d_n

so words sort as digits do, and the prefix of k digits is the word divided by r_{k+1} ... r_n, rounded down.

An event whose item has no SID, say one that the catalogue has no more, has ``NO_SID`` in every word.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import Alphabet, format_stages, parse_stages
from sidrec_torchrec.ops.layout import CodeLayout

IntArray = TypeVar("IntArray", Tensor, np.ndarray)

NO_SID = -1
"""What every word of a missing SID is; no packed SID has a negative word. It is read as an item of which nothing is known: its
vector is zero, and so is what its digits add to any score."""

_WORD_LIMIT = 1 << 63


@dataclass(frozen=True)
class SIDSpec:
    """What a SID is made of: everything but the vectors behind it.

    Args:
        stages: alphabet of each digit, coarse to fine.
        fingerprint: identifies the codec the SIDs belong to.

    Raises:
        ValueError: without digits, or on an alphabet without finitely many values, such as the real numbers.
    """

    stages: tuple[Alphabet, ...]
    fingerprint: str

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("a SID needs at least one digit")
        for stage in self.stages:
            if stage.radix < 1:
                raise ValueError(f"'{stage}' has no digits, so it cannot be part of a SID")

    @cached_property
    def radices(self) -> tuple[int, ...]:
        """Number of values of each digit."""
        return tuple(stage.radix for stage in self.stages)

    @property
    def num_digits(self) -> int:
        """L."""
        return len(self.stages)

    @property
    def bits(self) -> float:
        """Information a SID can hold."""
        return sum(math.log2(radix) for radix in self.radices)

    @property
    def num_words(self) -> int:
        """W, the int64 words of a packed SID."""
        return len(self._words)

    @cached_property
    def _words(self) -> tuple[range, ...]:
        """Digits of each word."""
        words, first, product = [], 0, 1
        for digit, radix in enumerate(self.radices):
            if product * radix > _WORD_LIMIT:
                words.append(range(first, digit))
                first, product = digit, 1
            product *= radix
        return (*words, range(first, self.num_digits))

    @cached_property
    def word_limits(self) -> tuple[int, ...]:
        """Per word, the number of values it can take."""
        return tuple(math.prod(self.radices[word.start : word.stop]) for word in self._words)

    def pack(self, digits_NL: IntArray) -> IntArray:
        """Digits as words.

        Args:
            digits_NL: integers [N, L], digit j in [0, radix_j); a tensor or a NumPy array.

        Returns:
            int64 [N, W], of the same kind.

        Raises:
            ValueError: on another width, on numbers with a fraction, or on a digit out of range; names its row and digit.
        """
        if isinstance(digits_NL, np.ndarray):
            return self.pack(_tensor(digits_NL)).numpy()
        if digits_NL.ndim != 2 or digits_NL.shape[1] != self.num_digits or digits_NL.is_floating_point():
            raise ValueError(
                f"digits have shape {tuple(digits_NL.shape)} and dtype {digits_NL.dtype}, expected integers "
                f"[N, {self.num_digits}]"
            )
        digits_NL = digits_NL.long()
        radices_L = torch.tensor(self.radices, device=digits_NL.device)
        wrong_NL = (digits_NL < 0) | (digits_NL >= radices_L)
        if wrong_NL.any():
            row, digit = wrong_NL.nonzero()[0].tolist()
            raise ValueError(
                f"row {row}, digit {digit} is {int(digits_NL[row, digit])}, expected 0 to {self.radices[digit] - 1}"
            )
        scaled_NL = digits_NL * torch.tensor(self.layout.divisors, device=digits_NL.device)
        return torch.stack([scaled_NL[:, word.start : word.stop].sum(1) for word in self._words], dim=1)

    def unpack(self, words_NW: IntArray) -> IntArray:
        """Words as digits.

        Args:
            words_NW: int64 [N, W]; a tensor or a NumPy array.

        Returns:
            int16 [N, L], of the same kind.

        Raises:
            ValueError: on another width or a word that no digits give, as those of a missing SID; names its row.
        """
        if isinstance(words_NW, np.ndarray):
            return self.unpack(_tensor(words_NW)).numpy()
        self.check_words(words_NW, may_miss=False)
        return self.layout.values(words_NW).to(torch.int16)

    def check_words(self, words_NW: IntArray, *, may_miss: bool = True) -> None:
        """Refuses words that are not packed SIDs of this spec.

        Args:
            words_NW: int64 [N, W]; a tensor or a NumPy array.
            may_miss: whether SIDs may be missing: rows whose words are all ``NO_SID``.

        Raises:
            ValueError: on another width or dtype, or a word out of range; names its row.
        """
        if isinstance(words_NW, np.ndarray):
            return self.check_words(_tensor(words_NW), may_miss=may_miss)
        if words_NW.ndim != 2 or words_NW.shape[1] != self.num_words or words_NW.dtype != torch.int64:
            raise ValueError(
                f"words have shape {tuple(words_NW.shape)} and dtype {words_NW.dtype}, expected int64 "
                f"[N, {self.num_words}]"
            )
        last_W = torch.tensor([limit - 1 for limit in self.word_limits], device=words_NW.device)
        wrong_NW = wrong_words(words_NW, last_W, may_miss)
        if torch.compiler.is_compiling():  # a graph cannot look at values
            torch._assert_async(~wrong_NW.any(), f"a word is no packed SID of {format_stages(self.stages)}")
        elif wrong_NW.any():
            row, word = wrong_NW.nonzero()[0].tolist()
            raise ValueError(
                f"row {row}, word {word} is {int(words_NW[row, word])}, no packed SID of {format_stages(self.stages)}"
            )

    @cached_property
    def layout(self) -> CodeLayout:
        """Where each digit stands in the words, as operators read them."""
        return CodeLayout(self.radices, tuple(w for w, digits in enumerate(self._words) for _ in digits))

    def to_json(self) -> dict[str, Any]:
        """A JSON value ``from_json`` reads back."""
        return {"stages": format_stages(self.stages), "fingerprint": self.fingerprint}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "SIDSpec":
        """The spec ``to_json`` wrote."""
        return SIDSpec(parse_stages(value["stages"]), value["fingerprint"])


def is_missing(words_NW: Tensor) -> Tensor:
    """Which SIDs are missing, bool [N]: all their words are ``NO_SID``."""
    return (words_NW == NO_SID).all(1)


def wrong_words(words_NW: Tensor, last_W: Tensor, may_miss: bool) -> Tensor:
    """Which words no packed SID has, bool [N, W].

    Args:
        words_NW: int64.
        last_W: int64, the greatest value of each word.
        may_miss: whether SIDs may be missing.
    """
    wrong_NW = (words_NW < 0) | (words_NW > last_W)
    return wrong_NW & ~is_missing(words_NW).unsqueeze(1) if may_miss else wrong_NW


def word_names(feature: str, num_words: int) -> list[str]:
    """Names of a feature's words, as Parquet columns and KJT keys: ``f``, or ``f_0``, ``f_1``, ... if there are more."""
    return [feature] if num_words == 1 else [f"{feature}_{word}" for word in range(num_words)]


def _tensor(array: np.ndarray) -> Tensor:
    """The array's own memory, so that both kinds run the same code; a copy where torch cannot share (read-only, turned)."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
