"""How operators read packed SIDs: digits of int64 words, and neighbouring digits joined into chunks.

A linear map of a SID's digits is a sum of one row per digit; joined digits (5 trits have 243 values, one byte) index one
table of all their combinations, so that it is a sum of far fewer rows, of a table small enough for cache.

The chunks of a negative word have no value, and choose no row: that is how a missing SID adds nothing to any sum.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK_LIMIT = 256  # values of a joined chunk; a digit of more is a chunk of its own


@dataclass(frozen=True)
class CodeLayout:
    """Digits, or joined chunks of them, and the words they stand in, most significant first.

    Args:
        radices: number of values of each.
        words: index of the int64 word of each; ascending.

    Attributes:
        divisors: a chunk's value in its word is ``word // divisor % radix``. Made at once: Dynamo cannot trace a
            ``cached_property``, which holds a lock before Python 3.12.
    """

    radices: tuple[int, ...]
    words: tuple[int, ...]
    divisors: tuple[int, ...] = field(init=False, repr=False, compare=False)

    @property
    def num_values(self) -> int:
        """V, the sum of all radices: rows of a table of one row per digit and value."""
        return sum(self.radices)

    def __post_init__(self) -> None:
        divisors, product, word = [], 1, -1
        for own_radix, own_word in zip(reversed(self.radices), reversed(self.words), strict=True):
            product = product if own_word == word else 1
            divisors.append(product)
            product, word = product * own_radix, own_word
        object.__setattr__(self, "divisors", tuple(reversed(divisors)))

    def join(self, limit: int = CHUNK_LIMIT) -> "Joined":
        """Neighbouring digits of a word as one chunk, as long as it has at most ``limit`` values."""
        radices: list[int] = []
        words: list[int] = []
        counts: list[int] = []
        for radix, word in zip(self.radices, self.words, strict=True):
            if words and words[-1] == word and radices[-1] * radix <= limit:
                radices[-1] *= radix
                counts[-1] += 1
            else:
                radices.append(radix)
                words.append(word)
                counts.append(1)
        return Joined(self, CodeLayout(tuple(radices), tuple(words)), tuple(counts))

    def values(self, words_NW: Tensor) -> Tensor:
        """Value of each chunk, int64 [N, C], of packed SIDs int64 [N, W].

        Not checked: a word out of range gives the values of some other SID. See ``rows`` for words that may be negative.
        """
        divisor_C = torch.tensor(self.divisors, device=words_NW.device)
        radix_C = torch.tensor(self.radices, device=words_NW.device)
        return words_NW[:, list(self.words)].div(divisor_C, rounding_mode="floor") % radix_C

    def rows(self, words_NW: Tensor) -> Tensor:
        """The row that each chunk chooses of a table of all chunks' rows, int64 [N, C]; ``num_values`` where it chooses none.

        See ``with_no_row``; else as ``values``.
        """
        first_C = torch.tensor([0, *self.radices[:-1]], device=words_NW.device).cumsum(0)
        is_negative_NC = words_NW[:, list(self.words)] < 0
        return (self.values(words_NW) + first_C).masked_fill(is_negative_NC, self.num_values)


@dataclass(frozen=True)
class Joined:
    """Digits joined into chunks.

    Args:
        digits: before.
        chunks: after.
        counts: digits of each chunk.
    """

    digits: CodeLayout
    chunks: CodeLayout
    counts: tuple[int, ...]

    def chunks_of_first(self, digits: int) -> int:
        """How many chunks the first so many digits make up.

        Raises:
            ValueError: if there are not so many, or one of the chunks has others, too.
        """
        if digits == 0:
            return 0
        for chunks, joined in enumerate(itertools.accumulate(self.counts), start=1):
            if joined == digits:
                return chunks
        raise ValueError(
            f"the first {digits} of {len(self.digits.radices)} digits do not end where a chunk of them does"
        )

    def expand(self, values_VH: Tensor) -> Tensor:
        """Rows of chunks from rows of digits: a chunk's row is the sum of its digits'.

        Args:
            values_VH: [..., V, H], a row per digit and value.

        Returns:
            [..., R, H], a row per chunk and value.
        """
        tables, first = iter(values_VH.split(list(self.digits.radices), dim=-2)), []
        for count in self.counts:
            rows = next(tables)
            for _ in range(count - 1):
                # a later digit is less significant: every earlier combination with each of its values
                rows = (rows.unsqueeze(-2) + next(tables).unsqueeze(-3)).flatten(-3, -2)
            first.append(rows)
        return torch.cat(first, dim=-2)

    def sum_out(self, rows_RH: Tensor) -> Tensor:
        """The adjoint of ``expand``: sums by digit and value [..., V, H] of sums by chunk and value [..., R, H]."""
        radices, sums = iter(self.digits.radices), []
        for rows, count in zip(rows_RH.split(list(self.chunks.radices), dim=-2), self.counts, strict=True):
            own = [next(radices) for _ in range(count)]
            rows = rows.unflatten(-2, own)
            for j in range(count):
                others = [rows.ndim - 1 - count + i for i in range(count) if i != j]
                sums.append(rows.sum(others) if others else rows)
        return torch.cat(sums, dim=-2)


def with_no_row(table_RH: Tensor, num_values: int) -> Tensor:
    """A table [..., R, H] with one row more, of zeros, after ``num_values``: what chunks of negative words choose."""
    before, after = table_RH[..., :num_values, :], table_RH[..., num_values:, :]
    return torch.cat([before, torch.zeros_like(table_RH[..., :1, :]), after], dim=-2)


def digit_rows(tables: Sequence[Tensor], layout: CodeLayout) -> Tensor:
    """Tables of each digit, [radix, D], as one of all rows, [V, D].

    Raises:
        ValueError: if there is not one table per digit, of its radix.
    """
    rows = [table.shape[0] for table in tables]
    if rows != list(layout.radices):
        raise ValueError(f"digit tables have {rows} rows, expected {list(layout.radices)}")
    return torch.cat(list(tables))
