"""MIND (Microsoft News), from its tab-separated files, to our format.

Columns as the authors document them (github.com/msnews/msnews.github.io, assets/doc/introduction.md, which was read in
full), in files without a first line: ``behaviors.tsv``: impression id, user, time, history, impressions; ``news.tsv``:
id, category, subcategory, title, abstract, URL, entities of the title, entities of the abstract;
``entity_embedding.vec``: entity, 100 numbers.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.conversion import check_float16, half_vectors, with_sources, write_parquet
from sidrec_torchrec.data.csv_files import csv_batches
from sidrec_torchrec.data.event_log import EventLog, check_user_share, write_event_log
from sidrec_torchrec.data.folder import EVENTS_FILE, ITEMS_FILE, DataFolder, DataSchema
from sidrec_torchrec.data.ids import IdIndex, canonical, shown
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.training.config import JobConfig

_BEHAVIORS = ("impression_id", "user", "time", "history", "impressions")
_NEWS = ("news_id", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")
_EVENTS = pa.schema(
    [
        ("user_id", pa.large_string()),
        ("item_id", pa.large_string()),
        ("timestamp", pa.int64()),
        ("label", pa.int8()),
        ("weight", pa.int8()),
        ("kind", pa.string()),
        ("hour", pa.int8()),
        ("impression_id", pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class MindConfig(JobConfig):
    """What to convert.

    Args:
        input: unpacked folders, the earlier first: MINDsmall_train and MINDsmall_dev, say. A test folder has no labels.
        out: where the data folder goes.
        history: whether the clicks before a user's first impression are events too: context, which never counts as a
            target.
        entities: whether ``entity_embedding.vec`` becomes the source ``entity_emb``: the mean of a news item's
            entities.
        text_dim: width of the source ``text_emb``, made of title and abstract; 0 for none.
        embeddings: more sources, as ``.npy`` or ``.parquet`` (see ``conversion.read_embeddings``).
        user_share: share of the users that are kept, above 0.
    """

    input: tuple[Path, ...]
    out: Path
    history: bool = True
    entities: bool = True
    text_dim: int = 256
    embeddings: Path | None = None
    user_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_user_share(self.user_share)
        if not self.input:
            raise ValueError("name at least one folder as input")


def convert_mind(config: MindConfig) -> dict[str, Any]:
    """Converts MIND: impressions of news, clicked or not.

    Each news item of an impression is an event at the impression's time, in the file's order, which is random. Clicks
    before have no time in MIND: they come a second apart, before the first impression of all; their ``weight`` is 0,
    that of impressions 1. Features of events: ``kind`` (history, impression), ``hour``. Targets of items: ``category``,
    ``subcategory``. Memory holds the news, the ids of users, and a 64th of the events.

    Returns:
        Counts: ``items``, ``users``, ``events``, ``history_events``, ``label_rate`` of impressions.

    Raises:
        DataError: if a file is missing, or a line is broken; names file, column and line.
    """
    items = _items(config)
    index, users = IdIndex(canonical(items["item_id"])), IdIndex()
    start = min(int(time_N.min()) for path in config.input for _, time_N in _times(path / "behaviors.tsv"))
    counts = {"history": 0, "positives": 0}

    def fill(log: EventLog) -> None:
        for folder in config.input:
            path = folder / "behaviors.tsv"
            for line, batch in csv_batches(path, _behavior_types(), required=_BEHAVIORS[1:3], names=_BEHAVIORS):
                batch = batch.append_column("line", pa.array(np.arange(line, line + len(batch))))
                batch = batch.take(pa.array(np.flatnonzero(log.is_kept(batch.column("user")))))
                if config.history:
                    counts["history"] += _add_history(log, path, batch, index, users, start)
                else:
                    users.add(canonical(batch.column("user")))
                counts["positives"] += _add_impressions(log, path, batch, index)

    log = write_event_log(config.out / EVENTS_FILE, _EVENTS, fill, user_share=config.user_share)
    write_parquet(config.out / ITEMS_FILE, items)
    schema = DataSchema(event_features=("kind", "hour"), event_weight="weight")
    DataFolder(config.out, schema).write_schema()
    return {
        "items": items.num_rows,
        "users": len(users),
        "events": log.num_events,
        "history_events": counts["history"],
        "label_rate": counts["positives"] / max(log.num_events - counts["history"], 1),
    }


def _behavior_types() -> dict[str, pa.DataType]:
    return {name: pa.int64() if name == "impression_id" else pa.string() for name in _BEHAVIORS}


def _add_history(log: EventLog, path: Path, batch: pa.RecordBatch, index: IdIndex, users: IdIndex, start: int) -> int:
    """Adds the clicks that each user who is met for the first time had before; returns how many."""
    ids = canonical(batch.column("user"))
    codes = ids.dictionary_encode()
    first = np.unique(codes.indices.to_numpy(), return_index=True)[1]
    new = first[users.find(ids.take(pa.array(first))) < 0]
    users.add(ids)
    batch = batch.take(pa.array(np.sort(new)))
    row_N, news = _words(batch.column("history"))
    _check_known(path, batch, row_N, news, index)
    count_R = np.bincount(row_N, minlength=len(batch))
    place_N = np.arange(len(row_N)) - np.repeat(np.cumsum(count_R) - count_R, count_R)
    time_N = start - count_R[row_N] + place_N
    _add(log, batch, row_N, news, time_N, np.ones(len(row_N), np.int8), "history")
    return len(row_N)


def _add_impressions(log: EventLog, path: Path, batch: pa.RecordBatch, index: IdIndex) -> int:
    """Adds what was shown; returns how many were clicked."""
    row_N, words = _words(batch.column("impressions"))
    is_labelled_N = pc.match_substring_regex(words, "-[01]$").to_numpy(zero_copy_only=False)
    if not is_labelled_N.all():
        bad = int(np.argmin(is_labelled_N))
        line = batch.column("line")[int(row_N[bad])].as_py()
        raise DataError(
            f"{path}: line {line}: column 'impressions' has '{words[bad]}'; each news id needs -1 or -0 behind it, which "
            "MIND's test folder does not have"
        )
    news, label_N = pc.utf8_slice_codeunits(words, 0, -2), pc.ends_with(words, "-1").to_numpy(zero_copy_only=False)
    _check_known(path, batch, row_N, news, index)
    _add(log, batch, row_N, news, _seconds(path, batch)[row_N], label_N.astype(np.int8), "impression")
    return int(label_N.sum())


def _add(
    log: EventLog,
    batch: pa.RecordBatch,
    row_N: np.ndarray,
    news: pa.Array,
    time_N: np.ndarray,
    label_N: np.ndarray,
    kind: str,
) -> None:
    rows = pa.array(row_N)
    log.add(
        {
            "user_id": batch.column("user").take(rows),
            "item_id": news,
            "timestamp": time_N,
            "label": label_N,
            "weight": np.full(len(row_N), kind == "impression", np.int8),
            "kind": pa.repeat(kind, len(row_N)),
            "hour": (time_N // 3600 % 24).astype(np.int8),
            "impression_id": batch.column("impression_id").take(rows),
        }
    )


def _words(column: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Words between spaces: the row of each, int64 [N], and the words."""
    lists = pc.split_pattern(pc.utf8_trim_whitespace(pc.fill_null(column, "")), " ")
    words, row_N = lists.flatten(), pc.list_parent_indices(lists).to_numpy().astype(np.int64)
    kept = np.flatnonzero(pc.utf8_length(words).to_numpy() > 0)
    return row_N[kept], words.take(pa.array(kept)).cast(pa.large_string())


def _check_known(path: Path, batch: pa.RecordBatch, row_N: np.ndarray, news: pa.Array, index: IdIndex) -> None:
    place_N = index.find(news)
    if len(place_N) and place_N.min() < 0:
        bad = int(np.argmin(place_N))
        line = batch.column("line")[int(row_N[bad])].as_py()
        raise DataError(
            f"{path}: line {line}: news {shown(news, bad)} is in no news.tsv; name the folder that has it, too"
        )


def _times(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """The time column alone, in seconds."""
    for line, batch in csv_batches(path, {"time": pa.string()}, required=("time",), names=_BEHAVIORS):
        yield line, _seconds(path, batch.append_column("line", pa.array(np.arange(line, line + len(batch)))))


def _seconds(path: Path, batch: pa.RecordBatch) -> np.ndarray:
    time = pc.strptime(batch.column("time"), format="%m/%d/%Y %I:%M:%S %p", unit="s", error_is_null=True)
    if time.null_count:
        row = int(np.argmax(time.is_null().to_numpy(zero_copy_only=False)))
        line, text = batch.column("line")[row].as_py(), batch.column("time")[row].as_py()
        raise DataError(f"{path}: line {line}: column 'time' is '{text}'; expected MM/DD/YYYY HH:MM:SS AM or PM")
    return time.cast(pa.int64()).to_numpy()


def _items(config: MindConfig) -> pa.Table:
    """News of all folders, each once, with its sources."""
    columns: dict[str, list[Any]] = {name: [] for name in ("item_id", "category", "subcategory", "title", "text")}
    vectors = _entity_vectors(config.input) if config.entities else {}
    means: list[np.ndarray | None] = []
    seen: set[str] = set()
    for folder in config.input:
        path = folder / "news.tsv"
        for line, batch in csv_batches(path, dict.fromkeys(_NEWS, pa.string()), required=("news_id",), names=_NEWS):
            for number, news in enumerate(batch.to_pylist(), start=line):
                if news["news_id"] in seen:
                    continue
                seen.add(news["news_id"])
                text = ". ".join(filter(None, (news["title"], news["abstract"])))
                named = (news["news_id"], news["category"], news["subcategory"], news["title"], text)
                for name, value in zip(columns, named, strict=True):
                    columns[name].append(value)
                if vectors:
                    found = [vectors[entity] for entity in _entities(path, number, news) if entity in vectors]
                    means.append(np.mean(found, axis=0) if found else None)
    items = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    if vectors:
        zeros = np.zeros(len(next(iter(vectors.values()))), np.float32)
        x_ND = np.stack([zeros if mean is None else mean for mean in means])
        check_float16(x_ND, f"{config.input[0]}: entity_embedding.vec, news ")
        items = items.append_column("entity_emb", half_vectors(x_ND, np.array([mean is not None for mean in means])))
    return with_sources(items, text_dim=config.text_dim, embeddings=config.embeddings)


def _entities(path: Path, line: int, news: dict[str, Any]) -> list[str]:
    """Wikidata ids of title and abstract, each once."""
    found: dict[str, None] = {}
    for name in ("title_entities", "abstract_entities"):
        try:
            found |= dict.fromkeys(entity["WikidataId"] for entity in json.loads(news[name] or "[]"))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: line {line}: column '{name}' is no JSON list of entities: {error!r}") from error
    return list(found)


def _entity_vectors(folders: tuple[Path, ...]) -> dict[str, np.ndarray]:
    vectors: dict[str, np.ndarray] = {}
    for folder in folders:
        path = folder / "entity_embedding.vec"
        if not path.is_file():
            raise DataError(f"{path}: no such file; do without: --entities false")
        width = 0
        with path.open(encoding="utf-8") as lines:
            for number, text in enumerate(lines, start=1):
                if not text.strip():
                    continue
                entity, *values = text.split()
                width = width or len(values)
                try:
                    vectors.setdefault(entity, np.array(values, np.float32))
                except ValueError as error:
                    raise DataError(f"{path}: line {number}: {error}") from None
                if len(values) != width:
                    raise DataError(
                        f"{path}: line {number}: {len(values)} numbers, expected {width} as in the lines before"
                    )
    return vectors
