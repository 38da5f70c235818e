"""A data folder: where its files are and what their columns are called."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sidrec_torchrec.data.features import FeatureName
from sidrec_torchrec.data.frames import is_frame, read_frame
from sidrec_torchrec.data.parquet import ArrowTable, ParquetTable
from sidrec_torchrec.data.parts import find_files
from sidrec_torchrec.errors import DataError, check_once
from sidrec_torchrec.files import read_json, write_json
from sidrec_torchrec.storage.mirror import bring, is_mirrored, local
from sidrec_torchrec.storage.urls import is_url, output_of
from sidrec_torchrec.training.config import JobConfig

ITEMS_FILE = "items.parquet"
EVENTS_FILE = "events.parquet"
USERS_FILE = "users.parquet"
SCHEMA_FILE = "schema.json"
TimeUnit = Literal["", "s", "ms", "us", "ns"]
_KINDS = ("items", "events", "users")


@dataclass(frozen=True, kw_only=True)
class DataSchema:
    """Where data are and what they are called; what is not said is as docs/data.md has it.

    Args:
        items: file, folder of parts, or glob in place of ``items.parquet``; relative to the data folder, or a URL.
        embeddings: a second file, folder or glob of ``item_id`` and embeddings, in any order, beside those of ``items``.
        events: likewise in place of ``events.parquet``.
        users: likewise in place of ``users.parquet``.
        columns: ``item_id=sku`` where a column has another name than ours.
        time_unit: of timestamps that are plain numbers: ``s``, ``ms``, ``us`` or ``ns``; none named means seconds.
        user_columns: columns of users to read as features, named like ``event_features``; one may also hold lists of categories.
            None named means all categories of one value a user with at most 10,000.
        event_features: columns of events that are known when a target is asked for (device, hour): read of the target, and of
            the events before it. Floats are cut into buckets, all else is a category; ``hour:category``, ``price:dense`` and
            ``price:dense:64`` (buckets) say otherwise.
        item_features: likewise, columns of items: read of the target's item, and of those of the events before it.
        history_features: likewise, columns of events that are known only afterwards (dwell time): read of the events before a target alone.
        event_weight: column of events: how much each counts in loss and metrics, 0 or more; none named means 1 each.
    """

    items: str = ""
    embeddings: str = ""
    events: str = ""
    users: str = ""
    columns: tuple[str, ...] = ()
    time_unit: TimeUnit = ""
    user_columns: tuple[str, ...] = ()
    event_features: tuple[str, ...] = ()
    item_features: tuple[str, ...] = ()
    history_features: tuple[str, ...] = ()
    event_weight: str = ""

    def __post_init__(self) -> None:
        check_once(self, "columns", "user_columns")
        check_once(self, "item_features")
        for text in (*self.user_columns, *self.item_features):
            FeatureName.parse(text)
        names = [FeatureName.parse(text).column for text in (*self.event_features, *self.history_features)]
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(
                f"'{repeated}' is twice among event_features and history_features; name it once: what is known only after an "
                "event is a history feature"
            )
        pairs = [pair.partition("=") for pair in self.columns]
        if bad := next((pair for pair in pairs if not all(pair)), None):
            raise ValueError(f"columns: '{''.join(bad)}' is no pair; write our name and the file's, item_id=sku")
        for side, names in (("ours", [ours for ours, _, _ in pairs]), ("the files'", [own for _, _, own in pairs])):
            if repeated := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"columns: '{repeated}' is twice among {side}; name each column once")

    @property
    def names(self) -> dict[str, str]:
        """The files' names by ours."""
        return dict(pair.split("=", 1) for pair in self.columns)

    def over(self, other: "DataSchema") -> "DataSchema":
        """This schema; where it says nothing, the other."""
        said = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        if "columns" in said:
            ours = {pair.partition("=")[0] for pair in self.columns}
            kept = tuple(pair for pair in other.columns if pair.partition("=")[0] not in ours)
            said["columns"] = kept + self.columns
        return replace(other, **said)

    @property
    def columns_alone(self) -> "DataSchema":
        """What it says of columns, for other files of the same log."""
        return replace(self, items="", embeddings="", events="", users="")

    def to_json(self) -> dict[str, Any]:
        """What is said, as JSON."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v not in ((), "")}

    @staticmethod
    def from_json(value: Any, path: Path) -> "DataSchema":
        """What ``to_json`` gave.

        Raises:
            DataError: if it is something else; names ``path`` and the field.
        """
        try:
            for field in dataclasses.fields(DataSchema):
                _check_type(field.name, value.get(field.name, field.default), field.default)
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
            return DataSchema(**fields)
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path}: no schema: {error}; `sidrec data schema` writes one") from error


@dataclass(frozen=True)
class DataFolder:
    """A data folder with its schema. Made by ``DataFolder.of``.

    Args:
        path: the folder.
        schema: its own, and what was said over it.
    """

    path: Path
    schema: DataSchema = field(default_factory=DataSchema)

    @staticmethod
    def of(data: "str | Path | DataFolder", schema: DataSchema | None = None) -> "DataFolder":
        """A data folder, with the schema that is in it.

        Args:
            data: the folder.
            schema: what to say over ``schema.json``.

        Raises:
            DataError: if the folder is not there, or its schema is none.
        """
        if isinstance(data, DataFolder):
            return data if schema is None else replace(data, schema=schema.over(data.schema))
        path = local(data)
        own = DataSchema()
        if (path / SCHEMA_FILE).exists():
            own = DataSchema.from_json(read_json(path / SCHEMA_FILE), path / SCHEMA_FILE)
        return DataFolder(path, own if schema is None else schema.over(own))

    def where(self, kind: str) -> Path:
        """Where its items, events or users are, or would be.

        Args:
            kind: ``items``, ``embeddings``, ``events`` or ``users``.
        """
        if named := getattr(self.schema, kind):
            path = local(named) if is_url(named) else self.path / named
            return bring(Path(os.path.normpath(path))) if is_mirrored(path) else path
        file, folder = self.path / f"{kind}.parquet", self.path / kind
        return folder if folder.is_dir() and not file.exists() else file

    def has(self, kind: str) -> bool:
        """Whether there are items, events or users; what the schema names counts as being there."""
        where = self.where(kind)
        return bool(getattr(self.schema, kind)) or where.exists() or where.is_symlink()  # one to nothing is a mistake

    def table(self, kind: str) -> ParquetTable:
        """Its items, events or users.

        Raises:
            DataError: if they are missing, broken, or without rows, or if no file has a column that the schema names.
        """
        table = ParquetTable.open(self.where(kind), names=self.schema.names)
        others = [other for other in ("items", "embeddings", "events", "users") if other != kind]
        for ours, own in self.schema.names.items():
            if ours not in table.names and not any(own in self._columns(other) for other in others):
                raise DataError(f"{self.path}: no file has a column '{own}', which --columns {ours}={own} names")
        return table

    def _columns(self, kind: str) -> list[str]:
        """Of a file that may not be there."""
        return list(ParquetTable.open(self.where(kind), may_be_empty=True).schema.names) if self.has(kind) else []

    def files(self, *kinds: str) -> list[Path]:
        """Every file it is read from: of these kinds, or of all; what a run that was made of it depends on."""
        return list(self._files(kinds or _KINDS))

    def write_schema(self) -> Path:
        """Writes the schema into the folder, where every job finds it."""
        path = output_of(self.path) / SCHEMA_FILE
        write_json(path, self.schema.to_json())
        return path

    def _files(self, kinds: tuple[str, ...]) -> Iterator[Path]:
        if "items" in kinds and self.schema.embeddings:
            kinds = (*kinds, "embeddings")
        for kind in kinds:
            path = self.where(kind)
            yield from find_files(path) if path.exists() or getattr(self.schema, kind) else [path]
        if (self.path / SCHEMA_FILE).exists():
            yield self.path / SCHEMA_FILE


def _check_type(name: str, value: Any, default: Any) -> None:
    """Raises ValueError unless a value of JSON can be that of a field: a text, or a list of texts, as its default is."""
    if name == "time_unit" and value not in get_args(TimeUnit):
        raise ValueError(f"'{name}' is {value!r}, and may be {', '.join(filter(None, get_args(TimeUnit)))}")
    is_list = isinstance(default, tuple)
    texts = value if is_list and isinstance(value, list | tuple) else [None if is_list else value]
    if isinstance(default, tuple | str) and not all(isinstance(text, str) for text in texts):
        raise ValueError(f"'{name}' must be {'a list of texts' if is_list else 'a text'}, is {value!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(JobConfig):
    """Base of configs of jobs that read a data folder.

    Args:
        data: the data folder.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
    """

    data: Path
    schema: DataSchema = field(default_factory=DataSchema)

    @property
    def folder(self) -> DataFolder:
        """The data folder with its schema."""
        return DataFolder.of(self.data, self.schema)


def open_table(
    data: "str | Path | DataFolder | Any", kind: str, schema: DataSchema | None = None
) -> tuple[ParquetTable, DataSchema]:
    """Items, events or users of a data folder, or of a file, folder of parts, glob or frame that holds them alone.

    Args:
        data: where they are; frames are those of ``data.frames.read_frame``.
        kind: ``items``, ``events`` or ``users``.
        schema: of their columns; what a data folder says itself is said over it.

    Raises:
        DataError: if they are missing, broken, or without rows.
    """
    if is_frame(data):
        schema = schema or DataSchema()
        table = ArrowTable.of(read_frame(data, kind), kind, schema.names)
        if not table.num_rows:
            raise DataError(f"{kind}: the frame has no rows")
        return table, schema
    if isinstance(data, DataFolder) or is_data_folder(data):
        folder = DataFolder.of(data)
        folder = replace(folder, schema=folder.schema.over(schema or DataSchema()))
        return folder.table(kind), folder.schema
    schema = schema or DataSchema()
    return ParquetTable.open(local(data), names=schema.names), schema


def is_data_folder(data: Any) -> bool:
    """Whether it is a data folder: not a file, a frame, nor a folder that holds parts alone."""
    if is_frame(data):
        return False
    if isinstance(data, DataFolder):
        return True
    path = local(data)
    if not path.is_dir():
        return False
    names = {SCHEMA_FILE, *_KINDS, *(f"{kind}.parquet" for kind in _KINDS)}
    return any((path / name).exists() for name in names) or not any(path.rglob("*.parquet"))
