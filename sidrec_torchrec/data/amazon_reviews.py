"""Amazon Reviews (2018 and 2023), from the JSON-lines files its authors publish, to our format."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.conversion import EventSink, with_sources, write_parquet, write_sorted_events
from sidrec_torchrec.data.folder import EVENTS_FILE, ITEMS_FILE
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.training.config import JobConfig

USER_IDS_FILE = "user_ids.parquet"

# The names of one thing in the releases of 2023 and 2018.
_USER = ("user_id", "reviewerID")
_ITEM = ("parent_asin", "asin")
_RATING = ("rating", "overall")
_MILLISECONDS, _SECONDS = "timestamp", "unixReviewTime"
_BATCH = 1 << 16


@dataclass(frozen=True, kw_only=True)
class AmazonReviewsConfig(JobConfig):
    """What to convert.

    Args:
        reviews: ``.jsonl`` or ``.json``, gzipped or not: one review a line.
        metadata: likewise, one item a line.
        out: where the data folder goes.
        min_events: users with fewer reviews are left out.
        min_rating: from this rating on an event's label is 1.
        text_dim: width of the source ``text_emb``, made of the items' texts; 0 for none.
        embeddings: more sources, as ``.npy`` or ``.parquet`` (see ``conversion.read_embeddings``).
    """

    reviews: Path
    metadata: Path
    out: Path
    min_events: int = 5
    min_rating: float = 4.0
    text_dim: int = 256
    embeddings: Path | None = None


def convert_amazon_reviews(config: AmazonReviewsConfig) -> dict[str, Any]:
    """Converts Amazon reviews.

    Writes ``items.parquet``, ``events.parquet`` and ``user_ids.parquet``. Users and items are
    numbered from 0 as they first come; ``user_ids.parquet`` and the column ``asin`` of the items keep the names they had.
    Items: those that are reviewed, with ``title``, ``categories`` (list), ``brand`` and ``text`` (title, features,
    description); without metadata these are null. Events also keep ``rating``; timestamps are seconds. The reviews are
    read twice; memory holds the ids, the texts of the items, and a 64th of the events.

    Returns:
        Counts: ``items``, ``items_without_metadata``, ``users``, ``events``, ``label_rate``.

    Raises:
        DataError: if a file is missing or cut short, or a line is broken; names file and line.
    """
    reviews, metadata, out = Path(config.reviews), Path(config.metadata), Path(config.out)
    counts = Counter(_first(record, _USER, reviews, line) for line, record in _read_lines(reviews))
    user_numbers: dict[str, int] = {}
    item_numbers: dict[str, int] = {}

    def fill(sink: EventSink) -> None:
        rows: list[tuple[int, int, int, float]] = []
        for line, record in _read_lines(reviews):
            user = _first(record, _USER, reviews, line)
            if counts[user] < config.min_events:
                continue
            item = _first(record, _ITEM, reviews, line)
            rows.append(
                (
                    user_numbers.setdefault(user, len(user_numbers)),
                    item_numbers.setdefault(item, len(item_numbers)),
                    _seconds(record, reviews, line),
                    _number(record, _RATING, reviews, line),
                )
            )
            if len(rows) == _BATCH:
                _flush(rows, sink)
        _flush(rows, sink)

    sink = write_sorted_events(out / EVENTS_FILE, config.min_rating, fill)
    items, num_bare = _items_table(metadata, item_numbers)
    items = with_sources(items, text_dim=config.text_dim, embeddings=config.embeddings)
    write_parquet(out / ITEMS_FILE, items)
    numbers = pa.array(user_numbers.values(), pa.int64())
    write_parquet(out / USER_IDS_FILE, pa.table({"user_id": numbers, "reviewer": list(user_numbers)}))
    return {
        "items": items.num_rows,
        "items_without_metadata": num_bare,
        "users": len(user_numbers),
        "events": sink.num_events,
        "label_rate": sink.num_positives / sink.num_events,
    }


def _flush(rows: list[tuple[int, int, int, float]], sink: EventSink) -> None:
    if rows:
        user_N, item_N, time_N, rating_N = zip(*rows, strict=True)
        sink.add(np.array(user_N), np.array(item_N), np.array(time_N), np.array(rating_N))
        rows.clear()


def _items_table(metadata: Path, item_numbers: dict[str, int]) -> tuple[pa.Table, int]:
    """The items in the order of their numbers, and how many have no metadata."""
    num_items = len(item_numbers)
    titles: list[str | None] = [None] * num_items
    categories: list[list[str] | None] = [None] * num_items
    brands: list[str | None] = [None] * num_items
    texts = [""] * num_items
    described = np.zeros(num_items, bool)
    for line, record in _read_lines(metadata):
        number = item_numbers.get(_first(record, _ITEM, metadata, line))
        if number is None:
            continue
        described[number] = True
        titles[number] = _text(record.get("title")) or None
        categories[number] = _strings(record.get("categories") or record.get("category"))
        brands[number] = _text(record.get("store") or record.get("brand")) or None
        fields = (record.get("title"), record.get("features") or record.get("feature"), record.get("description"))
        texts[number] = " ".join(filter(None, map(_text, fields)))
    if not described.any():
        raise DataError(f"{metadata}: describes none of the {num_items} reviewed items; is it of another category?")
    table = pa.table(
        {
            "item_id": pa.array(range(num_items), pa.int64()),
            "asin": pa.array(item_numbers, pa.string()),
            "title": pa.array(titles, pa.string()),
            "categories": pa.array(categories, pa.list_(pa.string())),
            "brand": pa.array(brands, pa.string()),
            "text": pa.array(texts, pa.string()),
        }
    )
    return table, int((~described).sum())


def _text(value: Any) -> str:
    return " ".join(_strings(value))


def _strings(value: Any) -> list[str]:
    """The strings of a field that holds one string, or a list of them, or lists of lists (2014)."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list):
        return list(dict.fromkeys(text for part in value for text in _strings(part)))
    return []


def _read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, record)."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    line = 0
    try:
        with _open(path) as file:
            for line, text in enumerate(file, start=1):
                record = json.loads(text)
                if not isinstance(record, dict):
                    raise DataError(f"{path}: line {line}: not a JSON object")
                yield line, record
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {line}: not JSON ({error}); need one JSON object a line") from error
    except (EOFError, zlib.error, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read past line {line}: {error}; download it again") from error


def _open(path: Path) -> TextIO:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _first(record: dict[str, Any], names: tuple[str, ...], path: Path, line: int) -> Any:
    """The value under the first name that is there."""
    for name in names:
        value = record.get(name)
        if value is not None:
            return value
    raise DataError(f"{path}: line {line}: no {' or '.join(names)}; it has {', '.join(record)}")


def _number(record: dict[str, Any], names: tuple[str, ...], path: Path, line: int) -> float:
    value = _first(record, names, path, line)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{path}: line {line}: {' or '.join(names)} is {value!r}, not a number")
    return value


def _seconds(record: dict[str, Any], path: Path, line: int) -> int:
    if _MILLISECONDS in record:
        return int(_number(record, (_MILLISECONDS,), path, line)) // 1000
    return int(_number(record, (_SECONDS, _MILLISECONDS), path, line))
