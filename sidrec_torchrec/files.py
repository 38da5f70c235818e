"""Whole files or none: write under a temporary name, then rename.

What gets its final name here, or goes, also does so at its URL, where the path is the mirror of one (``storage``).
"""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from sidrec_torchrec.errors import DataError
from sidrec_torchrec.storage.mirror import drop, open_input, publish, size_of, time_of
from sidrec_torchrec.storage.urls import absolute

# as ``atomic_path`` names them; earlier versions did by process id alone
_TEMPORARY = re.compile(r"\..+\.(\d+|.*-\d+-[0-9a-f]{16})\.tmp")
LIST_FILE = "files.json"
_DIGEST = "sha256"  # the last key of a sealed JSON object: of all the others
_HEX = re.compile("[0-9a-f]{64}")
_BLOCK_BYTES = 1 << 22


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling of ``path`` and renames it to ``path`` when the block succeeds.

    Works for a file or a folder (the block decides which it creates). An existing file is replaced, an existing
    folder too. On an exception the temporary is removed and ``path`` is left as it was. What has been renamed is on the disk,
    whole, even if the machine loses its power.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        sync_to_disk(temporary)
        replace_path(temporary, path)
    finally:
        remove(temporary)


@contextmanager
def work_folder(path: Path, begun: Path | None = None) -> Iterator[Path]:
    """Yields a folder for what ``path`` is made from; it is gone in the end.

    Args:
        path: what is made, beside which the folder is.
        begun: the folder, which stays if the process is killed in the block, or one that works for it is, so that another call can go
            on from what is in it; but not if the data are refused, as they will be others then, or if the disk is full. None for
            one that never stays.
    """
    folder = begun or _temporary(path)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    except BaseException as error:
        if begun is None or isinstance(error, DataError | OSError):
            remove_at_once(folder)
        raise
    remove_at_once(folder)


def _temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process takes."""
    # Containers that share a folder have the same process ids, and often the same host name: the last part tells them apart.
    mark = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
    return path.with_name(f".{path.name[:100]}.{mark}.tmp")


def replace_path(new: Path, path: Path) -> None:
    """Renames ``new``, a file or a folder that is on the disk, to ``path``, whose file or folder is gone then.

    Raises:
        DataError: if ``new`` is a file and ``path`` a folder, which may hold anything.
    """
    if path.is_dir() and not new.is_dir():
        raise DataError(f"{path}: is a folder, where a file is to be written; name a file")
    if path.is_dir():
        shutil.rmtree(path)
    os.replace(new, path)
    _sync_folder(path.parent)
    publish(path, new)


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or all that is in a folder, is on the disk: a name must not be there before its content."""
    if not path.is_dir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return
    for child in path.iterdir():
        sync_to_disk(child)
    _sync_folder(path)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Removes what killed processes were writing into ``folder``; only for one that no other process writes into."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            remove(path)


def check_is_file(path: Path) -> None:
    """Raises DataError if there is something else than a file; a pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a file, but a folder, a pipe or a device; remove it, or name another")


def check_is_no_input(out: Path, files: Iterable[Path]) -> None:
    """Refuses to write a file in place of one that is read.

    Raises:
        DataError: if ``out`` is one of ``files``.
    """
    if absolute(out) in map(absolute, files):
        raise DataError(f"{out}: is read by this command, which would write over it; name another file")


def read_json(path: Path) -> Any:
    """What ``write_json`` wrote; without its seal, if it has one. Files of earlier versions have none.

    Raises:
        DataError: if it is not JSON (any more), or was sealed and is not what was written.
    """
    check_is_file(path)
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON, or cut short ({error}); remove it, or its folder, and run again") from error
    if not isinstance(value, dict) or not value:
        return value
    key, digest = next(reversed(value.items()))
    if key != _DIGEST and not (isinstance(digest, str) and _HEX.fullmatch(digest)):  # a flipped bit may be in the key
        return value
    del value[key]
    if (key, digest) != (_DIGEST, _digest(value)):
        raise DataError(
            f"{path}: not what was written: an error of the disk, or edited; restore it, or remove its folder and run again"
        )
    return value


def read_object(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote of a dict.

    Raises:
        DataError: if it is not JSON (any more), is something else, or was sealed and is not what was written.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise DataError(
            f"{path}: holds no JSON object, but {json.dumps(value)[:40]}; remove it, or its folder, and run again"
        )
    return value


def write_json(path: Path, value: Any, *, sealed: bool = False) -> None:
    """Writes ``value`` as indented JSON, atomically; NaN and infinities, which JSON has not, as null.

    Args:
        path: the file.
        value: what JSON can say.
        sealed: whether a dict's last key is its digest, by which ``read_json`` sees that a bit has changed: for what jobs read.
    """
    value = _finite(value)
    if sealed:
        value = value | {_DIGEST: _digest(value)}
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _digest(value: dict[str, Any]) -> str:
    """Of what JSON says: keys in any order, numbers as text."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def list_files(folder: Path) -> None:
    """Writes ``files.json``: size and digest of each file of a whole folder, by its path there. ``check_listed`` compares with it.

    JSON is left out: it is sealed, each file by itself; so are locks.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".json", ".lock")]
    listed = {
        path.relative_to(folder).as_posix(): {"bytes": size_of(path), "sha256": sha256_of(path)} for path in files
    }
    write_json(folder / LIST_FILE, listed, sealed=True)


def check_listed(path: Path, *, content: bool = True) -> None:
    """Compares a file with the list of its folder, or of the one above, if there is one and it names the file.

    Its content is read once, and again where the file looks otherwise; never if the environment has ``SIDREC_VERIFY=off``.

    Args:
        path: the file.
        content: whether to read it; else its size alone is compared.

    Raises:
        DataError: if it is not what was written.
    """
    folder = next((parent for parent in list(path.parents)[:2] if (parent / LIST_FILE).is_file()), None)
    if folder is None or os.environ.get("SIDREC_VERIFY") == "off":
        return
    known = _listed(folder / LIST_FILE, *glance(folder / LIST_FILE)).get(path.relative_to(folder).as_posix())
    if known is None:
        return
    if not path.is_file():
        raise DataError(f"{path}: is not there any more; restore it, or remove its folder and run again")
    if known["bytes"] != size_of(path) or (content and known["sha256"] != sha256_of(path)):
        raise DataError(f"{path}: not what was written; restore it, or remove its folder and run again")


@lru_cache(maxsize=64)
def _listed(path: Path, *glance: int) -> dict[str, Any]:
    return read_object(path)


def sha256_of(path: Path) -> str:
    """Of a file's content, in hex, or of the names and contents of a folder's files; read again only where a file looks otherwise
    than the last time.
    """
    if path.is_dir():
        told = [[file.name, sha256_of(file)] for file in sorted(path.iterdir())]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()
    return _sha256(path.resolve(), *glance(path))


def glance(path: Path) -> list[int]:
    """Size, times and place of a file: while they stay, its content does. Anybody can set the time of its last change, but not
    that at which it was set."""
    if (time := time_of(path)) is not None:  # the same on every machine
        return [size_of(path), time]
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


@lru_cache(maxsize=1024)
def _sha256(path: Path, *glance: int) -> str:
    digest = hashlib.sha256()
    with open_input(path) as content:
        while block := content.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def remove(path: Path) -> None:
    """Removes a file, or a folder with all that is in it; nothing if there is none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    drop(path)


def remove_at_once(folder: Path) -> None:
    """Removes a folder so that it is there whole or not at all: who finds a part of it would go on from what is not there."""
    going = _temporary(folder)
    os.replace(folder, going)
    remove(going)
