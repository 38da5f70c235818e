"""The part files of a Parquet data set: one file, a folder of parts, hive partitions, or a glob."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from glob import glob, has_magic
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from sidrec_torchrec.errors import DataError, first_line
from sidrec_torchrec.files import check_listed
from sidrec_torchrec.part_files import open_parquet


@dataclass(frozen=True)
class Part:
    """One file of a data set.

    Args:
        path: the file.
        schema: its Arrow schema, without partition columns.
        row_groups: rows of each of its row groups.
        partition: value by partition column, from folders named ``column=value``.
    """

    path: Path
    schema: pa.Schema
    row_groups: tuple[int, ...]
    partition: Mapping[str, pa.Scalar]

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups)

    def types(self) -> dict[str, pa.DataType]:
        """By column, those of the file before those of its folders.

        Raises:
            DataError: if two columns have one name.
        """
        names = self.schema.names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise DataError(f"{self.path}: two columns are called '{repeated[0]}'; rename one")
        return {name: value.type for name, value in self.partition.items()} | {f.name: f.type for f in self.schema}


def find_files(path: Path) -> list[Path]:
    """The files of a data set, in order of their paths: that of a file, those of a folder, at any depth, or of a glob.

    Hidden ones and those that begin with ``_`` are no data; where files end with ``.parquet``, others are not either.

    Raises:
        DataError: if there are none.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        below = [file for file in sorted(path.rglob("*")) if file.is_file() and _is_data(file.relative_to(path))]
        files = [file for file in below if file.suffix == ".parquet"] or below
        if not files:
            raise DataError(f"{path}: no file *.parquet in this folder; write the parts there, or name a file")
        return files
    if has_magic(str(path)):
        files = [file for match in sorted(glob(str(path), recursive=True)) for file in find_files(Path(match))]
        if not files:
            raise DataError(
                f"{path}: no file has a name like this; quote the pattern, so that the shell leaves it as it is"
            )
        return files
    raise DataError(f"{path}: no such file; docs/data.md describes the files of a data folder")


def open_parts(path: Path) -> tuple[Part, ...]:
    """The footers of a data set's files.

    Raises:
        DataError: if there is no file, or one is no (whole) Parquet file.
    """
    files = find_files(path)
    parts = tuple(_open_part(file) for file in files)
    return tuple(replace(part, partition=its) for part, its in zip(parts, _partitions(_root(path), files), strict=True))


def _is_data(path: Path) -> bool:
    return not any(name.startswith((".", "_")) for name in path.parts)


def _open_part(path: Path) -> Part:
    check_listed(path)
    try:
        with open_parquet(path) as file:
            groups = tuple(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
            return Part(path, file.schema_arrow, groups, {})
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file, or cut short: {first_line(error)}") from error


def _partitions(root: Path, files: list[Path]) -> list[dict[str, pa.Scalar]]:
    """By file, what its folders' names ``column=value`` below ``root`` say: integers, or else text; null for hive's default."""
    if not any("=" in folder for file in files for folder in file.relative_to(root).parts[:-1]):
        return [{} for _ in files]
    options = ds.FileSystemFactoryOptions(
        partitioning=ds.partitioning(flavor="hive"), partition_base_dir=str(root.absolute())
    )
    paths = [str(file.absolute()) for file in files]
    factory = ds.FileSystemDatasetFactory(pafs.LocalFileSystem(), paths, ds.ParquetFileFormat(), options)
    schema = factory.inspect(fragments=0)  # of the folders' names; no file is read
    keys = [ds.get_partition_keys(fragment.partition_expression) for fragment in factory.finish(schema).get_fragments()]
    return [{name: pa.scalar(its[name], schema.field(name).type) for name in its} for its in keys]


def _root(path: Path) -> Path:
    """The folder below which folders' names can be partitions."""
    if path.is_dir():
        return path
    fixed = [parent for parent in (path, *path.parents) if not has_magic(str(parent))]
    return fixed[0].parent if fixed[0].is_file() else fixed[0]
