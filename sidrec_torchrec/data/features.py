"""Features: columns of events and items whose values become codes, which travel beside the item's own SID.

A category's codes are its values in training; a dense column is cut into buckets at quantiles of its training values. Code 0
is a value that is missing, or that training does not have.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sidrec_torchrec.codec.alphabet import MAX_RADIX
from sidrec_torchrec.data.columns import is_categorical, is_list, is_number
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.tasks import MAX_TASKS, num_actions
from sidrec_torchrec.data.vocabulary import HasTable, Vocabulary
from sidrec_torchrec.errors import DataError, SidrecError

BUCKETS = 16  # of a dense feature, unless it says otherwise
_SAMPLE = 1 << 20  # values of a dense feature, about, whose quantiles are taken


@dataclass(frozen=True)
class FeatureName:
    """A feature as it is named: ``device``, ``hour:category``, ``dwell:dense`` or ``dwell:dense:64``.

    Args:
        column: ours.
        kind: what it is; "" for what its type says: floats are dense, all else is a category.
        buckets: of a dense one.
    """

    column: str
    kind: Literal["", "category", "dense"] = ""
    buckets: int = BUCKETS

    @staticmethod
    def parse(text: str) -> "FeatureName":
        """What ``text`` names.

        Raises:
            ValueError: if it is of another form.
        """
        column, *options = text.split(":")
        match options:
            case []:
                return FeatureName(column)
            case ["category"]:
                return FeatureName(column, "category")
            case ["dense"]:
                return FeatureName(column, "dense")
            case ["dense", number] if number.isdigit() and 2 <= int(number) < MAX_RADIX:
                return FeatureName(column, "dense", int(number))
        raise ValueError(
            f"'{text}' is no feature: write its column, and perhaps what it is: hour:category, dwell:dense, or "
            f"dwell:dense:64 for 64 buckets (2 to {MAX_RADIX - 1})"
        )

    def is_dense(self, table: ParquetTable, *, what: str = "feature", may_be_list: bool = False) -> bool:
        """Whether it is cut into buckets.

        Args:
            table: that has the column.
            what: it is called, if it is missing.
            may_be_list: whether a category may have several values a row.

        Raises:
            DataError: if the column is missing, or cannot be what it is named as; names file and column.
        """
        kind = table.type_of(self.column, what=what)
        may_be_category = is_categorical(kind) and not is_list(kind)
        if may_be_list and is_list(kind) and self.kind != "dense":
            if is_categorical(kind) or pa.types.is_null(kind.value_type):
                return False
            own = table.own_name(self.column)
            raise DataError(
                f"{table.path}: column '{own}' is {kind}; a list feature holds lists of strings, integers or booleans"
            )
        if self.kind == "dense" or (not self.kind and not may_be_category):
            if is_number(kind):
                return True
            able = "a dense feature holds numbers" if self.kind else "a feature holds numbers, strings or booleans"
        elif may_be_category:
            return False
        else:
            able = "a category holds strings, integers or booleans; leave ':category' out, and it is cut into buckets"
        raise DataError(f"{table.path}: column '{table.own_name(self.column)}' is {kind}; {able}, one a row")


@dataclass(frozen=True)
class Feature:
    """A feature with its codes.

    Args:
        name: its column.
        values: of a category, the values whose codes are 1, 2, ...
        bounds: of a dense one, where its buckets begin, but for the first; rising. None of a category.
        is_list: whether a row has several of the values; of users alone, see ``data.user_lists``.
    """

    name: str
    values: tuple[str | int, ...] = ()
    bounds: tuple[float, ...] | None = None
    is_list: bool = False

    @property
    def size(self) -> int:
        """Number of codes."""
        return 1 + len(self.values) if self.bounds is None else 2 + len(self.bounds)

    def encode(self, column: pa.Array) -> np.ndarray:
        """Codes, int16 [N], of N values.

        Raises:
            DataError: if the column holds something else than it did in training; names it.
        """
        if self.bounds is None:
            if pa.types.is_floating(column.type) and self.values and not isinstance(self.values[0], str):
                column = _whole(column)  # what pandas makes of integers with nulls
            vocabulary = Vocabulary(self.name, self.values, multi_label=False)  # type: ignore[arg-type]
            return (vocabulary.encode(column)[0] + 1).astype(np.int16)
        if not is_number(column.type):
            raise DataError(f"column '{self.name}' is {column.type}; it was made from numbers")
        return self.bucket(numbers(column))

    def bucket(self, value_N: np.ndarray) -> np.ndarray:
        """Codes of a dense feature, int16 [N], of float64 numbers, NaN where missing."""
        code_N = 1 + np.searchsorted(self.bounds or (), value_N, side="right")
        return np.where(np.isnan(value_N), 0, code_N).astype(np.int16)

    def to_json(self) -> dict[str, Any]:
        """A JSON value ``from_json`` reads back."""
        kept = self.codes_json()
        return {"name": self.name, **(kept if isinstance(kept, dict) else {"values": kept})}

    def codes_json(self) -> list | dict[str, list]:
        """A JSON value: its values, or its bounds by the name ``bounds``, or by ``lists_of`` the values of its lists."""
        if self.bounds is not None:
            return {"bounds": list(self.bounds)}
        return {"lists_of": list(self.values)} if self.is_list else list(self.values)

    @staticmethod
    def of_codes(name: str, value: list | dict[str, list]) -> "Feature":
        """The feature whose ``codes_json`` this was."""
        if not isinstance(value, dict):
            return Feature(name, tuple(value))
        if "bounds" in value:
            return Feature(name, bounds=tuple(value["bounds"]))
        return Feature(name, tuple(value["lists_of"]), is_list=True)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Feature":
        """The feature ``to_json`` wrote."""
        bounds = value.get("bounds")
        return Feature(value["name"], tuple(value.get("values", ())), None if bounds is None else tuple(bounds))


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a log's events have besides user, item, time and labels.

    Args:
        event: known when a target is asked for: they are read of the target, and of the events before it.
        item: of the event's item; read likewise.
        history: known only afterwards: they are read of the events before a target alone, never of the target.

    Raises:
        SidrecError: if there are so many that an event's codes do not fit into one word.
    """

    event: tuple[Feature, ...] = ()
    item: tuple[Feature, ...] = ()
    history: tuple[Feature, ...] = ()

    def __post_init__(self) -> None:
        if math.prod(self.sizes.values()) * num_actions(MAX_TASKS) > 1 << 63:
            sizes = ", ".join(f"{name} ({size} codes)" for name, size in self.sizes.items())
            raise SidrecError(
                f"an event's features must fit into 63 bits with its labels, those of {sizes} do not; leave some out, or cut "
                "dense ones into fewer buckets"
            )

    def __len__(self) -> int:
        return len(self.all)

    @property
    def all(self) -> tuple[Feature, ...]:
        """In the order of an event's codes: what is known of a target comes first."""
        return (*self.event, *self.item, *self.history)

    @property
    def known(self) -> tuple[Feature, ...]:
        """What is known of a target."""
        return (*self.event, *self.item)

    @property
    def of_log(self) -> tuple[Feature, ...]:
        """What the log says of events, as sequences have it."""
        return (*self.event, *self.history)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of codes by name, of ``all``; a column may be one of events and of items."""
        own = {feature.name: feature.size for feature in self.event}
        own |= {f"item.{feature.name}": feature.size for feature in self.item}
        return own | {feature.name: feature.size for feature in self.history}

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the log they are read from."""
        return tuple(feature.name for feature in self.of_log)

    @property
    def named(self) -> tuple[FeatureName, ...]:
        """The columns of the log, and what each is."""
        return tuple(FeatureName(f.name, "category" if f.bounds is None else "dense") for f in self.of_log)

    def to_json(self) -> dict[str, Any]:
        """A JSON value ``from_json`` reads back."""
        kinds = {"event": self.event, "item": self.item, "history": self.history}
        return {kind: [feature.to_json() for feature in features] for kind, features in kinds.items() if features}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Features":
        """The features ``to_json`` wrote."""
        return Features(**{kind: tuple(map(Feature.from_json, features)) for kind, features in value.items()})


@dataclass(frozen=True)
class Draft:
    """A feature before it is known which of its values training has.

    Args:
        named: as it is named.
        values: of a category, all that the file has; None of a dense one.
    """

    named: FeatureName
    values: tuple[str | int, ...] | None

    @staticmethod
    def of(data: HasTable, named: FeatureName) -> "Draft":
        """Reads a category's column once.

        Raises:
            DataError: as ``FeatureName.is_dense`` and ``Vocabulary.scan``.
        """
        is_dense = named.is_dense(data.table)
        return Draft(named, None if is_dense else Vocabulary.scan(data, named.column).values)

    def raw(self, column: pa.Array) -> np.ndarray:
        """float64 [N]: a number, or the place among ``values``; NaN where missing."""
        if self.values is None:
            return numbers(column)
        class_N = Vocabulary(self.named.column, self.values, multi_label=False).encode(column)[0]  # type: ignore[arg-type]
        return np.where(class_N < 0, np.nan, class_N)


class FeatureFit:
    """Makes features of drafts, from what training has of them; holds a sample of the numbers.

    Args:
        drafts: F of them.
        num_events: about how many will be added, to this one and those that are merged with it.
        seed: of the sample.
    """

    def __init__(self, drafts: Sequence[Draft], num_events: int, seed: int = 0) -> None:
        self._drafts = drafts
        self._share = min(1.0, _SAMPLE / max(num_events, 1))
        self._rng = np.random.default_rng(seed)
        self._seen = [np.zeros(len(draft.values or ()), bool) for draft in drafts]
        self._sample: list[list[np.ndarray]] = [[] for _ in drafts]

    def add(self, raw_NF: np.ndarray) -> None:
        """Takes events of training; see ``Draft.raw``."""
        chosen_N = slice(None) if self._share == 1 else self._rng.random(len(raw_NF)) < self._share
        for f, draft in enumerate(self._drafts):
            if draft.values is None:
                self._sample[f].append(raw_NF[chosen_N, f])
            else:
                raw_N = raw_NF[:, f]
                self._seen[f][raw_N[~np.isnan(raw_N)].astype(np.int64)] = True

    def merge(self, other: "FeatureFit") -> None:
        """Takes the events that another has taken, of the same drafts."""
        for own, its in zip(self._seen, other._seen, strict=True):
            own |= its
        for mine, theirs in zip(self._sample, other._sample, strict=True):
            mine += theirs

    def features(self) -> tuple[Feature, ...]:
        """One per draft.

        Raises:
            DataError: if training has no value of one.
        """
        made = []
        for draft, seen_V, sample in zip(self._drafts, self._seen, self._sample, strict=True):
            column = draft.named.column
            if draft.values is not None:
                values = tuple(value for value, seen in zip(draft.values, seen_V, strict=True) if seen)
                feature, is_empty = Feature(column, values), not values
            else:
                value_N = np.concatenate([*sample, np.zeros(0)])
                value_N = value_N[~np.isnan(value_N)]
                is_empty = not len(value_N)
                feature = Feature(column, bounds=() if is_empty else _bounds(value_N, draft.named.buckets))
            if is_empty:
                raise DataError(f"column '{column}' has no value in training; leave it out of the features")
            made.append(feature)
        return tuple(made)


class Coder:
    """From what drafts read to features' codes.

    Args:
        drafts: F of them.
        features: theirs; made of this log or of another.
    """

    def __init__(self, drafts: Sequence[Draft], features: Sequence[Feature]) -> None:
        self._features = features
        self._codes: list[np.ndarray | None] = []  # by place among a draft's values; the last is that of a missing one
        for draft, feature in zip(drafts, features, strict=True):
            code = {value: place for place, value in enumerate(feature.values, start=1)}
            codes = None if draft.values is None else np.array([*(code.get(v, 0) for v in draft.values), 0], np.int16)
            self._codes.append(codes)

    def __call__(self, raw_NF: np.ndarray) -> np.ndarray:
        """int16 [N, F] of ``Draft.raw``'s."""
        codes_NF = np.zeros(raw_NF.shape, np.int16)
        for f, (feature, codes) in enumerate(zip(self._features, self._codes, strict=True)):
            raw_N = raw_NF[:, f]
            codes_NF[:, f] = (
                feature.bucket(raw_N) if codes is None else codes[np.where(np.isnan(raw_N), -1, raw_N).astype(np.int64)]
            )
        return codes_NF


def encode(
    features: Sequence[Feature], columns: Mapping[str, pa.Array], num_rows: int, table: ParquetTable
) -> np.ndarray:
    """Codes of some rows of a table, int16 [N, F].

    Args:
        features: F of them.
        columns: of the rows, by name.
        num_rows: N.
        table: they are from.

    Raises:
        DataError: if a column holds something else than it did in training; names file and column.
    """
    try:
        codes = [feature.encode(columns[feature.name]) for feature in features]
    except DataError as error:
        raise DataError(f"{table.path}: {error}; keep the type it was trained with") from None
    return np.stack(codes, axis=1) if codes else np.zeros((num_rows, 0), np.int16)


def numbers(column: pa.Array) -> np.ndarray:
    """float64 [N], NaN where null."""
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _whole(column: pa.Array) -> pa.Array:
    """Numbers as integers; null where they are none."""
    value_N = numbers(column)
    is_whole_N = np.isfinite(value_N) & (value_N == np.floor(value_N)) & (np.abs(value_N) < 1 << 53)
    return pa.array(np.where(is_whole_N, value_N, 0).astype(np.int64), mask=~is_whole_N)


def _bounds(value_N: np.ndarray, buckets: int) -> tuple[float, ...]:
    """Quantiles, each a value that occurs; those that are equal once, and none that leaves the first bucket empty."""
    quantiles = np.quantile(value_N, np.arange(1, buckets) / buckets, method="inverted_cdf")
    bounds = np.unique(quantiles)
    return tuple(bounds[bounds > value_N.min()].tolist())
