"""The embeddings themselves in 8 bytes: product quantization, as search indexes keep vectors (Jégou et al. 2011)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.kmeans import kmeans
from sidrec_torchrec.data.item_arrays import map_rows
from sidrec_torchrec.ranker.arms.base import (
    ARMS,
    Arm,
    ArmConfig,
    ArmInputs,
    Needs,
    side_by_side,
    trained_sources,
    vectors_of,
)

_PARTS = 8  # bytes of a code, as many as an int64 has
_CENTROIDS = 256
_MOST_FITTED = 64 * _CENTROIDS  # items that a codebook is made of; faiss, too, draws a bounded number
_KEY = "pq_codes"


@dataclass(frozen=True)
class ProductQuantizer:
    """A codebook for each part of a vector, which stands for what it is nearest to.

    Args:
        codebooks: of the parts, in the order of a vector's values, float64 [256, d] each.
    """

    codebooks: tuple[Tensor, ...]

    @staticmethod
    def fit(sources: Sequence[np.ndarray], row_F: np.ndarray, num_parts: int) -> "ProductQuantizer":
        """Codebooks by k-means. In float64, so that another machine comes to the same codes.

        Args:
            sources: vectors of N items by source, float [N, d]; they stand side by side.
            row_F: items to look at, integers [F]; of more than 16,384 those are drawn.
            num_parts: parts of as many values as can be; fewer if the vectors have fewer values.

        Raises:
            ValueError: if there is no item to look at.
        """
        if not len(row_F):
            raise ValueError("product quantization needs at least one item to look at")
        drawn_F = np.sort(np.random.default_rng(0).permutation(row_F)[:_MOST_FITTED])
        x_FD = torch.from_numpy(np.concatenate([*side_by_side(sources, drawn_F)]))
        parts = x_FD.tensor_split(min(num_parts, x_FD.shape[1]), dim=1)
        return ProductQuantizer(tuple(kmeans(x_Fd.contiguous(), _CENTROIDS, seed=0) for x_Fd in parts))

    def encode(self, sources: Sequence[np.ndarray]) -> np.ndarray:
        """The nearest centroid of each part of every item, uint8 [N, parts]; of equals the first."""
        dims = [codebook.shape[1] for codebook in self.codebooks]
        blocks = (
            torch.from_numpy(x_BD).split(dims, dim=1) for x_BD in side_by_side(sources, np.arange(len(sources[0])))
        )
        codes = [
            [torch.cdist(x_Bd, codebook).argmin(1) for x_Bd, codebook in zip(parts, self.codebooks, strict=True)]
            for parts in blocks
        ]
        return torch.cat([torch.stack(code, dim=1) for code in codes]).numpy().astype(np.uint8)


@ARMS.register("pq")
class ProductQuantizedArm(Arm):
    """8 bytes an event: all sources' vectors as eight codewords of 256, which the model looks up.

    Codebooks are those of the items that training has, each counted once.
    """

    needs = Needs.VECTORS
    counts_events = True
    takes_new_items = True
    keys = (_KEY,)

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        quantizer = ProductQuantizer.fit(*trained_sources(inputs), _PARTS)
        self._codebooks = quantizer.codebooks
        self.dim = sum(codebook.shape[1] for codebook in self._codebooks)
        code_IM = quantizer.encode([map_rows(path) for path in inputs.vectors.values()])
        self._word_I = np.pad(code_IM, ((0, 0), (0, _PARTS - code_IM.shape[1]))).view(np.int64).squeeze(1)

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        return {_KEY: torch.from_numpy(vectors_of(self._word_I, item_N))}

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        return {_KEY: pa.array(self._word_I[item_N], mask=item_N < 0)}

    def module(self, device: torch.device) -> nn.Module:
        return _Decoded([codebook.float().to(device) for codebook in self._codebooks])


class _Decoded(nn.Module):
    """The centroids that codes stand for, side by side."""

    def __init__(self, codebooks: Sequence[Tensor]) -> None:
        super().__init__()
        self._names = [f"codebook_{part}" for part in range(len(codebooks))]
        for name, codebook in zip(self._names, codebooks, strict=True):
            self.register_buffer(name, codebook)

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        code_NM = items[_KEY].values().unsqueeze(1).view(torch.uint8).long()
        return torch.cat([getattr(self, name)[code_NM[:, m]] for m, name in enumerate(self._names)], dim=1)
