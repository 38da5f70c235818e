"""A sample of items with their SIDs and texts, small enough for a page on which one walks down the SIDs digit by digit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.folder import DataFolder
from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.data.items import open_items
from sidrec_torchrec.data.sids import SIDs, open_sids

MOST_ITEMS = 2_000
_MOST_DIGITS = 400_000  # of all items together: about a megabyte
_MOST_LETTERS = 160  # of an item's text


@dataclass(frozen=True)
class Explorer:
    """What the page needs to show the SIDs of some items.

    Args:
        items: of the corpus.
        columns: of the item file whose values are shown.
        ids: of the sampled items, as text.
        texts: of each, what its columns say.
        digits: by tokenizer, of each item the digits of its SID; None for an item that has no SID of it.
    """

    items: int
    columns: tuple[str, ...]
    ids: list[str]
    texts: list[str]
    digits: dict[str, list[list[int] | None]]

    def to_json(self) -> dict[str, Any]:
        """What the page's script reads."""
        return {"ids": self.ids, "texts": self.texts, "digits": self.digits}


def explore(data: DataFolder, sids: Mapping[str, Path]) -> Explorer | None:
    """Draws items, the same ones whenever it is called, and reads what is known of them.

    Reads SIDs and the categorical columns of all items once, in batches.

    Args:
        data: the data folder.
        sids: folders that encode-corpus wrote, by the name of the tokenizer; of the same items.

    Returns:
        None without SIDs.

    Raises:
        DataError: on files that are missing or broken.
    """
    opened = {name: open_sids(folder) for name, folder in sids.items()}
    if not opened:
        return None
    first = next(iter(opened.values()))
    digits = sum(own.spec.num_digits for own in opened.values())
    count = min(MOST_ITEMS, max(1, _MOST_DIGITS // digits), first.num_items)
    chosen = _ids_at(first, np.sort(np.random.default_rng(0).choice(first.num_items, count, replace=False)))
    index = IdIndex(chosen)
    columns, texts = _texts(data, index)
    return Explorer(
        items=first.num_items,
        columns=columns,
        ids=[_shown(value) for value in chosen.to_pylist()],
        texts=texts,
        digits={name: _digits(own, index) for name, own in opened.items()},
    )


def _ids_at(sids: SIDs, rows_M: np.ndarray) -> pa.Array:
    """Ids of the SIDs' rows, which ascend."""
    found, before = [], 0
    for ids, _ in sids.batches():
        here_M = rows_M[(rows_M >= before) & (rows_M < before + len(ids))] - before
        found.append(ids.take(pa.array(here_M)))
        before += len(ids)
    return pa.concat_arrays(found)


def _digits(sids: SIDs, index: IdIndex) -> list[list[int] | None]:
    found: list[list[int] | None] = [None] * len(index)
    for ids, words_NW in sids.batches():
        place_N = index.find(ids)
        known_N = place_N >= 0
        for place, digits in zip(place_N[known_N], sids.spec.unpack(words_NW[known_N]).tolist(), strict=True):
            found[place] = digits
    return found


def _texts(data: DataFolder, index: IdIndex) -> tuple[tuple[str, ...], list[str]]:
    """The columns that say something in words or numbers, and what they say of each item."""
    items = open_items(data, sources=())
    texts = [""] * len(index)
    for batch in items.batches(sources=()):
        place_N = index.find(batch.item_ids)
        for row in np.flatnonzero(place_N >= 0):
            values = (_shown(column[int(row)].as_py()) for column in batch.targets.values())
            texts[place_N[row]] = _cut(" · ".join(value for value in values if value))
    return items.categorical, texts


def _shown(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return "" if value is None else str(value)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"
