"""SIDs that travel packed and are expanded in the model: by SIDE as it is, with learned rows, or beside a small table."""

import itertools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.packing import SIDSpec, word_names
from sidrec_torchrec.data.item_arrays import map_rows
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.names import escape, unescape
from sidrec_torchrec.ranker.arms.base import ARMS, Arm, ArmConfig, ArmInputs, Needs, words_of
from sidrec_torchrec.ranker.arms.modules import BothOf, OfSIDs, OneFeature, RowDropout, SumOfRows
from sidrec_torchrec.side.collection import SIDECollection
from sidrec_torchrec.side.expansion import SIDEConfig
from sidrec_torchrec.side.hybrid import CoarseIds, HybridVectors


@ARMS.register("side")
class SideArm(Arm):
    """SIDE: one SID of all the content, a few bytes, expanded in the model without a table or anything to learn.

    One SID travels as ``sid``; several, side by side, under the names of their tokenizers.
    """

    needs = Needs.SIDS
    travels_as_codes = True
    learned: ClassVar[bool] = False

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        sids = inputs.sids
        by_feature = dict(zip(["sid"], sids.values(), strict=True)) if len(sids) == 1 else sids
        self.words = {feature: map_rows(sid.path) for feature, sid in by_feature.items()}
        self.sids = tuple(
            SIDEConfig(
                name=escape(feature),  # which names a module
                feature_names=[feature],
                codec=sid.codec,
                mode=config.side_mode,
                learned=self.learned,
                digit_dropout=0.0 if self.learned else config.digit_dropout,
                fallback=config.table_dropout if self.learned else 0.0,
            )
            for feature, sid in by_feature.items()
        )
        self.keys = tuple(key for feature, words in self.words.items() for key in word_names(feature, words.shape[1]))
        self.dim = sum(sid.embedding_dim for sid in self.sids)

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        words = [torch.from_numpy(words_of(words, item_N)).unbind(1) for words in self.words.values()]
        return dict(zip(self.keys, itertools.chain(*words), strict=True))

    def module(self, device: torch.device) -> nn.Module:
        return _SideBySide(
            OneFeature(SIDECollection(tables=[sid], device=device), sid.feature_names[0], 0.0) for sid in self.sids
        )

    def served_sids(self) -> dict[str, SIDSpec]:
        return {sid.feature_names[0]: sid.codec.spec for sid in self.sids}

    def served_module(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, _SideBySide)
        return OfSIDs(module.sides(), self.served_sids())


@ARMS.register("learned-side")
class LearnedSideArm(SideArm):
    """SIDE whose rows learn: one for each value of five trits, say, whatever the number of items (``LearnedSIDE``)."""

    learned = True


@ARMS.register("hybrid")
class HybridArm(Arm):
    """SIDE, and beside it a learned row for each prefix of the SID; the prefix's id is made when the batch is."""

    needs = Needs.SIDS

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        if len(inputs.sids) != 1:
            raise SidrecError(f"the arm 'hybrid' reads one SID, got {', '.join(inputs.sids)}")
        self._side = SideArm(inputs, config)
        self.words = self._side.words
        (self._sid,) = self._side.sids
        try:
            self._coarse = CoarseIds.at_most(self._sid.codec.spec, config.coarse_ids)
        except ValueError as error:
            raise SidrecError(f"the arm 'hybrid': {error}; raise coarse_ids") from None
        self._coarse_key = self._coarse.key("sid")
        self.keys = (*self._side.keys, self._coarse_key)
        self.dim = self._side.dim + config.table_dim
        self._config = config

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        words = self._side.values(item_N)
        return {**words, self._coarse_key: self._coarse.ids(torch.stack([*words.values()], dim=1))}

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        return self._side.stored(item_N)

    def module(self, device: torch.device) -> nn.Module:
        collection = HybridVectors(self._sid, self._coarse, self._config.table_dim, device)
        return _Hybrid(collection, self._config.table_dropout)

    def served_sids(self) -> dict[str, SIDSpec]:
        return self._side.served_sids()

    def served_module(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, _Hybrid)
        (side,), (table,) = module.collection.side.tables.values(), module.collection.table.embeddings.values()
        rows = SumOfRows(lambda words_NW: self._coarse.ids(words_NW).unsqueeze(1), table.weight)
        return BothOf(side, rows)


class _SideBySide(nn.ModuleList):
    """Modules' vectors side by side; each is a ``OneFeature`` of a ``SIDECollection``."""

    def sides(self) -> dict[str, nn.Module]:
        """What expands each SID, by its name."""
        sides: dict[str, nn.Module] = {}
        for part in self:
            assert isinstance(part, OneFeature) and isinstance(part.collection, SIDECollection)
            sides |= {unescape(name): side for name, side in part.collection.tables.items()}
        return sides

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        return torch.cat([module(items) for module in self], dim=1)


class _Hybrid(nn.Module):
    """SIDE's vectors and the table's rows side by side."""

    def __init__(self, collection: HybridVectors, dropout: float) -> None:
        super().__init__()
        self.collection = collection
        self.dropout = RowDropout(dropout)

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        side_NE, rows_ND = self.collection(items)
        return torch.cat([side_NE, self.dropout(rows_ND)], dim=1)
