"""SIDs that are out already: what a refreshed tokenizer is asked to keep."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.sids import read_sids


@dataclass(frozen=True)
class Published:
    """The SIDs of a corpus that was encoded before. Made by ``open``.

    Args:
        ids: item ids, sorted.
        words_NW: their packed SIDs, int64.
        spec: of the SIDs.
    """

    ids: np.ndarray
    words_NW: np.ndarray
    spec: SIDSpec

    @staticmethod
    def open(folder: Path, codec: Codec) -> "Published":
        """Reads the folder that encode-corpus wrote.

        Raises:
            DataError: if it is missing or broken.
            CodecMismatchError: if its SIDs are of another codec.
        """
        ids, words_NW = read_sids(folder, codec)
        order = np.argsort(ids)
        return Published(ids[order], words_NW[order], codec.spec)

    def digits(self, item_ids: np.ndarray) -> Tensor:
        """Published digits of N items, int16 [N, L]; -1 of those that have none."""
        place_N = np.searchsorted(self.ids, item_ids).clip(max=len(self.ids) - 1)
        is_here_N1 = torch.from_numpy(self.ids[place_N] == item_ids).unsqueeze(1)
        return torch.where(is_here_N1, self.spec.unpack(torch.from_numpy(self.words_NW[place_N])), -1).to(torch.int16)
