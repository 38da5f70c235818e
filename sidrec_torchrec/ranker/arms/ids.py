"""Items by their ids: a learned row for each."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from sidrec_torchrec.ranker.arms.base import ARMS, Arm, ArmConfig, ArmInputs
from sidrec_torchrec.ranker.arms.modules import OneFeature


@ARMS.register("id")
class IdArm(Arm):
    """A learned row per item."""

    keys = ("item_id",)

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        self.dim = config.table_dim
        self._num_items = inputs.num_items
        self._dropout = config.table_dropout

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        return {"item_id": torch.from_numpy(item_N.clip(0).astype(np.int64))}

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
        return OneFeature(EmbeddingCollection(tables=[table], device=device), "item_id", self._dropout)
