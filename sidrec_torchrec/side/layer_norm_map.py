"""A linear map with a LayerNorm behind it, which code space can have exactly."""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from sidrec_torchrec.ops.layout import CodeLayout
from sidrec_torchrec.ops.side_energy import side_energy

_LANES = 16  # floats that a processor adds at once: rows are made as wide once, where kernels would in each call


class LayerNormMap(nn.Module):
    """``LayerNorm(W x + b)``, where LayerNorm (Ba et al. 2016) has no gain and bias: the linear maps behind it have theirs.

    Where x is the sum of a row per digit, so is ``W x + b`` less its mean; and dividing by its standard deviation is one
    number per event. So attention reads mapped events in code space: ``rows`` and ``scale`` are all it needs.

    A missing item maps to zero, and not to what x = 0 maps to, which items may have: in code space because it chooses no rows;
    as a vector because ``forward`` is told.

    Args:
        in_dim: width E of x.
        dim: width D of the result.
        device: where to build it.
    """

    eps = 1e-5

    def __init__(self, in_dim: int, dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, dim, device=device)

    def forward(self, x_NE: Tensor, has_item_N: Tensor | None = None) -> Tensor:
        """float [..., D] of float [..., E].

        Args:
            x_NE: of items.
            has_item_N: bool [...], False for a missing one; None if none is.
        """
        mapped_ND = layer_norm(self.linear(x_NE), (self.linear.out_features,), eps=self.eps)
        return mapped_ND if has_item_N is None else mapped_ND * has_item_N.unsqueeze(-1)

    def rows(self, rows_VE: Tensor, layout: CodeLayout) -> Tensor:
        """A row of each value of each digit, float [V, D], of such rows of x: their sums times ``scale`` are the result.

        The bias goes with the first digit, of which every SID that is not missing takes one row.
        """
        mapped_VD = nn.functional.linear(rows_VE, self.linear.weight)
        mapped_VD = mapped_VD + _is_first(mapped_VD, layout) * self.linear.bias
        return mapped_VD - mapped_VD.mean(1, keepdim=True)

    def norm_rows(self, mapped_VD: Tensor, layout: CodeLayout, factors: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Rows, of each value of each joined chunk, whose sums have the norms of sums of mapped rows: at least float32 [R, K].

        Args:
            mapped_VD: what ``rows`` gave.
            layout: its digits.
            factors: of the rows of x before they are mapped, [V, K] and [K, E], if they have some: with K below D - 1, norms
                are found among K + 1 components.
        """
        rows = mapped_VD
        if factors is not None and factors[1].shape[0] + 1 < mapped_VD.shape[1]:
            rows = self._short(*factors, layout)
        rows = pad(rows.to(torch.promote_types(mapped_VD.dtype, torch.float32)), (0, -rows.shape[1] % _LANES))
        return layout.join().expand(rows)

    def scale(self, words_NW: Tensor, norm_RK: Tensor, layout: CodeLayout) -> Tensor:
        """What the sum of an event's rows is multiplied by, float32 [N]; finite where there is none.

        Args:
            words_NW: packed SIDs, int64.
            norm_RK: what ``norm_rows`` gave.
            layout: the digits.
        """
        chunks = layout.join().chunks
        energy_N = side_energy(words_NW, norm_RK, list(chunks.radices), list(chunks.words))
        return (energy_N / self.linear.out_features + self.eps).rsqrt()

    def _short(self, factor_VK: Tensor, basis_KE: Tensor, layout: CodeLayout) -> Tensor:
        """Rows of K + 1 components, float64, whose sums have the norms of sums of mapped rows.

        A Cholesky factor of a Gram matrix has the inner products of the vectors it is of.
        """
        weight_DE, bias_D = self.linear.weight.double(), self.linear.bias.double()
        basis_KD = torch.cat([nn.functional.linear(basis_KE.double(), weight_DE), bias_D.unsqueeze(0)])
        basis_KD = basis_KD - basis_KD.mean(1, keepdim=True)
        gram_KK = basis_KD @ basis_KD.T
        jitter = 1e-12 * gram_KK.diagonal().sum()  # where the map is not of full rank
        chol_KK = torch.linalg.cholesky(gram_KK + jitter * torch.eye(gram_KK.shape[0], device=gram_KK.device))
        return torch.cat([factor_VK.double(), _is_first(factor_VK, layout).double()], dim=1) @ chol_KK


def _is_first(rows_VX: Tensor, layout: CodeLayout) -> Tensor:
    """Which rows are of the first digit, bool [V, 1]."""
    return (torch.arange(rows_VX.shape[0], device=rows_VX.device) < layout.radices[0]).unsqueeze(1)
