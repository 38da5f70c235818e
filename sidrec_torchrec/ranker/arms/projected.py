"""A small dense rival of a SID: each event carries its item's vectors, projected and rounded to int8 (TransAct V2, arXiv 2506.02267)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.data.item_arrays import map_rows
from sidrec_torchrec.ranker.arms.base import (
    ARMS,
    Arm,
    ArmConfig,
    ArmInputs,
    Needs,
    side_by_side,
    stored_vectors,
    trained_sources,
    vectors_of,
)

_DIM = 32
_LARGEST = 127
_KEY = "projection"


@dataclass(frozen=True)
class Int8Projection:
    """Principal components in int8, with one scale per component.

    The paper's vectors are learned at 32 dimensions; of vectors that are given, the first principal components are the numbers
    that lose least. They are of mean square 1 over all components, as the vectors they are made of are.

    Args:
        mean_D: of the vectors, float64.
        axes_DK: float64; a vector's components are the products of its difference from the mean with these.
        scale_K: float32, what an int8 of 1 stands for.
    """

    mean_D: np.ndarray
    axes_DK: np.ndarray
    scale_K: np.ndarray

    @staticmethod
    def fit(sources: Sequence[np.ndarray], row_F: np.ndarray, dim: int) -> "Int8Projection":
        """The components of most variance, each with the scale that lets its largest value fit.

        Args:
            sources: vectors of N items by source, float [N, d]; they stand side by side.
            row_F: items to look at, integers [F].
            dim: K, components; fewer if the vectors have fewer values.

        Raises:
            ValueError: if there is no item to look at.
        """
        if not len(row_F):
            raise ValueError("a projection needs at least one item to look at")
        mean_D = sum(x_BD.sum(0) for x_BD in side_by_side(sources, row_F)) / len(row_F)
        moment_DD = sum((x_BD - mean_D).T @ (x_BD - mean_D) for x_BD in side_by_side(sources, row_F)) / len(row_F)
        variance_D, axes_DD = np.linalg.eigh(moment_DD)  # ascending
        variance_K, axes_DK = variance_D[::-1][:dim], axes_DD[:, ::-1][:, :dim]
        # To eigh an axis is as good as its opposite; choose, so that it is the same on every machine.
        largest_1K = np.abs(axes_DK).argmax(axis=0)[np.newaxis]
        axes_DK = axes_DK * np.sign(np.take_along_axis(axes_DK, largest_1K, axis=0))
        axes_DK /= np.sqrt(max(variance_K.mean(), np.finfo(np.float32).tiny))
        extent_K = np.max([np.abs((x_BD - mean_D) @ axes_DK).max(0) for x_BD in side_by_side(sources, row_F)], axis=0)
        # A component that does not vary has nothing to say; its rounding errors would, were they scaled up.
        extent_K = np.where(extent_K > 1e-6 * extent_K.max(), extent_K, _LARGEST)
        return Int8Projection(mean_D, axes_DK, (extent_K / _LARGEST).astype(np.float32))

    def of(self, sources: Sequence[np.ndarray]) -> np.ndarray:
        """Components of all items, int8 [N, K]; a value larger than any that was looked at is cut to the largest."""
        blocks = side_by_side(sources, np.arange(len(sources[0])))
        return np.concatenate([self._rounded((x_BD - self.mean_D) @ self.axes_DK) for x_BD in blocks])

    def _rounded(self, x_BK: np.ndarray) -> np.ndarray:
        return (x_BK / self.scale_K).round().clip(-_LARGEST, _LARGEST).astype(np.int8)


@ARMS.register("projected")
class ProjectedArm(Arm):
    """32 bytes an event: the embeddings' first principal components, rounded to int8, which the model scales back.

    Components are those of the items that training has, each counted once.
    """

    needs = Needs.VECTORS
    counts_events = True
    takes_new_items = True
    keys = (_KEY,)

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        projection = Int8Projection.fit(*trained_sources(inputs), _DIM)
        self.dim = len(projection.scale_K)
        self._scale_K = projection.scale_K
        self._items_IK = projection.of([map_rows(path) for path in inputs.vectors.values()])

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        return {_KEY: torch.from_numpy(vectors_of(self._items_IK, item_N))}

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        return {_KEY: stored_vectors(self._items_IK, item_N)}

    def module(self, device: torch.device) -> nn.Module:
        return _Scaled(torch.from_numpy(self._scale_K).to(device))


class _Scaled(nn.Module):
    """The numbers that int8 values stand for."""

    scale_K: Tensor

    def __init__(self, scale_K: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale_K", scale_K)

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        return items[_KEY].values().view(-1, len(self.scale_K)).float() * self.scale_K
