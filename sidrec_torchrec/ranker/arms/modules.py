"""Modules that several arms are made of."""

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class OneFeature(nn.Module):
    """The vectors an embedding collection gives one feature, float [N, D].

    Args:
        collection: KeyedJaggedTensor -> JaggedTensors by feature.
        feature: which.
        dropout: share of the events whose vectors are zeroed in training.
    """

    def __init__(self, collection: nn.Module, feature: str, dropout: float) -> None:
        super().__init__()
        self.collection = collection
        self.dropout = RowDropout(dropout)
        self._feature = feature

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        return self.dropout(self.collection(items)[self._feature].values())


class RowDropout(nn.Module):
    """Zeroes whole rows in training with probability ``p``; the others are not scaled, as in serving."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_ND: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x_ND
        return x_ND * (torch.rand(len(x_ND), 1, device=x_ND.device) >= self.p)
