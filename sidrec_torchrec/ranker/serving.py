"""A trained ranker as a module that scores requests: plain tensors in, probabilities out, ready to be exported."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.ranker.model import Context, Ranker
from sidrec_torchrec.ranker.readers import Reader, Requests
from sidrec_torchrec.ranker.targets import Targets

INPUTS: dict[str, tuple[str, ...]] = {
    "history_NW": ("events", "words"),
    "action_N": ("events",),
    "time_N": ("events",),
    "offsets_B1": ("requests + 1",),
    "candidate_MW": ("candidates", "words"),
    "request_M": ("candidates",),
    "request_time_B": ("requests",),
    "num_events_B": ("requests",),
    "user_BF": ("requests", "user features"),
}
"""What ``ServingRanker`` takes, in this order, and the sizes of each; all int64."""


class ServingRanker(nn.Module):
    """Scores candidates of B requests, each against the history of its user, in code space.

    Made of a trained ``Ranker`` whose reader can be served, unsharded; shares its parameters. The candidates of a request
    share its history, which is never decoded; learned queries, which do not depend on the candidate, read it once per request.

    Args:
        ranker: the trained ranker.

    Raises:
        SidrecError: if its reader cannot be served: one of vectors, or one with blocks.
    """

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        reader = ranker.head.reader
        if reader.unservable is not None:
            raise SidrecError(f"this ranker {reader.unservable}")
        self.reader = cast(Reader, reader)  # the only other kind, with blocks, is unservable
        self.interaction = ranker.head.interaction
        self.num_tasks = ranker.head.num_tasks
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
        """Probability of a positive, for each candidate and task.

        Args:
            history_NW: packed SIDs of all requests' events, one request after another, oldest first; int64.
            action_N: the labels: with one task 1 for a positive event, 0 for a negative one; see ``data.tasks``; int64.
            time_N: of each event; int64.
            offsets_B1: where each request's events begin and end, from 0 to N; int64.
            candidate_MW: packed SIDs of all candidates; int64.
            request_M: which request each candidate belongs to; int64.
            request_time_B: int64.
            num_events_B: how many events the user had so far, those not sent included; int64.
            user_BF: code of each user feature, in the order of ``RankerHead.user_features``; int64.

        Returns:
            float [M]; with several tasks [M, K].
        """
        requests = Requests(history_NW, action_N, time_N, offsets_B1, candidate_MW, request_M, request_time_B)
        q_MD, pooled_MPD = self.reader.serve(requests)
        begin_M, end_M = requests.ranges
        context = Context.of_ranges(
            order_S=num_events_B[request_M],
            time_S=request_time_B[request_M],
            begin_S=begin_M,
            end_S=end_M,
            time_V=time_N,
            action_V=action_N,
            num_tasks=self.num_tasks,
        )
        users_MD = [table(user_BF[:, f])[request_M] for f, table in enumerate(self.user_tables)]
        probability_MK = self.interaction(q_MD, pooled_MPD, context, users_MD).sigmoid()
        return probability_MK.squeeze(1) if self.num_tasks == 1 else probability_MK


def export(model: ServingRanker) -> ExportedProgram:
    """The module as a program for any number of requests, events and candidates, none included."""
    requests = Dim("requests", min=0)
    dims = {"requests": requests, "requests + 1": requests + 1}
    dims |= {name: Dim(name, min=0) for name in ("events", "candidates")}
    sizes = {
        "requests": 3,
        "requests + 1": 4,
        "events": 5,
        "candidates": 6,
    }  # of the example; 0 and 1 would be constants
    sizes |= {"words": model.reader.spec.num_words, "user features": len(model.user_tables)}
    example = [torch.zeros([sizes[size] for size in shape], dtype=torch.int64) for shape in INPUTS.values()]
    dynamic = [{i: dims[size] for i, size in enumerate(shape) if size in dims} for shape in INPUTS.values()]
    return torch.export.export(model, tuple(example), dynamic_shapes=tuple(dynamic))


def requests_of(batch: RankBatch, words_NW: Tensor) -> dict[str, Tensor]:
    """What a server is asked for each target of a batch: a request with the events it may read, and itself as candidate.

    Args:
        batch: of sequences.
        words_NW: packed SIDs of its events, int64.

    Returns:
        ``ServingRanker``'s inputs.
    """
    targets = Targets.of(batch)
    lengths_S = targets.end_S - targets.begin_S
    offsets_S1 = nn.functional.pad(lengths_S.cumsum(0), (1, 0))
    request_P = torch.repeat_interleave(lengths_S)  # P: events of all requests
    read_P = torch.arange(len(request_P), device=request_P.device) + (targets.begin_S - offsets_S1[:-1])[request_P]
    event_P = targets.visible_V[read_P]
    user_BF = batch.users.values().view(len(batch.users.keys()), len(batch.lengths_B)).T
    return {
        "history_NW": words_NW[event_P],
        "action_N": batch.action_N[event_P],
        "time_N": batch.timestamp_N[event_P],
        "offsets_B1": offsets_S1,
        "candidate_MW": words_NW[targets.event_S],
        "request_M": torch.arange(len(lengths_S), device=lengths_S.device),
        "request_time_B": batch.timestamp_N[targets.event_S],
        "num_events_B": batch.order_N[targets.event_S],
        "user_BF": user_BF[targets.row_S],
    }
