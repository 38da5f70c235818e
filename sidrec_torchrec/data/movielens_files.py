"""The three layouts MovieLens comes in."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from sidrec_torchrec.errors import DataError

_NO_GENRES = "(no genres listed)"
_RATING_COLUMNS = ("userId", "movieId", "rating", "timestamp")


@dataclass(frozen=True)
class Movie:
    """A line of a movie file."""

    item_id: int
    title: str
    genres: list[str]


@dataclass(frozen=True)
class Release:
    """A MovieLens folder with ``ratings.csv`` and ``movies.csv``; the base of the other layouts."""

    folder: Path

    @property
    def ratings_path(self) -> Path:
        return self.folder / "ratings.csv"

    def ratings(self) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """Yields (number of the first rating, (users, movies, ratings, timestamps)), some 30,000 at a time."""
        return _ratings(self.ratings_path, ",", None)

    def movies(self) -> list[Movie]:
        """All movies."""
        path = self.folder / "movies.csv"
        lines = csv.reader(_read_text(path).splitlines())
        header = next(lines, [])
        if header[:3] != ["movieId", "title", "genres"]:
            raise DataError(f"{path}: line 1: expected movieId,title,genres, got {','.join(header)}")
        return [_movie(path, lines.line_num, fields, 3) for fields in lines]

    def users(self) -> pa.Table | None:
        """``user_id`` and what is known of the users; None if nothing is."""
        return None


class DatRelease(Release):
    """``ratings.dat``, ``movies.dat`` and maybe ``users.dat``, with fields between double colons."""

    @property
    def ratings_path(self) -> Path:
        return self.folder / "ratings.dat"

    def ratings(self) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        # To a reader of one-character delimiters, "::" holds an empty column.
        user, item, rating, time = _RATING_COLUMNS
        return _ratings(self.ratings_path, ":", (user, "_1", item, "_2", rating, "_3", time))

    def movies(self) -> list[Movie]:
        path = self.folder / "movies.dat"
        lines = enumerate(_read_text(path).splitlines(), start=1)
        return [_movie(path, number, line.split("::"), 3) for number, line in lines]

    def users(self) -> pa.Table | None:
        return _users(self.folder / "users.dat", "::", {"gender": 1, "age": 2, "occupation": 3})


class Ml100kRelease(Release):
    """``u.data`` (tabs), ``u.item`` (bars; a 0 or 1 for each genre of ``u.genre``) and maybe ``u.user``."""

    @property
    def ratings_path(self) -> Path:
        return self.folder / "u.data"

    def ratings(self) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        return _ratings(self.ratings_path, "\t", _RATING_COLUMNS)

    def movies(self) -> list[Movie]:
        genre_lines = filter(None, _read_text(self.folder / "u.genre").splitlines())
        genres = [line.split("|")[0] for line in genre_lines]
        path = self.folder / "u.item"
        movies = []
        for number, line in enumerate(_read_text(path).splitlines(), start=1):
            fields = line.split("|")
            flags = fields[-len(genres) :]
            named = [genre for genre, flag in zip(genres, flags, strict=False) if flag == "1" and genre != "unknown"]
            movies.append(_movie(path, number, [*fields[:2], "|".join(named), *fields[2:]], 6 + len(genres)))
        return movies

    def users(self) -> pa.Table | None:
        return _users(self.folder / "u.user", "|", {"age": 1, "gender": 2, "occupation": 3})


def find_release(folder: Path) -> Release:
    """The layout of a folder, by the name of its rating file.

    Raises:
        DataError: if there is none of them.
    """
    for release in (Release(folder), DatRelease(folder), Ml100kRelease(folder)):
        if release.ratings_path.exists():
            return release
    raise DataError(
        f"{folder}: no MovieLens files; need ratings.csv and movies.csv, or ratings.dat and movies.dat, or u.data, "
        "u.item and u.genre: unpack the archive and give the folder they lie in"
    )


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file; it comes in the same MovieLens archive as the ratings")
    raw = path.read_bytes()
    try:
        return raw.decode()
    except UnicodeDecodeError:  # the older releases
        return raw.decode("latin-1")


def _movie(path: Path, number: int, fields: list[str], num_fields: int) -> Movie:
    if len(fields) != num_fields or not fields[0].isdecimal():
        raise DataError(f"{path}: line {number}: expected {num_fields} fields, the first a number, got {fields}")
    genres = [genre for genre in fields[2].split("|") if genre and genre != _NO_GENRES]
    return Movie(int(fields[0]), fields[1], genres)


def _users(path: Path, delimiter: str, columns: dict[str, int]) -> pa.Table | None:
    """The user id, which comes first in each line, and the fields at some places."""
    if not path.exists():
        return None
    rows = [line.split(delimiter) for line in _read_text(path).splitlines()]
    for number, row in enumerate(rows, start=1):
        if len(row) != 5 or not row[0].isdecimal():
            raise DataError(f"{path}: line {number}: expected 5 fields, the first a number, got {row}")
    texts = {name: [row[place] for row in rows] for name, place in columns.items()}
    return pa.table({"user_id": pa.array([int(row[0]) for row in rows], pa.int64()), **texts})


def _ratings(
    path: Path, delimiter: str, column_names: tuple[str, ...] | None
) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """Streams a rating file; ``column_names`` None: its first line has them."""
    user, item, rating, time = _RATING_COLUMNS
    types = {user: pa.int64(), item: pa.int64(), rating: pa.float32(), time: pa.int64()}
    first_row = 0
    try:
        with pa.csv.open_csv(
            path,
            read_options=pa.csv.ReadOptions(column_names=column_names, use_threads=False),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, quote_char=False),
            convert_options=pa.csv.ConvertOptions(
                include_columns=list(_RATING_COLUMNS), column_types=types, null_values=[]
            ),
        ) as batches:
            for batch in batches:
                yield first_row, tuple(batch.column(name).to_numpy() for name in _RATING_COLUMNS)
                first_row += batch.num_rows
    except (pa.ArrowException, KeyError) as error:
        raise DataError(f"{path}: {str(error).strip()}; expected lines of {', '.join(_RATING_COLUMNS)}") from error
