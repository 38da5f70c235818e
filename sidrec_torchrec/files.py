"""Whole files or none: write under a temporary name, then rename."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sidrec_torchrec.errors import DataError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of ``path`` and renames it to ``path`` when the block succeeds.

    Works for a file or a folder (the block decides which it creates). An existing file is replaced, an existing
    folder too. On an exception the temporary is removed and ``path`` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def remove_temporaries(folder: Path) -> None:
    """Removes what killed processes were writing into ``folder``; only for one that no other process writes into."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        _remove(path)


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote.

    Raises:
        DataError: if it is not JSON (any more).
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not JSON, or cut short ({error}); remove it, or its folder, and run again") from error


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically; NaN and infinities, which JSON has not, as null."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
