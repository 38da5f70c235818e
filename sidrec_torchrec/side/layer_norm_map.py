"""A linear map with a LayerNorm behind it, which code space can have exactly."""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from sidrec_torchrec.ops.layout import CodeLayout
from sidrec_torchrec.ops.side_energy import side_energy


class LayerNormMap(nn.Module):
    """``LayerNorm(W x + b)``, where LayerNorm (Ba et al. 2016) has no gain and bias: the linear maps behind it have theirs.

    Where x is the sum of a row per digit, so is ``W x + b`` less its mean; and dividing by its standard deviation is one
    number per event. So attention reads mapped events in code space: ``rows`` and ``scale`` are all it needs.

    Args:
        in_dim: width E of x.
        dim: width D of the result.
        device: where to build it.
    """

    eps = 1e-5

    def __init__(self, in_dim: int, dim: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, dim, device=device)

    def forward(self, x_NE: Tensor) -> Tensor:
        """float [..., D] of float [..., E]."""
        return layer_norm(self.linear(x_NE), (self.linear.out_features,), eps=self.eps)

    def rows(self, rows_VE: Tensor, layout: CodeLayout) -> Tensor:
        """A row of each value of each digit, float [V, D], of such rows of x: their sums times ``scale`` are the result.

        The bias goes with the first digit, of which every SID takes one row.
        """
        mapped_VD = nn.functional.linear(rows_VE, self.linear.weight)
        first_V1 = (torch.arange(mapped_VD.shape[0], device=mapped_VD.device) < layout.radices[0]).unsqueeze(1)
        mapped_VD = mapped_VD + first_V1 * self.linear.bias
        return mapped_VD - mapped_VD.mean(1, keepdim=True)

    def scale(self, words_NW: Tensor, mapped_VD: Tensor, layout: CodeLayout) -> Tensor:
        """What the sum of an event's rows is multiplied by, float32 [N].

        Args:
            words_NW: packed SIDs, int64.
            mapped_VD: what ``rows`` gave.
            layout: its digits.
        """
        joined = layout.join()
        table_RD = joined.expand(mapped_VD.to(torch.promote_types(mapped_VD.dtype, torch.float32)))
        energy_N = side_energy(words_NW, table_RD, list(joined.chunks.radices), list(joined.chunks.words))
        return (energy_N / mapped_VD.shape[1] + self.eps).rsqrt()
