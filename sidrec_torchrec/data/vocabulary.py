"""The classes of a categorical column, and labels made with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.columns import is_categorical, is_multi_label, plain_type
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.training.progress import say

MAX_CLASSES = 10_000


class HasTable(Protocol):
    """Items or Users: anything read from a ParquetTable."""

    @property
    def table(self) -> ParquetTable: ...


@dataclass(frozen=True)
class Vocabulary:
    """The sorted distinct values of a categorical column; the class of a value is its place among them.

    Args:
        column: name of the column.
        values: its values, sorted; all strings or all integers.
        multi_label: whether a row holds a list of values.
    """

    column: str
    values: tuple[str, ...] | tuple[int, ...]
    multi_label: bool

    def __len__(self) -> int:
        return len(self.values)

    @staticmethod
    def scan(data: HasTable, column: str, *, max_classes: int = MAX_CLASSES) -> "Vocabulary":
        """Collects a column's values in one pass; holds one batch and the distinct values.

        Args:
            data: opened ``Items`` or ``Users``.
            column: a categorical column.
            max_classes: more distinct values than this are an error: it is likely a text or an id.

        Raises:
            DataError: if the column is unknown, not categorical, without any value, or has too many of them.
        """
        table = data.table
        kind = table.type_of(column)
        if not is_categorical(kind):
            raise DataError(
                f"{table.path}: column '{column}' is {kind}; a categorical column holds strings, integers or lists of "
                "them"
            )
        values: set[Any] = set()
        for first_row, batch in table.batches([column], 1 << 16):
            try:
                values.update(pc.unique(pc.drop_null(_flat(batch.column(0))[0])).to_pylist())
            except UnicodeDecodeError as error:
                raise DataError(f"{table.at(column, first_row)} and after: a value is not UTF-8: {error}") from None
            if len(values) > max_classes:
                raise UnfitColumn(
                    f"{table.path}: column '{table.own_name(column)}' has more than {max_classes} distinct values; a category "
                    f"has at most that many: it is likely an id or a text"
                )
        if not values:
            raise UnfitColumn(f"{table.path}: column '{table.own_name(column)}' has no value in any row")
        return Vocabulary(column, tuple(sorted(values)), is_multi_label(kind))

    def encode(self, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Labels of some rows.

        Args:
            column: N values of the column, as in ``ItemBatch.targets``.

        Returns:
            Single-label: int64 [N], -1 where missing or not in the vocabulary. Multi-label: float32 [N, C] of zeros
            and ones; values not in the vocabulary are left out. And a mask, bool [N]: True where a row has a label.

        Raises:
            DataError: if the column does not hold what the vocabulary was made of.
        """
        self._check(column.type)
        flat, rows = _flat(column)
        value_set = pa.array(self.values, type=flat.type)
        labels = pc.fill_null(pc.index_in(flat, value_set=value_set, skip_nulls=True), -1)
        labels = labels.to_numpy(zero_copy_only=False).astype(np.int64)
        if not self.multi_label:
            return labels, labels >= 0
        hot_NC = np.zeros((len(column), len(self)), np.float32)
        known = labels >= 0
        hot_NC[rows[known], labels[known]] = 1.0
        return hot_NC, np.any(hot_NC, axis=1)

    def encode_lists(self, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """The distinct values of each row's list, without nulls; in memory as many as there are, however many classes.

        Args:
            column: N lists.

        Returns:
            The row of each, int64 [V], rising; and its class, int64 [V], rising within a row, -1 if not in the vocabulary.

        Raises:
            DataError: if the column does not hold what the vocabulary was made of.
        """
        self._check(column.type)
        flat, rows = _flat(column)
        coded = flat.dictionary_encode()
        found = pc.index_in(coded.dictionary, value_set=pa.array(self.values, type=flat.type))
        class_D = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        value_F = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)
        row_F, value_F = rows[value_F >= 0], value_F[value_F >= 0]
        row_V, value_V = np.divmod(np.unique(row_F * len(class_D) + value_F), max(len(class_D), 1))
        order = np.lexsort((class_D[value_V], row_V))
        return row_V[order], class_D[value_V[order]]

    def to_json(self) -> dict[str, Any]:
        """A JSON value ``from_json`` reads back."""
        return {"column": self.column, "values": list(self.values), "multi_label": self.multi_label}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Vocabulary":
        """The vocabulary ``to_json`` wrote."""
        return Vocabulary(value["column"], tuple(value["values"]), value["multi_label"])

    def _check(self, kind: pa.DataType) -> None:
        if is_categorical(kind) and is_multi_label(kind) == self.multi_label:
            is_text = pa.types.is_large_string(_plain_type(kind))
            if is_text == isinstance(self.values[0], str):
                return
        have = "lists of " * self.multi_label + ("strings" if isinstance(self.values[0], str) else "integers")
        raise DataError(f"column '{self.column}' is {kind}; its vocabulary was made from {have}")


class UnfitColumn(DataError):
    """A categorical column that has too many values, or none."""


def scan_vocabularies(
    data: HasTable, columns: Sequence[str], *, max_classes: int = MAX_CLASSES, skip_large: bool = False
) -> dict[str, Vocabulary]:
    """A ``Vocabulary`` by column; see ``Vocabulary.scan``.

    Args:
        data: opened ``Items`` or ``Users``.
        columns: to scan.
        max_classes: most values of one.
        skip_large: whether to leave out columns of more, or without a value, instead of refusing them.
    """
    vocabularies = {}
    for column in columns:
        try:
            vocabularies[column] = Vocabulary.scan(data, column, max_classes=max_classes)
        except UnfitColumn as error:
            if not skip_large:
                raise
            say(f"{error}: left out")
    return vocabularies


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """large_string or int64: what the values of a categorical column are compared as."""
    kind = plain_type(kind.value_type if is_multi_label(kind) else kind)
    return pa.large_string() if kind == pa.string() else pa.int64()


def _flat(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The values of a column one after another, and the row of each (int64)."""
    plain = _plain_type(column.type)
    if not is_multi_label(column.type):
        return _cast(column, plain), np.arange(len(column))
    lengths_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(len(column)), lengths_N)  # not those beneath a null, as list_parent_indices has them
    return _cast(pc.list_flatten(column), plain), rows


def _cast(values: pa.Array, plain: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    return values.view(plain) if values.type == pa.uint64() else pc.cast(values, plain)  # hashes fill all 64 bits
