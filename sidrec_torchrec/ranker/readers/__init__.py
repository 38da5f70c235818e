"""Readers: how targets read a history, over vectors of all events or in code space; the newest perhaps as blocks make them.

Several histories may be read apart.
"""

from sidrec_torchrec.ranker.readers.apart import ApartReader, HistoriesBy
from sidrec_torchrec.ranker.readers.base import READERS, ItemVectors, PackedSIDs, Queries, Reader, Requests
from sidrec_torchrec.ranker.readers.blocks import BlockReader
from sidrec_torchrec.ranker.readers.codes import CodeReader
from sidrec_torchrec.ranker.readers.vectors import VectorReader

__all__ = [
    "READERS",
    "ApartReader",
    "BlockReader",
    "CodeReader",
    "HistoriesBy",
    "ItemVectors",
    "PackedSIDs",
    "Queries",
    "Reader",
    "Requests",
    "VectorReader",
]
