"""Items from Parquet as tensors: streamed, filtered, shuffled."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sidrec_torchrec.data.format import DataFolder, ItemBatch, Items, Vocabulary, open_items
from sidrec_torchrec.data.ids import IdIndex, keys
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.fusion.model import DIGITS, ItemTensors
from sidrec_torchrec.fusion.published import Published

_SAMPLE_ITEMS = 32_768


@dataclass(frozen=True, kw_only=True)
class ItemStream:
    """The items of a corpus that belong to one part.

    Args:
        items: the item file.
        sources: sources to read.
        vocabularies: classes by target to read.
        excluded: item ids to leave out.
        validation_fraction: share of the items, chosen by a hash of their id, that validates.
        part: ``train``, ``validation`` or ``all``.
        rows: bool [num_items], which of the file's rows to read; None for all. Row groups without any are not opened.
        published: SIDs to be kept; None for none.
    """

    items: Items
    sources: tuple[str, ...]
    vocabularies: dict[str, Vocabulary]
    excluded: IdIndex
    validation_fraction: float
    part: str
    rows: np.ndarray | None = None
    published: Published | None = None

    @staticmethod
    def open(
        data: Path | DataFolder | Any,
        sources: tuple[str, ...],
        vocabularies: dict[str, Vocabulary],
        *,
        exclude: Path | None = None,
        validation_fraction: float = 0.0,
        part: str = "all",
        published: Published | None = None,
    ) -> "ItemStream":
        """Opens the items of a data folder, or of a frame.

        Args:
            data: as ``open_items`` has it.
            sources: sources to read.
            vocabularies: classes by target to read.
            exclude: Parquet file with a column ``item_id`` of items to leave out; it may have no rows.
            published: SIDs to be kept, which then go with the items.

        Raises:
            DataError: on a missing or broken file or column.
        """
        return ItemStream(
            items=open_items(data, sources=sources, targets=tuple(vocabularies)),
            sources=sources,
            vocabularies=vocabularies,
            excluded=IdIndex() if exclude is None else _read_ids(exclude),
            validation_fraction=validation_fraction,
            part=part,
            published=published,
        )

    def blocks(
        self, size: int = 8192, row_groups: Sequence[int] | None = None, *, share: tuple[int, int] | None = None
    ) -> Iterator[tuple[pa.Array, ItemTensors]]:
        """Item ids, canonical [N], and tensors of at most ``size`` items at a time, in the order of the file's row groups.

        Args:
            size: most items of a block.
            row_groups: which to read, in this order; None for all.
            share: (rank, world size): only this one of as many stretches of the blocks; see ``ParquetTable.batches``.
        """
        if self.rows is not None and row_groups is None:
            row_groups = self._row_groups(self.rows)
        for batch in self.items.batches(size, self.sources, tuple(self.vocabularies), row_groups, share=share):
            kept = np.flatnonzero(self._is_part(batch))
            if len(kept) == len(batch):
                yield batch.item_ids, self._tensors(batch)
            elif len(kept):
                yield batch.item_ids.take(pa.array(kept)), self._tensors(batch).select(torch.from_numpy(kept))

    def again(self, row_groups: Sequence[int] | None = None) -> Iterator[ItemTensors]:
        """As ``blocks``, to go through many times: a corpus of at most 65,536 items is read once and stays in memory."""
        if self._few is not None:
            return iter(self._few)
        return (block for _, block in self.blocks(row_groups=row_groups))

    @cached_property
    def _few(self) -> list[ItemTensors] | None:
        return [block for _, block in self.blocks()] if self.items.num_items <= 2 * _SAMPLE_ITEMS else None

    def shuffled(self, batch_size: int, seed: int) -> Iterator[ItemTensors]:
        """Batches, all full but the last, in an order that ``seed`` draws: of row groups, and within a buffer.

        Each time the buffer is full, a random half of it leaves; 65,536 items, or two batches if that is more.
        """
        generator = torch.Generator().manual_seed(seed)
        capacity = max(2 * _SAMPLE_ITEMS, 2 * batch_size)
        held = None
        order = torch.randperm(self.items.table.num_row_groups, generator=generator).tolist()
        for block in self.again(order):
            held = block if held is None else held.followed_by(block)
            if len(held) >= capacity:
                held = held.select(torch.randperm(len(held), generator=generator))
                leaving = capacity // 2 // batch_size * batch_size
                yield from (held.select(slice(i, i + batch_size)) for i in range(0, leaving, batch_size))
                held = held.select(slice(leaving, None))
        if held is not None:
            rows = torch.randperm(len(held), generator=generator)
            yield from (held.select(rows[i : i + batch_size]) for i in range(0, len(held), batch_size))

    def sample(self, seed: int) -> ItemTensors:
        """At most 32,768 items, drawn by ``seed``, to start a model from."""
        return next(self.shuffled(_SAMPLE_ITEMS, seed))

    def _is_part(self, batch: ItemBatch) -> np.ndarray:
        kept_N = self.excluded.find(batch.item_ids) < 0
        if self.rows is not None:
            kept_N &= self.rows[batch.first_row : batch.first_row + len(batch)]
        if self.part == "all":
            return kept_N
        return kept_N & ((_uniform(keys(batch.item_ids)) < self.validation_fraction) == (self.part == "validation"))

    def _row_groups(self, rows: np.ndarray) -> list[int]:
        """Those that hold any of the rows."""
        sizes = [size for part in self.items.table.parts for size in part.row_groups]
        ends, before = np.cumsum(sizes), np.concatenate([[0], np.cumsum(rows)])
        return np.flatnonzero(before[ends] > before[ends - sizes]).tolist()

    def _tensors(self, batch: ItemBatch) -> ItemTensors:
        published = {} if self.published is None else {DIGITS: self.published.digits(batch.item_ids)}
        encoded = {name: v.encode(batch.targets[name]) for name, v in self.vocabularies.items()}
        return ItemTensors(
            sources={name: torch.from_numpy(x) for name, x in batch.sources.items()},
            present={name: torch.from_numpy(x) for name, x in batch.present.items()},
            labels={name: torch.from_numpy(labels) for name, (labels, _) in encoded.items()},
            labelled={name: torch.from_numpy(mask) for name, (_, mask) in encoded.items()},
            published=published,
        )


def check_widths(items: Items, widths: Mapping[str, int]) -> None:
    """Raises DataError if a source is of another width than the tokenizer was trained on, by source."""
    for name, dim in items.source_dims.items():
        if dim != widths[name]:
            raise DataError(f"{items.path}: source '{name}' is {dim} wide, the tokenizer was trained on {widths[name]}")


def _read_ids(path: Path) -> IdIndex:
    """The column ``item_id``."""
    table = ParquetTable.open(path, may_be_empty=True)
    table.require_ids("item_id")
    return IdIndex(table.read_unique_ids("item_id"))


def _uniform(keys_N: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each key of an id, as good as random, the same everywhere: SplitMix64's mixer (Steele et al. 2014)."""
    x_N = keys_N.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x_N ^ (x_N >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53  # 53 bits: what a double holds
