"""Mirrors of what is at URLs: brought, read, and put back."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import lru_cache
from glob import has_magic
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO

from sidrec_torchrec.errors import StorageError
from sidrec_torchrec.storage.urls import IN, OUT, Place, is_url, place_of, place_of_url, root

if TYPE_CHECKING:
    from sidrec_torchrec.storage.remote import Look, Store

STAY = (".parquet", ".safetensors")  # suffixes of files that stay where they are
LOCK = ".lock"
BEGUN = ".begun.tmp"  # ends the names of folders with what this machine has begun, and will go on from
_MOST_FILES = 10_000
_AT_ONCE = 8  # files that are brought or put at the same time
_TEMPORARY, _PARTIAL = ".tmp", ".partial"


def store(place: Place) -> "Store":
    """The store that a place is in. Where there are no URLs, its libraries are neither needed nor loaded."""
    from sidrec_torchrec.storage.remote import open_store

    return open_store(place)


def local(path: str | Path, *, is_output: bool = False) -> Path:
    """The path that a job works with: a URL's mirror, with what is there if it is to be read; any other path as it is.

    Args:
        path: a path or URL.
        is_output: whether it is to be written.

    Raises:
        StorageError: if the store cannot be reached, or refuses; or if the URL is none.
    """
    if not is_url(path):
        return Path(path)
    try:
        place = place_of_url(path, OUT if is_output else IN)
    except ValueError as error:
        raise StorageError(str(error)) from None
    store(place)  # whether there is one
    return place.path if is_output else bring(place.path)


def is_mirrored(path: Path) -> bool:
    """Whether a path is a URL's mirror."""
    return place_of(path) is not None


def bring(path: Path, *, clean: bool = False) -> Path:
    """Makes a mirror show what is at its URL now; nothing of any other path.

    Args:
        path: the mirror; of a pattern, the folder before its first star is brought.
        clean: whether to remove what is in it and not there. Always done of what is only read.

    Returns:
        ``path``.
    """
    place = place_of(path)
    if place is None:
        return path
    if has_magic(place.key):
        names = place.key.split("/")
        first = next(number for number, name in enumerate(names) if has_magic(name))
        place = Place(place.area, place.base, "/".join(names[:first]))
    with _locked(place):
        _bring(place, clean or place.area == IN)
    return path


def _bring(place: Place, clean: bool) -> None:
    own, (look, is_folder) = store(place), store(place).look(place)
    partial, _ = own.look(_partial(place)) if is_folder else (None, False)
    if look is not None:
        if place.path.is_dir():
            shutil.rmtree(place.path)
        _bring_file(look)
        return
    if not is_folder or partial is not None:
        if clean:
            _remove_local(place.path)
        return
    looks = own.files(place)
    half = {f"{_folder_of(other)}/" for other in looks if other.place.key.endswith(_PARTIAL)}
    looks = [one for one in looks if not any(one.place.key.startswith(folder) for folder in half)]
    looks = [one for one in looks if not one.place.key.endswith((_PARTIAL, _TEMPORARY, LOCK))]
    if sum(not one.place.key.endswith(STAY) for one in looks) > _MOST_FILES:  # a whole bucket, likely
        raise StorageError(
            f"{place.short}: holds more than {_MOST_FILES:,} files to be fetched; name a folder of what this job reads alone"
        )
    if clean:
        _clean(place.path, {one.place.path for one in looks})
    place.path.mkdir(parents=True, exist_ok=True)
    _all_at_once(_bring_file, looks)


def _bring_file(look: "Look") -> None:
    path = look.place.path
    stays = path.suffix in STAY
    with suppress(FileNotFoundError):
        is_same = path.suffix != ".json" and int(path.stat().st_mtime) == look.time
        if is_same and path.stat().st_size in ((look.size, 0) if stays else (look.size,)):
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as temporary:
        try:
            (temporary.touch if stays else lambda: store(look.place).fetch(look.place, temporary))()
        except FileNotFoundError:  # it has gone since it was listed
            return
        os.utime(temporary, (look.time, look.time))
        os.replace(temporary, path)


def publish(path: Path, was: Path | None = None) -> None:
    """Puts a mirror's file or folder at its URL, in place of what is there; nothing of any other path, or of a temporary one.

    Of a folder the JSON comes last. Whoever reads the folder by this package sees all of it or nothing: a file beside it,
    ``.NAME.partial``, is there until it is whole.

    Args:
        path: that has its final name.
        was: a name that it had before, under which its files may be there already; they are moved.

    Raises:
        StorageError: if it cannot be put; or if it is only to be read.
    """
    place = _written(path)
    if place is None:
        return
    old = None if was is None else _written(was)
    if not path.is_dir():
        _put(path, place, old)
        return
    own = store(place)
    files = sorted(file for file in path.rglob("*") if file.is_file() and _written(file) is not None)
    places = {file: _below(place, path, file) for file in files}
    gone = {look.place for look in own.files(place)} - set(places.values())
    mark = _partial(place)
    empty = root() / ".empty"
    empty.touch()
    own.put(empty, mark)
    _all_at_once(own.delete, [*gone, *(other for other in places.values() if other.key.endswith(".json"))])
    for last in (False, True):
        chosen = [file for file in files if (file.suffix == ".json") == last]
        _all_at_once(lambda file: _put(file, places[file], old and _below(old, path, file)), chosen)
    own.delete(mark)


def drop(path: Path) -> None:
    """Deletes what is at a mirror's URL: a file, or a folder with all that is in it; nothing of any other path."""
    place = _written(path)
    if place is None:
        return
    look, is_folder = store(place).look(place)
    if look is not None:
        store(place).delete(place)
    elif is_folder:
        store(place).delete_folder(place)


def listed(folder: Path, pattern: str) -> list[Path]:
    """What is in a folder, by name, or at its URL."""
    place = place_of(folder)
    names = {path.name for path in folder.glob(pattern)}
    if place is not None:
        names |= {name for name in store(place).names(place) if fnmatch(name, pattern)}
    return [folder / name for name in sorted(names)]


def slim(folder: Path) -> None:
    """Of a mirror's files that stay where they are, and have been put there, leaves stand-ins: of a file, or those of a folder."""
    if not is_mirrored(folder):
        return
    for path in [folder, *folder.rglob("*")]:
        if path.suffix in STAY and path.is_file() and path.stat().st_size and _written(path) is not None:
            _leave_stand_in(path)


def open_input(path: Path) -> BinaryIO:
    """A file to read: the local one, or what its mirror stands for."""
    place = place_of(path)
    if place is None or (path.is_file() and path.stat().st_size):
        return path.open("rb")
    from sidrec_torchrec.storage.remote import RemoteFile

    return RemoteFile(place)  # type: ignore[return-value]


def has_changed(path: Path) -> bool:
    """Whether a small file's URL no longer has what its mirror has; not so of any other path."""
    place = place_of(path)
    if place is None:
        return False
    from sidrec_torchrec.storage.remote import RemoteFile

    try:
        return RemoteFile(place).read() != path.read_bytes()
    except FileNotFoundError:
        return True


def is_stand_in(path: Path) -> bool:
    """Whether the content of a mirror is at its URL alone."""
    return path.suffix in STAY and is_mirrored(path) and not (path.is_file() and path.stat().st_size)


def size_of(path: Path) -> int:
    """Bytes of a file."""
    if not is_stand_in(path):
        return path.stat().st_size
    return _size(path, int(path.stat().st_mtime) if path.exists() else -1)


def time_of(path: Path) -> int | None:
    """Of a mirror that shows what is at its URL, when that was last changed, in whole seconds; None of any other path."""
    place = place_of(path)
    if place is None or not (place.area == IN or is_stand_in(path)) or not path.exists():
        return None
    return int(path.stat().st_mtime)


@lru_cache(maxsize=1 << 16)
def _size(path: Path, time: int) -> int:
    place = place_of(path)
    assert place is not None
    look, _ = store(place).look(place)
    if look is None:
        raise StorageError(f"{place.short}: is not there any more")
    return look.size


def _put(path: Path, place: Place, old: Place | None) -> None:
    if old is not None and old != place:
        store(place).move(old, place)
        look, _ = store(place).look(place)
    else:
        look = store(place).put(path, place)
    if look is not None:
        os.utime(path, (look.time, look.time))


def _leave_stand_in(path: Path) -> None:
    time = int(path.stat().st_mtime)
    with _temporary(path) as temporary:
        temporary.touch()
        os.utime(temporary, (time, time))
        os.replace(temporary, path)


def _written(path: Path) -> Place | None:
    """Where a path is put; None where nothing is.

    Raises:
        StorageError: if it is the mirror of what is only read.
    """
    place = place_of(path)
    if place is None or _is_temporary(PurePosixPath(place.key)) or place.key.endswith(LOCK):
        return None
    if place.area == IN:
        raise StorageError(f"{place.short}: is an input, where this job writes nothing; name another place")
    return place


def _is_temporary(path: PurePath) -> bool:
    return any(part.startswith(".") and part.endswith(_TEMPORARY) for part in path.parts)


def _partial(place: Place) -> Place:
    return place.beside(f".{place.path.name}{_PARTIAL}")


def _folder_of(mark: "Look") -> str:
    """Whose folder is not whole."""
    folder, _, name = mark.place.key.rpartition("/")
    return f"{folder}/{name.removeprefix('.').removesuffix(_PARTIAL)}".lstrip("/")


def _below(place: Place, folder: Path, file: Path) -> Place:
    return Place(place.area, place.base, f"{place.key}/{file.relative_to(folder).as_posix()}")


def _clean(folder: Path, known: set[Path]) -> None:
    """Removes what is in a folder and not known, and folders that are empty then; not what has been begun here."""
    if folder.is_file():
        folder.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            with suppress(OSError):  # something is in it
                path.rmdir()
        elif path not in known and path.suffix != LOCK and not any(part.endswith(BEGUN) for part in path.parts):
            path.unlink(missing_ok=True)


def _remove_local(path: Path) -> None:
    if path.is_dir():
        _clean(path, set())
        with suppress(OSError):  # a lock is in it
            path.rmdir()
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(8)}{_TEMPORARY}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _locked(place: Place) -> Iterator[None]:
    """One process of this machine at a time brings files of a store."""
    with locked(root() / place.area / f"{Place(place.area, place.base, '').path.name}{LOCK}"):
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock of this machine, at ``path``; waits for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _all_at_once(work: Callable[..., object], items: Iterable[object]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(work, items):
            pass
