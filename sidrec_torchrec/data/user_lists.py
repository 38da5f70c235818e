"""Features of users that are lists, such as genres one likes: of each user the codes of the values, jagged.

A value that stands twice in a list counts once, one that the vocabulary does not have is left out, and no list is the empty one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.features import Feature
from sidrec_torchrec.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Lists:
    """The lists of R users in one feature.

    Args:
        code_V: int16, the codes of all lists, one list after another; none is 0, and within a list they rise.
        offset_R1: int64 [R + 1], where each list begins; the last is V.
    """

    code_V: np.ndarray
    offset_R1: np.ndarray

    def __len__(self) -> int:
        return len(self.offset_R1) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """The codes of one list."""
        return self.code_V[self.offset_R1[row] : self.offset_R1[row + 1]]

    @staticmethod
    def encode(feature: Feature, column: pa.Array) -> "Lists":
        """Those of R users.

        Raises:
            DataError: if the column holds something else than it did in training; names it.
        """
        row_V, class_V = list_classes(feature, column)
        known_V = class_V >= 0
        return Lists.of_lengths(
            (class_V[known_V] + 1).astype(np.int16), np.bincount(row_V[known_V], minlength=len(column))
        )

    @staticmethod
    def of_lengths(code_V: np.ndarray, length_R: np.ndarray) -> "Lists":
        """Lists of these lengths, one after another."""
        return Lists(code_V, np.concatenate([[0], np.cumsum(length_R, dtype=np.int64)]))

    @staticmethod
    def joined(parts: Sequence["Lists"]) -> "Lists":
        """Lists one after another."""
        lengths = [np.diff(part.offset_R1) for part in parts]
        return Lists.of_lengths(np.concatenate([part.code_V for part in parts]), np.concatenate(lengths))

    @staticmethod
    def empty(count: int) -> "Lists":
        """Lists of nothing."""
        return Lists(np.zeros(0, np.int16), np.zeros(count + 1, np.int64))

    def take(self, row_S: np.ndarray) -> "Lists":
        """The lists of these rows; -1 is the last."""
        begin_S, end_S = self.offset_R1[:-1][row_S], self.offset_R1[1:][row_S]
        length_S = end_S - begin_S
        first_S = np.cumsum(length_S) - length_S
        return Lists.of_lengths(
            self.code_V[np.arange(length_S.sum()) + np.repeat(begin_S - first_S, length_S)], length_S
        )

    def to_arrow(self) -> pa.ListArray:
        """As a column of int16 lists."""
        return pa.ListArray.from_arrays(pa.array(self.offset_R1.astype(np.int32)), pa.array(self.code_V, pa.int16()))

    @staticmethod
    def of_arrow(column: pa.ChunkedArray) -> "Lists":
        """Of what ``to_arrow`` gave."""
        parts = [chunk.flatten().to_numpy() for chunk in column.chunks]
        lengths = [chunk.value_lengths().to_numpy() for chunk in column.chunks]
        return Lists.of_lengths(
            np.concatenate([np.zeros(0, np.int16), *parts]), np.concatenate([np.zeros(0, np.int64), *lengths])
        )


def list_classes(feature: Feature, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """As ``Vocabulary.encode_lists`` with the feature's values; lists that are all empty may be of any type."""
    if pa.types.is_list(column.type) and pa.types.is_null(column.type.value_type):  # of a table made from Python's
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return Vocabulary(feature.name, feature.values, multi_label=True).encode_lists(column)  # type: ignore[arg-type]


def encode_users(features: Sequence[Feature], columns: Mapping[str, pa.Array]) -> tuple[list[np.ndarray], list[Lists]]:
    """Codes of some users: int16 [R] for each feature of one value a user; and the lists of each that is one.

    Args:
        features: of users; the lists come last.
        columns: of the users, by name.

    Raises:
        DataError: if a column holds something else than it did in training; names it.
    """
    codes = [feature.encode(columns[feature.name]) for feature in features if not feature.is_list]
    return codes, [Lists.encode(feature, columns[feature.name]) for feature in features if feature.is_list]


def list_names(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Of user features, given by ``Feature.codes_json``, those that are lists."""
    return tuple(name for name, kept in values.items() if Feature.of_codes(name, kept).is_list)
