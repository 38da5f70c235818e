"""Target attention: every candidate reads the events before it."""

import torch
from torch import Tensor, nn

from sidrec_torchrec.ops.code_attention import GAP_BUCKETS

_MASKED = -1e9


class TargetAttention(nn.Module):
    """Multi-head attention of candidates over a user's earlier events, many candidates of one row at once.

    A score is the scaled product of candidate and item vectors plus two learned biases per head: one by the event's
    action, one by the time gap between candidate and event. A value is a linear map of the event's vector. A learned
    sink with a zero value takes the weight when no event matters, so that an empty history gives zeros.

    Args:
        dim: width D of item vectors, event vectors and output.
        num_heads: H; divides ``dim``.
        num_actions: actions an event can have.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, num_actions: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.gap_bias = nn.Embedding(GAP_BUCKETS, num_heads)
        self.action_bias = nn.Embedding(num_actions, num_heads)
        self.sink = nn.Parameter(torch.zeros(num_heads))
        nn.init.zeros_(self.gap_bias.weight)
        nn.init.zeros_(self.action_bias.weight)

    def forward(
        self,
        query_BMPD: Tensor,
        items_BTD: Tensor,
        events_BTD: Tensor,
        actions_BT: Tensor,
        gaps_BMT: Tensor,
        mask_BMT: Tensor,
    ) -> Tensor:
        """Pools each candidate's earlier events.

        Args:
            query_BMPD: P queries of each candidate, float; they read the same events.
            items_BTD: item vectors of the events, float: what a candidate is compared with.
            events_BTD: vectors of item and action together, float: what is pooled.
            actions_BT: action of each event, int64 in [0, num_actions).
            gaps_BMT: time-gap bucket of each pair, int32 or int64 in [0, GAP_BUCKETS); see ``ops.code_attention.gap_bucket``.
            mask_BMT: True where the candidate may read the event.

        Returns:
            float tensor [B, M, P, D].
        """
        M, P = query_BMPD.shape[1:3]
        q_BHQd = self._heads(self.query(query_BMPD.flatten(1, 2)))
        k_BHTd = self._heads(self.key(items_BTD))
        v_BHTd = self._heads(self.value(events_BTD))
        bias_BHMT = self.gap_bias(gaps_BMT).permute(0, 3, 1, 2)
        bias_BHMT = bias_BHMT + self.action_bias(actions_BT).permute(0, 2, 1).unsqueeze(2)
        bias_BHMT = bias_BHMT.masked_fill(~mask_BMT.unsqueeze(1), _MASKED)
        scores_BHQT = (q_BHQd * q_BHQd.shape[-1] ** -0.5) @ k_BHTd.transpose(-1, -2)
        scores_BHMPT = scores_BHQT.unflatten(2, (M, P)) + bias_BHMT.unsqueeze(3)
        sink_BHMP1 = self.sink.view(1, -1, 1, 1, 1).expand(*scores_BHMPT.shape[:4], 1)
        weights_BHMPT = torch.cat([scores_BHMPT, sink_BHMP1], dim=-1).softmax(-1)[..., :-1]
        pooled_BHQd = weights_BHMPT.flatten(2, 3) @ v_BHTd
        return self.output(pooled_BHQd.transpose(1, 2).flatten(2)).view_as(query_BMPD)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
