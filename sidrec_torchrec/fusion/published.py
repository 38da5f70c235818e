"""SIDs that are out already: what a refreshed tokenizer is asked to keep."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.data.sids import read_sids
from sidrec_torchrec.errors import DataError


@dataclass(frozen=True)
class Published:
    """The SIDs of a corpus that was encoded before. Made by ``open``.

    Args:
        items: whose they are.
        words_NW: their packed SIDs, int64.
        spec: of the SIDs.
    """

    items: IdIndex
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
        return Published(IdIndex(ids), words_NW, codec.spec)

    def digits(self, item_ids: pa.Array) -> Tensor:
        """Published digits of N items, int16 [N, L]; -1 of those that have none.

        Raises:
            DataError: if ids are numbers here and text there.
        """
        try:
            place_N = self.items.find(item_ids)
        except TypeError as error:
            raise DataError(f"published SIDs: item {error}; write both with one type") from None
        is_here_N1 = torch.from_numpy(place_N >= 0).unsqueeze(1)
        return torch.where(is_here_N1, self.spec.unpack(torch.from_numpy(self.words_NW[place_N])), -1).to(torch.int16)
