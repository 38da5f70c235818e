"""Subword pieces of SIDs (Singh et al., arXiv 2306.08121): a table of the runs that training meets often."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.item_arrays import map_rows
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.names import escape
from sidrec_torchrec.ranker.arms.base import (
    ARMS,
    Arm,
    ArmConfig,
    ArmInputs,
    Needs,
    SIDArray,
    Tokenizers,
    sid_columns,
    vectors_of,
)
from sidrec_torchrec.ranker.arms.modules import OfSIDs, RowDropout, SumOfRows
from sidrec_torchrec.side.pieces import NOTHING, Pieces, PieceVectors

_BLOCK_ITEMS = 16_384


@ARMS.register("pieces")
class PiecesArm(Arm):
    """Residual codes cut into pieces that training meets often, as text is into subwords; a learned row for each piece.

    Pieces are learned from training events when the arm is opened; the same events give the same pieces. Each item's SID is then cut
    once, and its pieces held: 4 bytes a digit. Each SID has a table of its own.
    """

    needs = Needs.SIDS
    tokenizers = Tokenizers.PER_SOURCE
    counts_events = True
    takes_new_items = True

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        if inputs.learned.training_events is None:
            raise SidrecError(
                "the arm 'pieces' needs training_events: it learns pieces by how often training has an item"
            )
        events_N = map_rows(inputs.learned.training_events)
        self._config = config
        self.words = {name: map_rows(sid.path) for name, sid in inputs.sids.items()}
        self._pieces = {name: self._learned(name, sid, events_N) for name, sid in inputs.learned.sids.items()}
        self._items = {name: _cut(own, self.words[name]) for name, own in self._pieces.items()}
        self.keys = tuple(map(Pieces.key, self._pieces))
        self.dim = config.table_dim * len(inputs.sids)

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        pieces = {name: vectors_of(pieces_IL, item_N) for name, pieces_IL in self._items.items()}
        return {Pieces.key(name): torch.from_numpy(own_NL.astype(np.int64)) for name, own_NL in pieces.items()}

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        # A log keeps the code itself; it is cut when the batch is made.
        return sid_columns(self.words, item_N)

    def module(self, device: torch.device) -> nn.Module:
        config = self._config
        tables = PieceVectors(self._pieces, config.piece_rows, config.table_dim, device)
        return nn.Sequential(tables, RowDropout(config.table_dropout))

    def served_sids(self) -> dict[str, SIDSpec]:
        return {name: own.spec for name, own in self._pieces.items()}

    def served_module(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Sequential) and isinstance(module[0], PieceVectors)
        tables = module[0].collection.embeddings
        rows = {
            name: SumOfRows(own.of, tables[escape(Pieces.key(name))].weight, NOTHING)
            for name, own in self._pieces.items()
        }
        return OfSIDs(rows, self.served_sids())

    def _learned(self, name: str, sid: SIDArray, events_N: np.ndarray) -> Pieces:
        try:
            return Pieces.learn(sid.codec.spec, map_rows(sid.path), events_N, self._config.piece_rows)
        except ValueError as error:
            raise SidrecError(f"pieces of the SIDs '{name}': {error}; raise piece_rows") from None


def _cut(pieces: Pieces, words_IW: np.ndarray) -> np.ndarray:
    """The pieces of every item, int32 [num_items, L]."""
    pieces_IL = np.empty((len(words_IW), pieces.spec.num_digits), np.int32)
    for first in range(0, len(words_IW), _BLOCK_ITEMS):
        block = slice(first, first + _BLOCK_ITEMS)
        pieces_IL[block] = pieces.of(torch.from_numpy(np.array(words_IW[block]))).numpy()
    return pieces_IL
