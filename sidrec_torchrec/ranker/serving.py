"""A trained ranker as a module that scores requests: plain tensors in, probabilities out, ready to be exported."""

import torch
from torch import Tensor, nn

from sidrec_torchrec.ranker.model import Context, Ranker
from sidrec_torchrec.ranker.readers import CodeReader


class ServingRanker(nn.Module):
    """Scores candidates of B requests, each against the history of its user, in code space.

    Made of a trained ``Ranker`` that attends to codes, unsharded; shares its parameters. The candidates of a request share
    its history, which is never decoded.

    Args:
        ranker: the trained ranker.

    Raises:
        ValueError: if the ranker attends to vectors.
    """

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        reader = ranker.head.reader
        if not isinstance(reader, CodeReader):
            raise ValueError("the ranker attends to vectors; train one with attention to codes to serve it")
        self.attention = reader.attention
        self.vectors = reader.vectors
        self.interaction = ranker.head.interaction
        bags = ranker.users.embedding_bags if ranker.users is not None else {}
        self.user_tables = nn.ModuleList(
            nn.Embedding.from_pretrained(bags[f"user_{name}"].weight.detach()) for name in ranker.head.user_features
        )
        self.eval()

    def forward(
        self,
        history_NW: Tensor,
        action_N: Tensor,
        time_N: Tensor,
        offsets_B1: Tensor,
        candidate_MW: Tensor,
        request_M: Tensor,
        request_time_B: Tensor,
        num_events_B: Tensor,
        user_BF: Tensor,
    ) -> Tensor:
        """Probability of a positive, for each candidate.

        Args:
            history_NW: packed SIDs of all requests' events, one request after another, oldest first; int64.
            action_N: 1 for a positive event, 0 for a negative one; int64.
            time_N: of each event; int64.
            offsets_B1: where each request's events begin and end, from 0 to N; int64.
            candidate_MW: packed SIDs of all candidates; int64.
            request_M: which request each candidate belongs to; int64.
            request_time_B: int64.
            num_events_B: how many events the user had so far, those not sent included; int64.
            user_BF: code of each user feature, in the order of ``RankerHead.user_features``; int64.

        Returns:
            float [M].
        """
        begin_M, end_M = offsets_B1[request_M], offsets_B1[request_M + 1]
        time_M = request_time_B[request_M]
        q_MD = self.vectors(self.attention.events(candidate_MW))
        pooled_MD = self.attention(q_MD, history_NW, begin_M, end_M, action_N.unsqueeze(1), time_N, time_M)
        context = Context.of_ranges(
            order_S=num_events_B[request_M],
            time_S=time_M,
            begin_S=begin_M,
            end_S=end_M,
            time_V=time_N,
            action_V=action_N,
        )
        users_MD = [table(user_BF[:, f])[request_M] for f, table in enumerate(self.user_tables)]
        return self.interaction(q_MD, pooled_MD, context, users_MD).sigmoid()
