"""SIDE beside subword pieces of the same SID: frozen detail, and learned rows for what is popular (SiDec, arXiv 2607.24865)."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.ranker.arms.base import ARMS, Arm, ArmConfig, ArmInputs, Needs
from sidrec_torchrec.ranker.arms.modules import BothOf
from sidrec_torchrec.ranker.arms.pieces import PiecesArm
from sidrec_torchrec.ranker.arms.side import SideArm


@ARMS.register("side-pieces")
class SidePiecesArm(Arm):
    """One SID read twice: expanded by SIDE, and by a learned row for each of its pieces, side by side."""

    needs = Needs.SIDS
    counts_events = True
    takes_new_items = True

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        self._side, self._pieces = SideArm(inputs, config), PiecesArm(inputs, config)
        self.words = self._side.words
        self.keys = (*self._side.keys, *self._pieces.keys)
        self.dim = self._side.dim + self._pieces.dim

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        return {**self._side.values(item_N), **self._pieces.values(item_N)}

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        return self._side.stored(item_N)

    def module(self, device: torch.device) -> nn.Module:
        return BothOf(self._side.module(device), self._pieces.module(device))

    def served_sids(self) -> dict[str, SIDSpec]:
        return self._side.served_sids()

    def served_module(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, BothOf)
        return BothOf(self._side.served_module(module.one), self._pieces.served_module(module.other))
