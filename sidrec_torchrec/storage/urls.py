"""URLs and their mirrors: names alone, nothing is read."""

import hashlib
import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

IN, OUT = "in", "out"
_MADE = "made"
_URL = re.compile(
    r"([a-zA-Z][a-zA-Z0-9+.-]+):(?:/+(.*))?", re.DOTALL
)  # pathlib leaves one slash of two, and none at the end
_SECRET = re.compile(r"secret|password|token|access_key|session|\bsig\b|signature|account_key", re.IGNORECASE)
_AS_OTHERS = {"s3a": "s3", "s3n": "s3"}  # as Hadoop and Spark name the clients that they have of one store
_NAMED_BEFORE = ("abfs", "abfss", "hdfs")  # container@account.host, user@host


@dataclass(frozen=True)
class Place:
    """Where a mirror's file is.

    Args:
        area: ``IN`` or ``OUT``.
        base: scheme, bucket or host, and query: ``s3://bucket?region=eu-north-1``.
        key: the path there, without a slash before it.
    """

    area: str
    base: str
    key: str

    @property
    def url(self) -> str:
        """As it is typed."""
        head, mark, query = self.base.partition("?")
        return f"{head}/{self.key}{mark}{query}"

    @property
    def short(self) -> str:
        """As messages have it: without the query."""
        return f"{self.base.partition('?')[0]}/{self.key}"

    @property
    def path(self) -> Path:
        """The mirror."""
        return root() / self.area / quote(self.base, safe="") / self.key

    def beside(self, name: str) -> "Place":
        """Another name in its folder."""
        return Place(self.area, self.base, posixpath.join(posixpath.dirname(self.key), name))


def root() -> Path:
    """The folder of all mirrors: ``$SIDREC_STORAGE``, or ``storage`` in the cache folder."""
    named = os.environ.get("SIDREC_STORAGE")
    cache = os.environ.get("SIDREC_CACHE") or "~/.cache/sidrec_torchrec"
    return Path(os.path.realpath(os.path.expanduser(named or f"{cache}/storage")))


def is_url(path: str | Path) -> bool:
    """Whether it is one, also where pathlib has taken a slash from it."""
    return _URL.fullmatch(str(path)) is not None


def place_of_url(url: str | Path, area: str) -> Place:
    """Where a URL's mirror is.

    Raises:
        ValueError: if it has credentials, which would end in logs; or no bucket, or is the whole disk.
    """
    found = _URL.fullmatch(str(url))
    assert found is not None
    scheme, (rest, mark, query) = found[1].lower(), (found[2] or "").partition("?")
    scheme = _AS_OTHERS.get(scheme, scheme)
    query = re.sub(r"(https?):/+", r"\1://", query)
    if scheme == "file":
        if not rest:
            raise ValueError("file:///: names no file or folder")
        base, key = "file://", rest
    else:
        host, _, key = rest.partition("/")
        before, at, _ = host.rpartition("@")
        if "@" in query or _SECRET.search(query) or (at and (scheme not in _NAMED_BEFORE or ":" in before)):
            raise ValueError(
                f"a URL of {scheme}:// with credentials, which would end in logs; give them by the environment, as docs/storage.md says"
            )
        if not host:
            raise ValueError(f"{scheme}://{rest}: names no bucket, or host")
        base = f"{scheme}://{host}"
    key = posixpath.normpath("/" + key).lstrip("/")
    return Place(area, base + mark + query, key)


def place_of(path: Path) -> Place | None:
    """Where what a path mirrors is; None of any other path."""
    text = str(path)
    if "%3A%2F%2F" not in text:  # of most paths, and quick
        return None
    top = f"{root()}{os.sep}"
    if not text.startswith(top):
        return None
    area, _, rest = text[len(top) :].partition(os.sep)
    base, _, key = rest.partition(os.sep)
    return Place(area, unquote(base), key) if area in (IN, OUT) and base else None


def output_of(path: Path) -> Path:
    """The mirror that is worked in, of one that is read; any other path as it is."""
    place = place_of(path)
    return path if place is None else Place(OUT, place.base, place.key).path


def as_urls(text: str) -> str:
    """A text with the URLs in place of their mirrors, for people."""
    if "%3A%2F%2F" not in text:
        return text
    mirrors = re.escape(f"{root()}{os.sep}") + r"(?:in|out)/([^/\s]*%3A%2F%2F[^/\s'\"]*)"
    return re.sub(mirrors, lambda found: unquote(found[1]).partition("?")[0], text)


def absolute(path: Path) -> str:
    """A path that means the same on another machine, as far as it can: a mirror's URL, or the whole local path."""
    place = place_of(path)
    return str(path.resolve()) if place is None else place.url


def relative(path: Path, folder: Path) -> str:
    """A path as seen from a folder, for both to be moved together; ``absolute`` where they are in different stores."""
    own, its = place_of(path), place_of(folder)
    if own is None and its is None:
        return os.path.relpath(path.resolve(), folder.resolve())
    if own is None or its is None or own.base != its.base:
        return absolute(path)
    return posixpath.relpath("/" + own.key, "/" + its.key)


def made_beside(folder: Path, file: str) -> Path:
    """Where this machine keeps what it makes of a folder, to read it quickly: the folder itself, or, of a mirror, a place by its own.

    Args:
        folder: it.
        file: in it; another content of it is another place.
    """
    place = place_of(folder)
    if place is None:
        return folder
    digest = hashlib.sha256(f"{place.url}\n".encode() + (folder / file).read_bytes()).hexdigest()
    return root() / _MADE / digest[:32]


def is_made_beside(path: Path) -> bool:
    """Whether a path is in such a place by its own, where each machine makes its own files."""
    return path.is_relative_to(root() / _MADE)
