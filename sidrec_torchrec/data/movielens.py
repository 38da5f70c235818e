"""MovieLens, from the files GroupLens publishes (grouplens.org/datasets/movielens), to our format."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.conversion import EventSink, with_sources, write_parquet, write_sorted_events
from sidrec_torchrec.data.folder import EVENTS_FILE, ITEMS_FILE, USERS_FILE
from sidrec_torchrec.data.movielens_files import Movie, find_release
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.training.config import JobConfig

_YEAR = re.compile(r"\((\d{4})\)\s*$")


@dataclass(frozen=True, kw_only=True)
class MovieLensConfig(JobConfig):
    """What to convert.

    Args:
        input: the unpacked folder: ml-100k (``u.data``, ``u.item``), ml-1m or ml-10m (``ratings.dat``,
            ``movies.dat``), or ml-20m, ml-25m, ml-32m, ml-latest (``ratings.csv``, ``movies.csv``).
        out: where the data folder goes.
        min_rating: from this rating on an event's label is 1.
        text_dim: width of the source ``text_emb``, made of title and genres; 0 for none.
        embeddings: more sources, as ``.npy`` or ``.parquet`` (see ``conversion.read_embeddings``).
    """

    input: Path
    out: Path
    min_rating: float = 4.0
    text_dim: int = 256
    embeddings: Path | None = None


def convert_movielens(config: MovieLensConfig) -> dict[str, Any]:
    """Converts a MovieLens release.

    Writes ``items.parquet``, ``events.parquet`` and, if age and so on are known, ``users.parquet``. Ids are
    MovieLens' own. Items: ``title``, ``year``, ``genres`` (list), ``text``. Events also keep ``rating``. Memory holds the
    movies, and a 64th of the events at a time.

    Returns:
        Counts: ``items``, ``events``, ``label_rate``.

    Raises:
        DataError: if the folder has no known layout, or a line is broken; names file and line.
    """
    release, out = find_release(Path(config.input)), Path(config.out)
    items = _items_table(release.movies())
    items = with_sources(items, text_dim=config.text_dim, embeddings=config.embeddings)
    item_ids = np.sort(items["item_id"].to_numpy())

    def fill(sink: EventSink) -> None:
        for first_row, (user_N, item_N, rating_N, time_N) in release.ratings():
            unknown_N = ~np.isin(item_N, item_ids)
            if unknown_N.any():
                row = int(np.argmax(unknown_N))
                raise DataError(
                    f"{release.ratings_path}: rating {first_row + row}: movie {item_N[row]} is not in the movie file"
                )
            sink.add(user_N, item_N, time_N, rating_N)

    sink = write_sorted_events(out / EVENTS_FILE, config.min_rating, fill)
    write_parquet(out / ITEMS_FILE, items)
    users = release.users()
    if users is not None:
        write_parquet(out / USERS_FILE, users)
    return {"items": items.num_rows, "events": sink.num_events, "label_rate": sink.num_positives / sink.num_events}


def _items_table(movies: list[Movie]) -> pa.Table:
    years = [_YEAR.search(movie.title) for movie in movies]
    return pa.table(
        {
            "item_id": pa.array([movie.item_id for movie in movies], pa.int64()),
            "title": pa.array([movie.title for movie in movies], pa.string()),
            "year": pa.array([int(year[1]) if year else None for year in years], pa.int32()),
            "genres": pa.array([movie.genres for movie in movies], pa.list_(pa.string())),
            "text": pa.array([". ".join([movie.title, *movie.genres]) for movie in movies], pa.string()),
        }
    )
