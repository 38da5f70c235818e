"""What is asked of a store, again where it fails: listing, reading by ranges, putting, moving, deleting."""

import errno
import io
import os
import posixpath
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from sidrec_torchrec.errors import SidrecError, StorageError, first_line
from sidrec_torchrec.output import warn
from sidrec_torchrec.storage.urls import Place

Result = TypeVar("Result")
_BLOCK_BYTES = 8 << 20
_DENIED = re.compile(
    "ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|EXPIRED|credentials|Permission denied"
    "|Unauthorized|HTTP status 40[13]",
    re.IGNORECASE,
)
_NO_BUCKET = re.compile("NO_SUCH_BUCKET|bucket .*(not found|does not exist)", re.IGNORECASE)
_ONE_REQUEST = {"allow_delayed_open": "true"}  # that puts a small file
_OWN_SCHEMES = ("s3", "gs", "gcs", "hdfs", "viewfs", "file")  # Arrow's in each of its builds
_OBJECTS = ("s3", "gcs", "abfs")  # kinds of stores where a file appears when it is whole
_MOST_TEXT = 400  # letters of a library's error: Google's repeats itself for a page
_ASKED_AFTER = 3  # tries after which somebody is told


@dataclass(frozen=True)
class Look:
    """What a listing says of a file.

    Args:
        place: the file's.
        size: bytes.
        time: of its last change, whole seconds: some stores know no others.
    """

    place: Place
    size: int
    time: int


class Store:
    """One bucket, host, or disk.

    Args:
        base: see ``Place``.
    """

    def __init__(self, base: str) -> None:
        self._base = base
        self._system, self._prefix = _opened(base)
        self._is_of_objects = self._system.type_name in _OBJECTS

    def look(self, place: Place) -> tuple[Look | None, bool]:
        """A file, if there is one, and else whether there is a folder.

        Raises:
            StorageError: if the store does not answer, or refuses to; or if its bucket is not there.
        """
        info = again(place, lambda: self._system.get_file_info(self._path(place)))
        if info.type == pafs.FileType.NotFound:
            self._check_bucket(place)
        return (_look(info, place) if info.is_file else None), info.type == pafs.FileType.Directory

    def files(self, place: Place, *, recursive: bool = True) -> list[Look]:
        """All files below a folder, or those in it; none if there is no such folder."""
        selector = pafs.FileSelector(self._path(place), allow_not_found=True, recursive=recursive)
        found = again(place, lambda: self._system.get_file_info(selector))
        return [_look(info, self._place(place, info.path)) for info in found if info.is_file]

    def names(self, place: Place) -> list[str]:
        """Of the files and folders in a folder."""
        selector = pafs.FileSelector(self._path(place), allow_not_found=True)
        return [info.base_name for info in again(place, lambda: self._system.get_file_info(selector))]

    def open(self, place: Place) -> Any:
        """A file to read by ``read_at`` and ``size``.

        Raises:
            FileNotFoundError: if it is not there.
        """
        return again(place, lambda: self._system.open_input_file(self._path(place)))

    def read(self, place: Place, file: Any, count: int, offset: int) -> bytes:
        """Some bytes of what ``open`` gave.

        Raises:
            FileNotFoundError: if it is not there any more.
        """

        def work() -> bytes:
            try:
                return file.read_at(count, offset)
            except OSError:  # stores say in many ways that it is gone
                if self._system.get_file_info(self._path(place)).type == pafs.FileType.NotFound:
                    raise FileNotFoundError(errno.ENOENT, "it has been removed", place.short) from None
                raise

        return again(place, work)

    def fetch(self, place: Place, path: Path) -> None:
        """Writes a file's content to a local path.

        Raises:
            FileNotFoundError: if it is not there.
        """
        source = self.open(place)
        size, offset = source.size(), 0
        with path.open("wb") as file:
            while offset < size:
                block = self.read(place, source, min(_BLOCK_BYTES, size - offset), offset)
                file.write(block)
                offset += len(block)

    def put(self, path: Path, place: Place) -> Look:
        """Makes a local file's content a file of the store, whole or not at all, in place of the one that is there."""
        return again(place, lambda: self._put(path, place))

    def move(self, old: Place, new: Place) -> None:
        """Gives a file another name."""

        def work() -> None:
            try:
                self._make_folder(new)
                self._system.move(self._path(old), self._path(new))
            except OSError:  # maybe since it has been done, and its answer was lost
                there, here = self._system.get_file_info([self._path(old), self._path(new)])
                if there.is_file or not here.is_file:
                    raise

        again(new, work)

    def delete(self, place: Place) -> None:
        """Deletes a file, if there is one."""
        self._delete(place, self._system.delete_file)

    def delete_folder(self, place: Place) -> None:
        """Deletes a folder and all that is in it, if there is one."""
        self._delete(place, self._system.delete_dir)

    def _delete(self, place: Place, delete: Callable[[str], None]) -> None:
        def work() -> None:
            with suppress(FileNotFoundError):
                delete(self._path(place))

        again(place, work)

    def _put(self, path: Path, place: Place) -> Look:
        to = self._path(place)
        target = to
        if not self._is_of_objects:
            self._make_folder(place)
            target = posixpath.join(posixpath.dirname(to), f".{posixpath.basename(to)[:100]}.{os.getpid()}.tmp")
        size = path.stat().st_size
        with path.open("rb") as source:
            block = source.read(_BLOCK_BYTES)  # before there is a target: a broken disk leaves none
            with self._system.open_output_stream(target) as stream:
                while block:
                    stream.write(block)
                    block = source.read(_BLOCK_BYTES)
        if target != to:
            self._system.move(target, to)
        info = self._system.get_file_info(to)
        if not info.is_file or info.size != size:
            raise OSError(f"{size} bytes were sent, and {info.size or 'none'} are there")
        return _look(info, place)

    def _make_folder(self, place: Place) -> None:
        if not self._is_of_objects:
            self._system.create_dir(posixpath.dirname(self._path(place)), recursive=True)

    def _check_bucket(self, place: Place) -> None:
        if not self._is_of_objects or not self._prefix:
            return
        info = again(place, lambda: self._system.get_file_info(self._prefix))
        if info.type == pafs.FileType.NotFound:
            raise StorageError(f"{place.short}: there is no bucket '{self._prefix}'; make it, or name another")

    def _path(self, place: Place) -> str:
        return f"{self._prefix}/{place.key}" if self._prefix else f"/{place.key}"

    def _place(self, folder: Place, path: str) -> Place:
        key = path.removeprefix(self._prefix).lstrip("/")
        if ".." in key.split("/"):  # its mirror would lie elsewhere
            raise StorageError(f"{folder.short}: holds '{key}', a name with '..', which no folder can hold; remove it")
        return Place(folder.area, folder.base, key)


def again(place: Place, work: Callable[[], Result]) -> Result:
    """What ``work`` gives, tried until the environment's ``SIDREC_STORAGE_MINUTES`` are over (5, if it does not say), ever more seldom.

    Raises:
        FileNotFoundError, ValueError, NotImplementedError: as ``work`` does.
        StorageError: what it raised the last time, or at once where it would not help to try again.
    """
    end, tries = time.monotonic() + 60 * _minutes(), 0
    while True:
        try:
            return work()
        except (FileNotFoundError, ValueError, NotImplementedError):  # which would come again
            raise
        except (OSError, pa.ArrowException) as error:
            text, tries = _without_secrets(first_line(error)), tries + 1
            if _DENIED.search(text):
                raise StorageError(
                    f"{place.short}: the store refuses it ({text}); see docs/storage.md on credentials, and what these may do"
                ) from None
            if _NO_BUCKET.search(text):
                raise StorageError(f"{place.short}: {text}; make the bucket, or name another") from None
            if time.monotonic() >= end:
                raise StorageError(
                    f"{place.short}: tried {tries} times ({text}); see that the store can be reached, and run again: what is whole "
                    "stays"
                ) from None
            if tries == _ASKED_AFTER:
                warn(f"{place.short}: {text}; it is tried again for {_minutes():g} minutes")
            time.sleep(max(0.0, min(0.05 * 2**tries, 10.0, end - time.monotonic())))


def _minutes() -> float:
    text = os.environ.get("SIDREC_STORAGE_MINUTES", "5")
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < 1e6:
        raise SidrecError(f"SIDREC_STORAGE_MINUTES is '{text}'; give a number of minutes, 0 or more")
    return minutes


def open_store(place: Place) -> Store:
    """The store that a place is in; one connection for each process."""
    return _store(place.base, os.getpid())  # a forked process has its parent's objects, and not its threads


@lru_cache(maxsize=64)
def _store(base: str, pid: int) -> Store:
    return Store(base)


def _opened(base: str) -> tuple[pafs.FileSystem, str]:
    """A store's file system, and the path of its top.

    Raises:
        StorageError: if no library knows the scheme, or it cannot be opened.
    """
    url = urlsplit(base)
    query = dict(parse_qsl(url.query))
    place = Place("", base, "")
    try:
        if url.scheme != "s3":
            system, prefix = pafs.FileSystem.from_uri(_uri(url.scheme, url.netloc, query))
        else:
            query = _s3_defaults() | query
            try:
                uri = _uri(url.scheme, url.netloc, _ONE_REQUEST | query)
                system, prefix = again(place, lambda: pafs.FileSystem.from_uri(uri))
            except ValueError:  # pyarrow before 19 does not know it
                uri = _uri(url.scheme, url.netloc, query)
                system, prefix = again(place, lambda: pafs.FileSystem.from_uri(uri))
    except (ValueError, NotImplementedError) as error:  # what Arrow raises for a URI that it does not know
        if url.scheme in _OWN_SCHEMES and isinstance(error, ValueError):
            raise StorageError(f"{place.short}: {_without_secrets(first_line(error))}") from error
        return _opened_by_fsspec(base, error)
    except OSError as error:  # of hdfs, a library that is not there
        raise StorageError(f"{place.short}: cannot be opened: {_without_secrets(first_line(error))}") from error
    return system, prefix.rstrip("/")


def _uri(scheme: str, host: str, query: dict[str, str]) -> str:
    return f"{scheme}://{host}/{'?' * bool(query)}{urlencode(query)}"


def _s3_defaults() -> dict[str, str]:
    """What the environment says of S3, and Arrow reads from no variable: where to ask, and the region."""
    values: dict[str, str] = {}
    names = (("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), ("AWS_REGION", "AWS_DEFAULT_REGION"))
    endpoint, region = (next((os.environ[name] for name in both if os.environ.get(name)), "") for both in names)
    if endpoint:
        at = urlsplit(endpoint if "//" in endpoint else f"https://{endpoint}")
        values |= {"endpoint_override": at.netloc, "scheme": at.scheme}
    return values | ({"region": region} if region else {})


def _opened_by_fsspec(base: str, error: Exception) -> tuple[pafs.FileSystem, str]:
    scheme = base.partition(":")[0]
    try:
        import fsspec

        system, prefix = fsspec.core.url_to_fs(base.partition("?")[0])
    except (ImportError, ValueError) as other:
        raise StorageError(
            f"{base.partition('?')[0]}: nothing here reads URLs of {scheme}:// ({first_line(other)}); there are s3://, gs://, hdfs://, "
            "file:// and what a package of fsspec brings"
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(system)), prefix.rstrip("/")


def _look(info: pafs.FileInfo, place: Place) -> Look:
    return Look(place, info.size or 0, (info.mtime_ns or 0) // 1_000_000_000)


def _without_secrets(text: str) -> str:
    """A library's words on an error, without what the environment holds as credentials, and without the request's number."""
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        if value := os.environ.get(name):
            text = text.replace(value, f"${name}")
    text = re.sub(r" \(Request ID: [^)]*\)", "", text)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} ..."


class RemoteFile(io.RawIOBase):
    """A file of a store, read by ranges; each is asked for again where that fails.

    Args:
        place: the file's.

    Raises:
        FileNotFoundError: if it is not there.
    """

    def __init__(self, place: Place) -> None:
        self._store = open_store(place)
        self._place_of = place
        self._file = self._store.open(place)
        self._size = self._file.size()
        self._offset = 0

    def size(self) -> int:
        """Bytes."""
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        self._offset = max(0, start + offset)
        return self._offset

    def read(self, count: int | None = -1) -> bytes:
        left = max(0, self._size - self._offset)
        count = left if count is None or count < 0 else min(count, left)
        block = self._store.read(self._place_of, self._file, count, self._offset) if count else b""
        self._offset += len(block)
        return block

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        block = self.read(len(view))
        view[: len(block)] = block
        return len(block)
