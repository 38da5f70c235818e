"""Items in a table of bounded size, whatever their number: what an id costs where there cannot be a row for each."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.data.ids import split_mix
from sidrec_torchrec.ranker.arms.base import ARMS, Arm, ArmConfig, ArmInputs
from sidrec_torchrec.ranker.arms.modules import RowDropout

_HASHES = 2
_KEY = "hashed_id"


@ARMS.register("hashed-id")
class HashedIdArm(Arm):
    """The sum of two learned rows, chosen by two hashes of the item (Serrà & Karatzoglou, arXiv 1706.03993).

    Two items seldom share both. An item that training never saw gets rows that others trained, as it does in any hashed table.

    TorchRec's own answer, hash-ZCH (``HashZchManagedCollisionModule``), which gives an id a row when it first comes and drops
    stale ones, cannot be trained on CPU with fbgemm 1.8: there ``zero_collision_hash`` only looks ids up, and in training raises
    "Expected readonly to be true, but got false".
    """

    takes_new_items = True
    keys = (_KEY,)

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        self.dim = config.table_dim
        self._rows = config.ngram_rows
        self._dropout = config.table_dropout
        self._own_rows = _numbered(inputs)

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        number_N = item_N if self._own_rows is None else self._own_rows[item_N]
        rows_NH = split_mix(np.where(item_N >= 0, number_N, 0), _HASHES) % np.uint64(self._rows)
        return {_KEY: torch.from_numpy(rows_NH.astype(np.int64))}

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        # A log keeps the item itself; it is hashed when the batch is made.
        return {"item_id": pa.array(item_N.astype(np.int64), mask=item_N < 0)}

    def module(self, device: torch.device) -> nn.Module:
        # Rows start at zero, so that sharding cannot change the start.
        table = EmbeddingConfig(
            name=_KEY,
            embedding_dim=self.dim,
            num_embeddings=self._rows,
            feature_names=[_KEY],
            init_fn=nn.init.zeros_,
        )
        tables = EmbeddingCollection(tables=[table], device=device)
        return nn.Sequential(_Summed(tables), RowDropout(self._dropout))


class _Summed(nn.Module):
    """The sum of the rows of an item's hashes."""

    def __init__(self, collection: nn.Module) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        return self.collection(items)[_KEY].values().unflatten(0, (-1, _HASHES)).sum(1)


def _numbered(inputs: ArmInputs) -> np.ndarray | None:
    """The number that is hashed of each item, int64 [num_items]: its row where it was trained; new items follow. None: its row."""
    if inputs.own_rows is None:
        return None
    number_I, is_new_I = inputs.own_rows.copy(), inputs.own_rows < 0
    number_I[is_new_I] = inputs.learned.num_items + np.arange(is_new_I.sum())
    return number_I
