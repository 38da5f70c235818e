"""Readers: how targets read a history, over vectors of all events or in code space; the newest perhaps as blocks make them."""

from sidrec_torchrec.ranker.readers.base import READERS, ItemVectors, PackedSIDs, Queries, Reader, Requests
from sidrec_torchrec.ranker.readers.blocks import BlockReader
from sidrec_torchrec.ranker.readers.codes import CodeReader
from sidrec_torchrec.ranker.readers.vectors import VectorReader

__all__ = [
    "READERS",
    "BlockReader",
    "CodeReader",
    "ItemVectors",
    "PackedSIDs",
    "Queries",
    "Reader",
    "Requests",
    "VectorReader",
]
