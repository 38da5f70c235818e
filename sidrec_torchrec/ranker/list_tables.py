"""What users' lists are read as by a server, of plain tensors: the means that TorchRec's EmbeddingBagCollection pools."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ListTables(nn.Module):
    """Means of the rows of L lists of codes.

    Args:
        weights: of each feature's table, float [codes, D]; shared, not copied.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(map(nn.Embedding.from_pretrained, weights))

    def forward(self, value_V: Tensor, length_BL: Tensor) -> list[Tensor]:
        """Of each feature, float [B, D]; zeros for an empty list.

        Args:
            value_V: codes of all lists: all those of the first request, feature by feature, then those of the next; int64.
            length_BL: how many each list has; int64.
        """
        end_X = length_BL.flatten().cumsum(0)  # X: lists, of all requests
        list_V = torch.searchsorted(end_X, torch.arange(value_V.shape[0], device=value_V.device), right=True)
        means = []
        for f, table in enumerate(
            self.tables
        ):  # all values by each table: lists are few, and no size depends on the codes
            is_own_V = list_V % len(self.tables) == f
            row_VD = table(torch.where(is_own_V, value_V, 0)) * is_own_V.unsqueeze(1)
            sum_BD = row_VD.new_zeros(length_BL.shape[0], row_VD.shape[1])
            sum_BD = sum_BD.index_add(0, list_V // len(self.tables), row_VD)
            means.append(sum_BD / length_BL[:, f : f + 1].clamp_min(1))
        return means
