"""Attention by a perceptron: for few events, each of which it can afford to compare with the target in full."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sidrec_torchrec.ops.code_attention import GAP_BUCKETS
from sidrec_torchrec.ranker.side_information import SideInformation


class PairAttention(nn.Module):
    """Pools events by what a perceptron says of each pair of target and event: how much it weighs, and what it says.

    With q the target's vector and x, a, g the event's vector, action (and features) and time-gap bucket::

        z = relu(W1 x + W2 (x * q) + W3 q + action[a] + gap[g])
        pooled = O sum softmax(w_h z)_event z_h        per head h, a part of z; with a learned sink of value 0

    Attention over codes has to be a sum of one number per digit, of scores as of values. Here the target's vector, the event's
    and what the user did with it meet before anything is summed.

    Sources: an activation unit over event, target and their product, Zhou et al. 2018 (Deep Interest Network), section 4.3.
    Unlike there, weights are a softmax, as everywhere else in this ranker, and what is weighed is the hidden layer.

    Args:
        dim: width D of vectors and output.
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
        self.item = nn.Linear(dim, dim, bias=False)
        self.product = nn.Linear(dim, dim, bias=False)
        self.side = SideInformation.of(num_actions, features)
        self.action = nn.Embedding(self.side.num_rows, dim)
        self.gap = nn.Embedding(GAP_BUCKETS, dim)
        self.weight = nn.Linear(dim, num_heads, bias=False)
        self.sink_H = nn.Parameter(torch.zeros(num_heads))
        self.output = nn.Linear(dim, dim)
        nn.init.normal_(self.action.weight, std=3**-0.5)  # what a map of a vector of unit variance starts with
        self.side.start(self.action.weight)
        nn.init.zeros_(self.gap.weight)

    def forward(
        self, query_MD: Tensor, item_MKD: Tensor, side_MKC: Tensor, gap_MK: Tensor, is_event_MK: Tensor
    ) -> Tensor:
        """Pools K events of each target; without any, the result is the output's bias.

        Args:
            query_MD: the targets' vectors, float.
            item_MKD: the events' vectors, float.
            side_MKC: the events' action and features, int64.
            gap_MK: time-gap buckets, int32 or int64 in [0, GAP_BUCKETS); see ``ops.code_attention.gap_bucket``.
            is_event_MK: False where there is no event; the others' values there are not read.

        Returns:
            float [M, D].
        """
        query_M1D = query_MD.unsqueeze(1)
        terms_MKD = self.item(item_MKD) + self.product(item_MKD * query_M1D) + self.query(query_M1D)
        z_MKD = (terms_MKD + self.side.embed(side_MKC, self.action.weight) + self.gap(gap_MK)).relu()
        score_MKH = self.weight(z_MKD).masked_fill(~is_event_MK.unsqueeze(2), -torch.inf)
        sink_M1H = self.sink_H.expand(score_MKH.shape[0], 1, -1)
        share_MKH = torch.cat([score_MKH, sink_M1H], dim=1).softmax(1)[:, :-1]
        pooled_MHd = torch.einsum("mkh,mkhd->mhd", share_MKH, z_MKD.unflatten(2, (self.num_heads, -1)))
        return self.output(pooled_MHd.flatten(1))
