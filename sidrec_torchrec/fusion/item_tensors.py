"""Items from Parquet as tensors: streamed, filtered, shuffled."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from sidrec_torchrec.data.format import ItemBatch, Items, Vocabulary, open_items
from sidrec_torchrec.fusion.model import ItemTensors

_BUFFER_ITEMS = 32_768  # items held to shuffle


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
    """

    items: Items
    sources: tuple[str, ...]
    vocabularies: dict[str, Vocabulary]
    excluded: np.ndarray
    validation_fraction: float
    part: str

    @staticmethod
    def open(
        data: Path,
        sources: tuple[str, ...],
        vocabularies: dict[str, Vocabulary],
        *,
        exclude: Path | None = None,
        validation_fraction: float = 0.0,
        part: str = "all",
    ) -> "ItemStream":
        """Opens the items of a data folder.

        Args:
            exclude: Parquet file with a column ``item_id`` of items to leave out.
        """
        excluded = np.zeros(0, np.int64) if exclude is None else np.sort(pq.read_table(exclude)["item_id"].to_numpy())
        return ItemStream(
            items=open_items(data, sources=sources, targets=tuple(vocabularies)),
            sources=sources,
            vocabularies=vocabularies,
            excluded=excluded,
            validation_fraction=validation_fraction,
            part=part,
        )

    def blocks(self, size: int = 8192) -> Iterator[tuple[np.ndarray, ItemTensors]]:
        """Item ids, int64 [N], and tensors of at most ``size`` items at a time, in file order."""
        for batch in self.items.batches(size, sources=self.sources, targets=tuple(self.vocabularies)):
            kept = np.flatnonzero(self._is_part(batch.item_ids))
            if len(kept):
                tensors = self._tensors(batch)
                yield batch.item_ids[kept], tensors.select(torch.from_numpy(kept))

    def shuffled(self, batch_size: int, seed: int) -> Iterator[ItemTensors]:
        """Batches in an order that ``seed`` draws, shuffled within a buffer of 32,768 items."""
        generator = torch.Generator().manual_seed(seed)
        for _, block in self.blocks(_BUFFER_ITEMS):
            for rows in torch.randperm(len(block), generator=generator).split(batch_size):
                yield block.select(rows)

    def sample(self) -> ItemTensors:
        """The first block of at most 32,768 items, to start a model from."""
        return next(self.blocks(_BUFFER_ITEMS))[1]

    def _is_part(self, item_ids_N: np.ndarray) -> np.ndarray:
        kept_N = ~np.isin(item_ids_N, self.excluded)
        if self.part == "all":
            return kept_N
        draws_N = np.array([zlib.crc32(i.to_bytes(8, "little", signed=True)) for i in item_ids_N.tolist()]) / 2**32
        return kept_N & ((draws_N < self.validation_fraction) == (self.part == "validation"))

    def _tensors(self, batch: ItemBatch) -> ItemTensors:
        encoded = {name: v.encode(batch.targets[name]) for name, v in self.vocabularies.items()}
        return ItemTensors(
            sources={name: torch.from_numpy(x) for name, x in batch.sources.items()},
            present={name: torch.from_numpy(x) for name, x in batch.present.items()},
            labels={name: torch.from_numpy(labels) for name, (labels, _) in encoded.items()},
            labelled={name: torch.from_numpy(mask) for name, (_, mask) in encoded.items()},
        )
