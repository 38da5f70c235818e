"""Items from Parquet as tensors: streamed, filtered, shuffled."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sidrec_torchrec.data.format import ItemBatch, Items, Vocabulary, open_items
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
        excluded: int64, sorted item ids to leave out.
        validation_fraction: share of the items, chosen by a hash of their id, that validates.
        part: ``train``, ``validation`` or ``all``.
        published: SIDs to be kept; None for none.
    """

    items: Items
    sources: tuple[str, ...]
    vocabularies: dict[str, Vocabulary]
    excluded: np.ndarray
    validation_fraction: float
    part: str
    published: Published | None = None

    @staticmethod
    def open(
        data: Path,
        sources: tuple[str, ...],
        vocabularies: dict[str, Vocabulary],
        *,
        exclude: Path | None = None,
        validation_fraction: float = 0.0,
        part: str = "all",
        published: Published | None = None,
    ) -> "ItemStream":
        """Opens the items of a data folder.

        Args:
            exclude: Parquet file with a column ``item_id`` of items to leave out; it may have no rows.
            published: SIDs to be kept, which then go with the items.

        Raises:
            DataError: on a missing or broken file or column.
        """
        excluded = np.zeros(0, np.int64) if exclude is None else _read_ids(exclude)
        return ItemStream(
            items=open_items(data, sources=sources, targets=tuple(vocabularies)),
            sources=sources,
            vocabularies=vocabularies,
            excluded=excluded,
            validation_fraction=validation_fraction,
            part=part,
            published=published,
        )

    def blocks(
        self, size: int = 8192, row_groups: Sequence[int] | None = None, *, share: tuple[int, int] | None = None
    ) -> Iterator[tuple[np.ndarray, ItemTensors]]:
        """Item ids, int64 [N], and tensors of at most ``size`` items at a time, in the order of the file's row groups.

        Args:
            size: most items of a block.
            row_groups: which to read, in this order; None for all.
            share: (rank, world size): only this one of as many stretches of the blocks; see ``ParquetTable.batches``.
        """
        for batch in self.items.batches(size, self.sources, tuple(self.vocabularies), row_groups, share=share):
            kept = np.flatnonzero(self._is_part(batch.item_ids))
            if len(kept) == len(batch):
                yield batch.item_ids, self._tensors(batch)
            elif len(kept):
                yield batch.item_ids[kept], self._tensors(batch).select(torch.from_numpy(kept))

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

    def _is_part(self, item_ids_N: np.ndarray) -> np.ndarray:
        kept_N = ~np.isin(item_ids_N, self.excluded) if len(self.excluded) else np.ones(len(item_ids_N), bool)
        if self.part == "all":
            return kept_N
        return kept_N & ((_uniform(item_ids_N) < self.validation_fraction) == (self.part == "validation"))

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


def _read_ids(path: Path) -> np.ndarray:
    """The column ``item_id``, sorted."""
    try:
        return np.sort(pq.read_table(path)["item_id"].to_numpy())
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except KeyError:
        raise DataError(f"{path}: no column 'item_id'") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file, or a broken one ({error})") from error


def _uniform(ids_N: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each id, as good as random, the same everywhere: SplitMix64's mixer (Steele et al. 2014)."""
    x_N = ids_N.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x_N ^ (x_N >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53  # 53 bits: what a double holds
