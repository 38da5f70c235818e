"""Per-item arrays on disk, mapped into memory: what the loader joins events with."""

import hashlib
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sidrec_torchrec.data.format import DataFolder, open_items
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path, check_is_file

_DIGEST_MARK = b"\nsha256\n"  # behind the array, where readers of .npy do not look; then the digest of all before it
_BLOCK_BYTES = 1 << 20


def write_vectors(data: Path | DataFolder, source: str, path: Path) -> None:
    """Lays out a source of ``data``'s items as ``.npy``, float16 [num_items, d].

    Vectors are scaled to root mean square 1, so that float16 is enough; a missing vector is zeros.

    Raises:
        DataError: on bad items; names file, column and row.
    """
    items = open_items(data, sources=(source,), targets=())
    batches = (_unit_scale(batch.sources[source]) for batch in items.batches(sources=(source,), targets=()))
    write_rows(path, (items.num_items, items.source_dims[source]), np.float16, batches)


def write_rows(path: Path, shape: tuple[int, ...], dtype: np.dtype | type, batches: Iterator[np.ndarray]) -> None:
    """Writes batches of rows one after another as one ``.npy`` of ``shape``, whole or not at all."""
    with atomic_path(path) as temporary, row_writer(temporary, shape, dtype) as write:
        for batch in batches:
            write(batch)


@contextmanager
def row_writer(path: Path, shape: tuple[int, ...], dtype: np.dtype | type) -> Iterator[Callable[[np.ndarray], object]]:
    """Writes a ``.npy`` of ``shape``: what it yields appends rows, which must come to as many as ``shape`` says."""
    # written, not mapped: on a full disk that is an error, not a signal that kills the process
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    text, digest = io.BytesIO(), hashlib.sha256()
    np.lib.format.write_array_header_1_0(text, header)

    def write(rows: np.ndarray | bytes) -> None:
        content = rows if isinstance(rows, bytes) else np.ascontiguousarray(rows, dtype).data
        digest.update(content)
        file.write(content)

    with open(path, "wb") as file:
        write(text.getvalue())
        yield write
        file.write(_DIGEST_MARK + digest.digest())


def map_rows(path: Path) -> np.ndarray:
    """What ``write_rows`` wrote, mapped from disk.

    All of it is read once, to compare it with its digest, unless the environment has ``SIDREC_VERIFY=off``; an array that was
    written without one is taken as it is.

    Raises:
        DataError: if it is missing, broken or cut short.
    """
    check_is_file(path)
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # which takes neither archives nor pickles
        size = array.offset + array.nbytes
        if path.stat().st_size > size and os.environ.get("SIDREC_VERIFY") != "off":
            _check_digest(path, size)
        return array
    except Exception as error:  # numpy parses the header as Python: a broken one may raise anything
        raise DataError(
            f"{path}: not an array, or cut short ({error}); remove it, or its folder, and run again"
        ) from error


def _check_digest(path: Path, size: int) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in range(0, size, _BLOCK_BYTES):
            digest.update(file.read(min(_BLOCK_BYTES, size - start)))
        if file.read() != _DIGEST_MARK + digest.digest():
            raise ValueError("its bytes have changed since it was written")


def _unit_scale(x_ND: np.ndarray) -> np.ndarray:
    scale_N1 = np.sqrt(np.square(x_ND, dtype=np.float64).mean(axis=1, keepdims=True))
    return x_ND / np.where(scale_N1 > 0, scale_N1, 1)
