"""Blocks that let events read each other: pointwise attention with a relative bias, gated (HSTU)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, gap_bucket


class HSTUBlock(nn.Module):
    """One block, causal: an event reads itself and the events before it.

    ``Y = X + f2(Norm(mean over read events of silu(q.k / sqrt(d) + bias) v) * U)``, where ``U, V, Q, K`` are the parts of
    ``silu(f1(Norm(X)))``. The bias per head is one for how many events lie between, plus one for how much time does,
    each by powers of two, so that no length is the longest.

    Source: Zhai et al. 2024 (arXiv 2402.17152), equations 1 to 3.

    Args:
        dim: width D of the events.
        num_heads: H; divides ``dim``.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.uvqk = nn.Linear(dim, 4 * dim)
        self.position_bias = nn.Embedding(GAP_BUCKETS, num_heads)
        self.time_bias = nn.Embedding(GAP_BUCKETS, num_heads)
        self.pooled_norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, dim)
        nn.init.zeros_(self.position_bias.weight)
        nn.init.zeros_(self.time_bias.weight)

    def forward(self, x_BTD: Tensor, gaps_BTT: Tensor, is_entry_BT: Tensor) -> Tensor:
        """The events, each with what it read.

        Args:
            x_BTD: events of B rows, oldest first, float.
            gaps_BTT: time-gap bucket from each event (first T) back to each other one, integers in [0, GAP_BUCKETS); see
                ``ops.code_attention.gap_bucket``.
            is_entry_BT: False in padding, which is not read; what stands there afterwards means nothing.

        Returns:
            float [B, T, D].
        """
        place_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        steps_TT = place_T.unsqueeze(1) - place_T
        reads_BTT = (steps_TT >= 0) & is_entry_BT.unsqueeze(1)
        u_BTD, *vqk = silu(self.uvqk(self.norm(x_BTD))).chunk(4, dim=-1)
        v_BHTd, q_BHTd, k_BHTd = (part_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part_BTD in vqk)
        scores_BHTT = (q_BHTd * q_BHTd.shape[-1] ** -0.5) @ k_BHTd.transpose(-1, -2)
        bias_BTTH = self.position_bias(gap_bucket(steps_TT)) + self.time_bias(gaps_BTT)
        weights_BHTT = silu(scores_BHTT + bias_BTTH.permute(0, 3, 1, 2)) * reads_BTT.unsqueeze(1)
        count_B1T1 = reads_BTT.sum(-1).clamp_min(1)[:, None, :, None]
        pooled_BTD = (weights_BHTT @ v_BHTd / count_B1T1).transpose(1, 2).flatten(2)
        return x_BTD + self.output(self.pooled_norm(pooled_BTD) * u_BTD)
