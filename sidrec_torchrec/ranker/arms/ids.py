"""Items by their ids: a learned row for each."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.ranker.arms.base import ARMS, Arm, ArmConfig, ArmInputs
from sidrec_torchrec.ranker.arms.modules import OneFeature


@ARMS.register("id")
class IdArm(Arm):
    """A learned row for each item; of an item that is new it says nothing."""

    takes_new_items = True
    keys = ("item_id",)

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        self.dim = config.table_dim
        self._num_items = inputs.learned.num_items
        self._own_rows = inputs.own_rows
        self._dropout = config.table_dropout

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        row_N = item_N.clip(0) if self._own_rows is None else np.where(item_N >= 0, self._own_rows[item_N], -1)
        return {"item_id": torch.from_numpy(row_N.astype(np.int64))}

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        return {"item_id": pa.array(item_N.astype(np.int64), mask=item_N < 0)}

    def module(self, device: torch.device) -> nn.Module:
        # Rows start at zero: an item never trained on says nothing, and sharding cannot change the start.
        table = EmbeddingConfig(
            name="item_id",
            embedding_dim=self.dim,
            num_embeddings=self._num_items,
            feature_names=["item_id"],
            init_fn=nn.init.zeros_,
        )
        kind = OneFeature if self._own_rows is None else _KnownItems
        return kind(EmbeddingCollection(tables=[table], device=device), "item_id", self._dropout)


class _KnownItems(OneFeature):
    """Zeros for an item that has no row, whose id is -1."""

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        id_N = items["item_id"].values()
        ids = KeyedJaggedTensor(keys=["item_id"], values=id_N.clamp(min=0), lengths=items["item_id"].lengths())
        return super().forward(ids) * (id_N >= 0).unsqueeze(1)
