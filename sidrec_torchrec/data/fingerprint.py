"""Which data a run was made from."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.data.format import EVENTS_FILE, ITEMS_FILE, USERS_FILE
from sidrec_torchrec.errors import DataError, first_line


def data_fingerprint(folder: Path) -> dict[str, str]:
    """By file of a data folder, a hash of its size and its Parquet footer (schema, offsets, column statistics).

    Reads the footers alone, so that it is quick at any size.
    """
    return {
        name: file_fingerprint(folder / name)
        for name in (ITEMS_FILE, EVENTS_FILE, USERS_FILE)
        if (folder / name).exists()
    }


def file_fingerprint(path: Path) -> str:
    """16 hex digits of a hash of a Parquet file's size and footer.

    Raises:
        DataError: if it is no (whole) Parquet file.
    """
    size = path.stat().st_size
    try:
        footer = pq.read_metadata(path).serialized_size + 8  # length and magic number behind it
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file, or cut short: {first_line(error)}; make it again") from error
    with path.open("rb") as file:
        file.seek(size - footer)
        return hashlib.sha256(size.to_bytes(8, "little") + file.read()).hexdigest()[:16]
