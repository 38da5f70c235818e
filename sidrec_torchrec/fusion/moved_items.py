"""What is known of items that move to other SIDs: their own vectors, and what a move costs their sources."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.model import ItemTensors
from sidrec_torchrec.fusion.report import TokenizerReport
from sidrec_torchrec.fusion.tokenizer import Tokenizer


@dataclass(frozen=True)
class MovedItems:
    """Items that SIDs have been made of.

    Args:
        items: item file, or the data folder that has it.
        tokenizer: that made the SIDs.
    """

    items: Path
    tokenizer: Tokenizer

    def of(self, item_ids: pa.Array, words_NW: np.ndarray) -> "KnownItems":
        """Those with these ids, canonical [N], and SIDs, int64 [N, W]."""
        return KnownItems(self.items, self.tokenizer, item_ids, words_NW)


@dataclass(frozen=True)
class KnownItems(MovedItems):
    """Items with ids and SIDs; an item that the item file has no more is known by its SID alone.

    Args:
        item_ids: canonical [N].
        words_NW: int64 [N, W], the SIDs that the tokenizer gave them.
    """

    item_ids: pa.Array
    words_NW: np.ndarray

    def vectors(self, rows_M: np.ndarray) -> np.ndarray:
        """The items' own vectors in the codec's space, float64 [M, D]; where there is none, the vector of the SID."""
        x_MD = self.tokenizer.codec.decode(torch.from_numpy(self.words_NW[rows_M])).double().numpy()
        for place_B, items in self._read(rows_M):
            x_MD[place_B] = self.tokenizer.latents(items).numpy()
        return x_MD

    def errors(self, rows_M: np.ndarray, words_NW: np.ndarray) -> dict[str, dict[str, float]]:
        """Relative squared error of the items' sources, decoded from their own SIDs, ``before``, and from ``words_NW``, ``after``."""
        spec = self.tokenizer.codec.spec
        results = {}
        reports = {name: TokenizerReport(self.tokenizer, (spec.num_digits,)) for name in ("before", "after")}
        for place_B, items in self._read(rows_M):
            for report, words in zip(reports.values(), (self.words_NW, words_NW), strict=True):
                report.update(items, torch.from_numpy(spec.unpack(words[rows_M[place_B]])))
        for name, report in reports.items():
            results[name] = report.result(words_NW[rows_M])["reconstruction"]
        return {source: {name: results[name][source][-1] for name in results} for source in results["before"]}

    def _read(self, rows_M: np.ndarray) -> Iterator[tuple[np.ndarray, ItemTensors]]:
        """The items' content, a block at a time, and which of the rows each is."""
        stream = ItemStream.open(self.items, tuple(self.tokenizer.model.config.read_sources), {})
        places = IdIndex(self.item_ids.take(pa.array(rows_M)))
        is_moved_N = places.find(stream.items.ids()) >= 0
        for item_ids, items in replace(stream, rows=is_moved_N).blocks():
            yield places.find(item_ids), items
