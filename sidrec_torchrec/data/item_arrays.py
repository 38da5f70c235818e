"""Per-item arrays on disk, mapped into memory: what the loader joins events with."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sidrec_torchrec.data.format import DataFolder, open_items
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path


def write_vectors(data: Path | DataFolder, source: str, path: Path) -> None:
    """Lays out a source of ``data``'s items as ``.npy``, float16 [num_items, d].

    Vectors are scaled to root mean square 1, so that float16 is enough; a missing vector is zeros.

    Raises:
        DataError: on bad items; names file, column and row.
    """
    items = open_items(data, sources=(source,), targets=())
    batches = (_unit_scale(batch.sources[source]) for batch in items.batches(sources=(source,), targets=()))
    write_rows(path, (items.num_items, items.source_dims[source]), np.float16, batches)


def write_rows(path: Path, shape: tuple[int, ...], dtype: type, batches: Iterator[np.ndarray]) -> None:
    """Writes batches of rows one after another as one ``.npy`` of ``shape``, whole or not at all."""
    with atomic_path(path) as temporary, row_writer(temporary, shape, dtype) as write:
        for batch in batches:
            write(batch)


@contextmanager
def row_writer(path: Path, shape: tuple[int, ...], dtype: np.dtype | type) -> Iterator[Callable[[np.ndarray], object]]:
    """Writes a ``.npy`` of ``shape``: what it yields appends rows, which must come to as many as ``shape`` says."""
    # written, not mapped: on a full disk that is an error, not a signal that kills the process
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        yield lambda rows: file.write(np.ascontiguousarray(rows, dtype).data)


def map_rows(path: Path) -> np.ndarray:
    """What ``write_rows`` wrote, mapped from disk.

    Raises:
        DataError: if it is missing, broken or cut short.
    """
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: not an array, or cut short ({error}); remove it, or its folder, and run again"
        ) from error


def _unit_scale(x_ND: np.ndarray) -> np.ndarray:
    scale_N1 = np.sqrt(np.square(x_ND, dtype=np.float64).mean(axis=1, keepdims=True))
    return x_ND / np.where(scale_N1 > 0, scale_N1, 1)
