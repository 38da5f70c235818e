"""Which data a run was made from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from sidrec_torchrec.data.folder import DataFolder
from sidrec_torchrec.errors import DataError, first_line
from sidrec_torchrec.part_files import open_parquet
from sidrec_torchrec.storage.mirror import open_input, size_of


def data_fingerprint(folder: DataFolder) -> dict[str, str]:
    """By kind (``items``, ``events``, ``users``) what ``files_fingerprint`` gives.

    Reads the footers alone, so that it is quick at any size.
    """
    return {kind: files_fingerprint(folder.files(kind)) for kind in ("items", "events", "users") if folder.has(kind)}


def files_fingerprint(paths: Sequence[Path]) -> str:
    """16 hex digits of a hash of Parquet files' sizes and footers (schema, offsets, column statistics), in their order.

    Raises:
        DataError: if one is no (whole) Parquet file.
    """
    digest = hashlib.sha256()
    for path in paths:
        if path.suffix != ".json":
            digest.update(_footer(path))
    return digest.hexdigest()[:16]


def _footer(path: Path) -> bytes:
    size = size_of(path)
    try:
        with open_parquet(path) as parquet:
            footer = parquet.metadata.serialized_size + 8  # length and magic number behind it
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file, or cut short: {first_line(error)}; make it again") from error
    with open_input(path) as file:
        file.seek(size - footer)
        return size.to_bytes(8, "little") + file.read()
