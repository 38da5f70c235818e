"""Modules that several arms are made of."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.packing import SIDSpec


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


class OfSIDs(nn.Module):
    """Modules of packed SIDs, each of its own words, their vectors side by side: int64 [N, W] -> float32 [N, sum of D].

    Args:
        modules: by the SIDs' names, int64 [N, own words] -> float32 [N, D].
        sids: the SIDs, in the order of their words.
    """

    def __init__(self, modules: Mapping[str, nn.Module], sids: Mapping[str, SIDSpec]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules[name] for name in sids)
        self._words = [spec.num_words for spec in sids.values()]

    def forward(self, words_NW: Tensor) -> Tensor:
        words = words_NW.split(self._words, dim=1)
        return torch.cat([part(own_NW) for part, own_NW in zip(self.parts, words, strict=True)], dim=1)


class BothOf(nn.Module):
    """The vectors that two modules make of the same input, side by side: float32 [N, D of one + D of the other]."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, features: Any) -> Tensor:
        return torch.cat([self.one(features), self.other(features)], dim=1)


class SumOfRows(nn.Module):
    """The sum of the table's rows that a SID's tokens name: int64 [N, W] -> float32 [N, D].

    Args:
        tokens: packed SIDs -> int64 [N, P].
        rows: the table, [rows, D].
        nothing: a token that names no row.
    """

    rows_RD: Tensor

    def __init__(self, tokens: Callable[[Tensor], Tensor], rows: Tensor, nothing: int | None = None) -> None:
        super().__init__()
        self.register_buffer("rows_RD", rows.detach(), persistent=False)
        self._tokens = tokens
        self._nothing = nothing

    def forward(self, words_NW: Tensor) -> Tensor:
        token_NP = self._tokens(words_NW)
        rows_NPD = self.rows_RD[token_NP]
        if self._nothing is not None:
            rows_NPD = rows_NPD * (token_NP != self._nothing).unsqueeze(2)
        return rows_NPD.sum(1)


class RowDropout(nn.Module):
    """Zeroes whole rows in training with probability ``p``; the others are not scaled, as in serving."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_ND: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x_ND
        return x_ND * (torch.rand(len(x_ND), 1, device=x_ND.device) >= self.p)
