"""The two ends of a comparison: nothing of an item, and all of its content."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.data.item_arrays import map_rows
from sidrec_torchrec.ranker.arms.base import ARMS, Arm, ArmConfig, ArmInputs, Needs, stored_vectors, vectors_of


@ARMS.register("none")
class NoneArm(Arm):
    """Nothing: users, times and what users did are all it knows."""

    is_base = True
    takes_new_items = True

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        return {}

    def module(self, device: torch.device) -> nn.Module:
        return _NoItems()


@ARMS.register("raw")
class RawArm(Arm):
    """The embeddings themselves, as they come: the upper bound on content, and on bytes."""

    needs = Needs.VECTORS
    is_bound = True

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        self.keys = tuple(inputs.vectors)
        self._vectors = {name: map_rows(path) for name, path in inputs.vectors.items()}
        self._dims = {name: array.shape[1] for name, array in self._vectors.items()}
        self.dim = sum(self._dims.values())

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        return {name: torch.from_numpy(vectors_of(array, item_N)) for name, array in self._vectors.items()}

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        return {name: stored_vectors(array, item_N) for name, array in self._vectors.items()}

    def module(self, device: torch.device) -> nn.Module:
        return _RawVectors(self._dims)


class _NoItems(nn.Module):
    def forward(self, items: KeyedJaggedTensor) -> None:
        return None


class _RawVectors(nn.Module):
    """Vectors of each source side by side."""

    def __init__(self, dims: dict[str, int]) -> None:
        super().__init__()
        self._dims = dims

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        return torch.cat([items[name].values().view(-1, dim).float() for name, dim in self._dims.items()], dim=1)
