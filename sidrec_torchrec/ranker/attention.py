"""Target attention: every candidate reads the events before it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidrec_torchrec.ops.code_attention import GAP_BUCKETS
from sidrec_torchrec.ops.shared_attention import shared_attention
from sidrec_torchrec.ranker.side_information import SideInformation
from sidrec_torchrec.side.code_attention import bucket_terms

_MASKED = -1e9


class TargetAttention(nn.Module):
    """Multi-head attention of candidates over a user's earlier events, many candidates of one row at once.

    The same mathematics and parameters as ``CodeAttention`` with side information and time gaps: a score is the scaled product
    of candidate and item vectors plus learned biases per head: by the event's action and each of its features, and by the time
    gap between candidate and event. A value is a linear map of the item's vector, plus a term by action and feature. A learned
    sink with a zero value takes the weight when no event matters, so that an empty history gives zeros.

    Args:
        dim: width D of item vectors and output.
        num_heads: H; divides ``dim``.
        num_actions: actions an event can have.
        features: number of codes of each of its features, by name.

    Raises:
        ValueError: if ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int, num_actions: int, features: Mapping[str, int] | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim)
        self.sink_H = nn.Parameter(torch.zeros(num_heads))
        self.side = SideInformation.of(num_actions, features)
        self.bias_UH, self.bucket_value_AD = bucket_terms(self.side.num_rows, True, num_heads, dim, None)
        self.side.start(self.bucket_value_AD)

    def forward(
        self,
        query_BMPD: Tensor,
        items_BTD: Tensor,
        side_BTC: Tensor,
        gaps_BMT: Tensor,
        mask_BMT: Tensor,
        timeless: int = 0,
    ) -> Tensor:
        """Pools each candidate's earlier events.

        Args:
            query_BMPD: P queries of each candidate, float; they read the same events.
            items_BTD: item vectors of the events, float.
            side_BTC: action and features of each event, int64.
            gaps_BMT: time-gap bucket of each pair, int32 or int64 in [0, GAP_BUCKETS); see ``ops.code_attention.gap_bucket``.
            mask_BMT: True where the candidate may read the event.
            timeless: how many of a candidate's P queries, the last ones, do not look at time gaps.

        Returns:
            float tensor [B, M, P, D].
        """
        M, P = query_BMPD.shape[1:3]
        q_HBQd = self._heads(self.query(query_BMPD.flatten(1, 2)))
        value_BTD = self.value(items_BTD) + self.side.embed(side_BTC, self.bucket_value_AD)
        # The sink is one more event, with key and value of zeros.
        k_HBTd, v_HBTd = (F.pad(self._heads(x), (0, 0, 0, 1)) for x in (self.key(items_BTD), value_BTD))
        side_BTH = self.side.embed(side_BTC, self.bias_UH)
        side_HB1T = F.pad(side_BTH.permute(2, 0, 1).unsqueeze(2), (0, 1))
        scores_HBQT = (q_HBQd * q_HBQd.shape[-1] ** -0.5) @ k_HBTd.transpose(-1, -2)
        scores_HBMPT = scores_HBQT.unflatten(2, (M, P))
        for queries, timed in ((slice(0, P - timeless), True), (slice(P - timeless, P), False)):
            if queries.start < queries.stop:
                bias_HBMT = self._bias(gaps_BMT, mask_BMT, timed) + side_HB1T
                scores_HBMPT[:, :, :, queries].add_(bias_HBMT.unsqueeze(3))
        pooled_HBQd = scores_HBQT.softmax(-1) @ v_HBTd
        return self.output(pooled_HBQd.permute(1, 2, 0, 3).flatten(2)).view_as(query_BMPD)

    def shared(
        self, query_MD: Tensor, items_ND: Tensor, side_NC: Tensor, gap_N: Tensor | None, begin_M: Tensor, end_M: Tensor
    ) -> Tensor:
        """As ``forward``, of queries that each read events begin .. end - 1 of N, float [M, D]; without gradients.

        Args:
            query_MD, items_ND, side_NC: as above, not padded.
            gap_N: time-gap bucket of each event, the same for all that read it; None for timeless queries.
            begin_M, end_M: int64.
        """
        bias_NH = self.side.embed(side_NC, self.bias_UH)
        if gap_N is not None:
            bias_NH = bias_NH + F.embedding(gap_N, self.bias_UH[-GAP_BUCKETS:])
        value_ND = self.value(items_ND) + self.side.embed(side_NC, self.bucket_value_AD)
        query, key, value = (
            x.unflatten(1, (self.num_heads, -1)) for x in (self.query(query_MD), self.key(items_ND), value_ND)
        )
        query_MHd = query * query.shape[2] ** -0.5
        inputs = (x.detach() for x in (query_MHd, key, value, bias_NH, self.sink_H))
        return self.output(shared_attention(*inputs, begin_M, end_M).flatten(1))

    def _bias(self, gaps_BMT: Tensor, mask_BMT: Tensor, timed: bool) -> Tensor:
        """By the gap, with masked events and the sink as two more of its values: float [H, B, M, T + 1]."""
        sink, masked = GAP_BUCKETS, GAP_BUCKETS + 1
        gap_bias_UH = self.bias_UH[-GAP_BUCKETS:] * timed
        rows = (gap_bias_UH, self.sink_H.unsqueeze(0), self.sink_H.new_full((1, self.num_heads), _MASKED))
        table_HV = torch.cat(rows).t()
        value_BMT = F.pad(gaps_BMT.long().masked_fill(~mask_BMT, masked), (0, 1), value=sink)
        # gather, since its gradient costs a fifteenth of an embedding's
        return table_HV.gather(1, value_BMT.flatten().expand(self.num_heads, -1)).view(-1, *value_BMT.shape)

    def _heads(self, x_BTD: Tensor) -> Tensor:
        """float [H, B, T, d]."""
        return x_BTD.unflatten(-1, (self.num_heads, -1)).permute(2, 0, 1, 3)
