"""A trained ranker as a module that scores requests: plain tensors in, probabilities out, ready to be exported."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.batches import RankBatch, with_features
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.names import escape
from sidrec_torchrec.ops.code_attention import pairs_of
from sidrec_torchrec.ranker.arms import Arm
from sidrec_torchrec.ranker.arms.base import words_of
from sidrec_torchrec.ranker.list_tables import ListTables
from sidrec_torchrec.ranker.model import Context, Ranker
from sidrec_torchrec.ranker.readers import Requests
from sidrec_torchrec.ranker.targets import Targets
from sidrec_torchrec.side.mapped_rows import holding_rows

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
FEATURE_INPUTS: dict[str, tuple[str, ...]] = {
    "feature_NF": ("events", "features"),
    "known_MF": ("candidates", "known features"),
}
"""And these, if its events have features."""
LIST_INPUTS: dict[str, tuple[str, ...]] = {
    "user_values_V": ("user values",),
    "user_lengths_BL": ("requests", "user lists"),
}
"""And these, if any feature of its users is a list."""

_OF_EVENTS = ("action_N", "weight_N", "values_NR", "features_NF", "timestamp_N", "order_N", "item_N")  # of a RankBatch


class ServingRanker(nn.Module):
    """Scores candidates of B requests, each against the history of its user.

    Made of a trained ``Ranker`` whose items are packed SIDs, unsharded; shares its parameters. The candidates of a request
    share its history; learned queries, which do not depend on the candidate, read it once per request.

    Args:
        ranker: the trained ranker.
        sids: what travels of an item, by the SIDs' names; the words of all, side by side, are what requests hold.
        items: packed SIDs, int64 [N, W], to what the ranker's reader reads; None for a reader of packed SIDs.

    Raises:
        SidrecError: if its reader cannot be served.
    """

    def __init__(self, ranker: Ranker, sids: Mapping[str, SIDSpec], items: nn.Module | None = None) -> None:
        super().__init__()
        reader = ranker.head.reader
        if reader.unservable is not None:
            raise SidrecError(f"this ranker {reader.unservable}")
        self.sids = dict(sids)
        self.reader = reader
        self.items = items or nn.Identity()
        self.interaction = ranker.head.interaction
        self.num_tasks = ranker.head.num_tasks
        self.scales = ranker.head.scales
        self.features = ranker.head.features
        bags = ranker.users.embedding_bags if ranker.users is not None else {}
        weights = {name: bags[escape(f"user_{name}")].weight.detach() for name in ranker.head.user_features}
        lists = ListTables([weights.pop(name) for name in ranker.user_lists])
        self.user_tables = nn.ModuleList(map(nn.Embedding.from_pretrained, weights.values()))
        self.list_tables = lists
        self.eval()

    @staticmethod
    def of(ranker: Ranker, arm: Arm) -> "ServingRanker":
        """A ranker of that arm.

        Raises:
            SidrecError: if its reader cannot be served, or the arm does not read SIDs.
        """
        sids = arm.served_sids()
        if not sids:
            raise SidrecError(
                "this ranker's arm reads no SIDs: train one with --arm side, or score with sidrec predict"
            )
        items = None if ranker.head.reader.reads_codes else arm.served_module(ranker.items)
        return ServingRanker(ranker, sids, items)

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
        feature_NF: Tensor | None = None,
        known_MF: Tensor | None = None,
        user_values_V: Tensor | None = None,
        user_lengths_BL: Tensor | None = None,
    ) -> Tensor:
        """Predictions for each candidate and task: probability of a positive, or the value of a regression; those come last.

        Args:
            history_NW: packed SIDs of all requests' events, one request after another, oldest first; int64. All words of an
                event whose item is missing are ``NO_SID``.
            action_N: the labels: with one task 1 for a positive event, 0 for a negative one; see ``data.tasks``; int64.
            time_N: of each event; int64.
            offsets_B1: where each request's events begin and end, from 0 to N; int64.
            candidate_MW: packed SIDs of all candidates; int64.
            request_M: which request each candidate belongs to; int64.
            request_time_B: int64.
            num_events_B: how many events the user had so far, those not sent included; int64.
            user_BF: code of each user feature that is no list, in the order of ``RankerHead.user_features``; int64.
            feature_NF: code of each feature of each event, int64; None without features, as the next.
            known_MF: of each candidate, code of each feature that is known of it: the first of ``feature_NF``'s; int64.
            user_values_V, user_lengths_BL: codes of the user features that are lists, as ``ListTables`` takes them; None
                without any.

        Returns:
            float [M]; with several tasks [M, K].
        """
        begin_B, end_B = ranges_of(offsets_B1, request_time_B.shape[0])
        requests = Requests(
            items=self.items(history_NW),
            has_item_N=history_NW[:, 0] >= 0,
            side_NC=with_features(action_N, feature_NF),
            time_N=time_N,
            begin_B=begin_B,
            end_B=end_B,
            candidates=self.items(candidate_MW),
            request_M=request_M,
            request_time_B=request_time_B,
        )
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
        return self.score(requests, context, self.users(user_BF, user_values_V, user_lengths_BL), known_MF)

    def users(self, user_BF: Tensor, user_values_V: Tensor | None, user_lengths_BL: Tensor | None) -> list[Tensor]:
        """A vector of each user feature, float [B, D]; lists come last."""
        users_BD = [table(user_BF[:, f]) for f, table in enumerate(self.user_tables)]
        if user_values_V is None or user_lengths_BL is None:
            return users_BD
        return users_BD + self.list_tables(user_values_V, user_lengths_BL)

    def score(
        self, requests: Requests, context: Context, users_BD: list[Tensor], known_MF: Tensor | None = None
    ) -> Tensor:
        """Predictions, as ``forward``, of candidates that have that context."""
        q_MD, pooled_MPD = self.reader.serve(requests)
        users_MD = [user_BD[requests.request_M] for user_BD in users_BD]
        prediction_MK = self.scales(self.interaction(q_MD, pooled_MPD, context, users_MD, known_MF))
        return prediction_MK.squeeze(1) if self.scales.num_outputs == 1 else prediction_MK

    @property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """What it takes, in this order, and the sizes of each."""
        return INPUTS | self.more_inputs

    @property
    def more_inputs(self) -> dict[str, tuple[str, ...]]:
        """What it takes besides ``INPUTS``."""
        return more_inputs(len(self.features), len(self.list_tables.tables))

    @property
    def fixed_sizes(self) -> dict[str, int]:
        """Sizes in ``INPUTS`` that are the same in every call."""
        return {
            "words": sum(spec.num_words for spec in self.sids.values()),
            "user features": len(self.user_tables),
            "features": len(self.features),
            "known features": len(self.features.known),
            "user lists": len(self.list_tables.tables),
        }


def more_inputs(num_features: int, num_lists: int) -> dict[str, tuple[str, ...]]:
    """What a ranker takes besides ``INPUTS``, if its events have so many features, and its users so many that are lists."""
    return (FEATURE_INPUTS if num_features else {}) | (LIST_INPUTS if num_lists else {})


def ranges_of(offsets_B1: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """Where each request's events begin and end, [B] each."""
    request_B = torch.arange(B, device=offsets_B1.device)
    return offsets_B1[request_B], offsets_B1[request_B + 1]  # slices would make export refuse B = 1


def export(model: ServingRanker) -> ExportedProgram:
    """The module as a program for any number of requests, events and candidates, none included."""
    return export_any_size(model, model.inputs, model.fixed_sizes)


def export_any_size(
    model: nn.Module,
    inputs: Mapping[str, tuple[str, ...]],
    fixed: Mapping[str, int],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> ExportedProgram:
    """A module as a program for any number of requests, events and candidates, none included.

    Args:
        model: takes plain tensors.
        inputs: the sizes of each, in the order of its arguments; see ``INPUTS``.
        fixed: the other sizes in them.
        dtypes: of inputs, by name; int64 where none is named.
    """
    requests = Dim("requests", min=0)
    dims = {"requests": requests, "requests + 1": requests + 1}
    dims |= {name: Dim(name.replace(" ", "_"), min=0) for name in ("events", "candidates", "user values")}
    sizes = {
        "requests": 3,
        "requests + 1": 4,
        "events": 5,
        "candidates": 6,
        "user values": 7,
    }  # of the example; 0 and 1 would be constants
    sizes |= fixed
    dtypes = dtypes or {}
    example = [
        torch.zeros([sizes[size] for size in shape], dtype=dtypes.get(name, torch.int64))
        for name, shape in inputs.items()
    ]
    dynamic = [{i: dims[size] for i, size in enumerate(shape) if size in dims} for shape in inputs.values()]
    with torch.no_grad(), holding_rows(model):
        return torch.export.export(_Positional(model, tuple(inputs)), tuple(example), dynamic_shapes=(tuple(dynamic),))


class _Positional(nn.Module):
    """A module that takes some of its arguments, by their places."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self._names = model, names

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(**dict(zip(self._names, inputs, strict=True)))


class WithWords:
    """What travels with an event of an arm that reads SIDs, and besides the words that a server sends of it.

    Args:
        arm: the arm.
    """

    def __init__(self, arm: Arm) -> None:
        self._arm = arm
        self._names = [f"served_{i}" for i in range(sum(words.shape[1] for words in arm.words.values()))]
        self.keys = (*arm.keys, *self._names)

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        """See ``ItemFeatures``."""
        words_NW = np.concatenate([words_of(words, item_N) for words in self._arm.words.values()], axis=1)
        columns = torch.from_numpy(words_NW).unbind(1)
        return {**self._arm.values(item_N), **dict(zip(self._names, columns, strict=True))}

    def words(self, batch: RankBatch) -> Tensor:
        """Of a batch's events, int64 [N, W]; the batch's features are these."""
        columns = [batch.items[name].values() for name in self._names]
        return torch.stack([column.long() for column in columns], dim=1)


def alone(batch: RankBatch, most: int) -> RankBatch:
    """Some of a batch's targets, ``most`` at most, each the only one of its row: as a server sees it."""
    targets = Targets.of(batch)
    chosen_S = torch.arange(0, len(targets.row_S), max(1, -(-len(targets.row_S) // most)))
    row_S, event_S = targets.row_S[chosen_S], targets.event_S[chosen_S]
    begin_S, end_S = targets.begin_S[chosen_S], targets.end_S[chosen_S]
    rows = [
        torch.cat([targets.visible_V[begin:end], event])
        for begin, end, event in zip(begin_S.tolist(), end_S.tolist(), event_S.split(1), strict=True)
    ]
    event_P, lengths_S = torch.cat(rows), end_S - begin_S + 1
    item_keys, user_keys = batch.items.keys(), batch.users.keys()
    columns = [batch.items[key].values().view(len(batch.action_N), -1)[event_P] for key in item_keys]
    flat = [column.flatten() for column in columns]
    user_values, user_lengths = users_of(batch.users, user_keys, row_S)
    ones_S = torch.ones_like(row_S)
    return replace(
        batch,
        items=KeyedJaggedTensor(
            keys=item_keys,
            values=torch.cat(flat) if flat else torch.zeros(0),
            lengths=torch.cat([lengths_S * c.shape[1] for c in columns]) if flat else lengths_S[:0],
            stride=len(row_S),
        ),
        users=KeyedJaggedTensor(
            keys=user_keys,
            values=user_values,
            lengths=user_lengths.flatten(),
            stride=len(row_S),
        ),
        lengths_B=lengths_S,
        num_targets_B=ones_S,
        weight_B=batch.weight_B[row_S],
        **{name: getattr(batch, name)[event_P] for name in _OF_EVENTS},
        visible_N=torch.ones_like(event_P, dtype=torch.bool),
    )


def users_of(
    users: KeyedJaggedTensor, names: Sequence[str], row_S: Tensor, *, by_row: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes that F features of users have in S rows, int64 [V], and how many each feature has in each row, int64.

    Args:
        users: of a batch.
        names: of the features.
        row_S: of the batch.
        by_row: whether all codes of a row stand together, and numbers are [S, F]; else those of a feature do, and they are [F, S].
    """
    first_F = torch.tensor([users.keys().index(name) for name in names], dtype=torch.int64) * users.stride()
    place = row_S.unsqueeze(1) + first_F if by_row else first_F.unsqueeze(1) + row_S
    begin, end = users.offsets()[place].long(), users.offsets()[place + 1].long()
    _, value_V = pairs_of(begin.flatten(), end.flatten())
    return users.values()[value_V].long(), end - begin


def requests_of(
    batch: RankBatch, words_NW: Tensor, num_known: int = 0, user_lists: Sequence[str] = ()
) -> dict[str, Tensor]:
    """What a server is asked for each target of a batch: a request with the events it may read, and itself as candidate.

    Args:
        batch: of sequences.
        words_NW: packed SIDs of its events, int64.
        num_known: how many of its features are known of a target; ``Features.known``.
        user_lists: features of users that are lists.

    Returns:
        ``ServingRanker``'s inputs.
    """
    targets = Targets.of(batch)
    lengths_S = targets.end_S - targets.begin_S
    offsets_S1 = nn.functional.pad(lengths_S.cumsum(0), (1, 0))
    _, read_P = pairs_of(targets.begin_S, targets.end_S)  # P: events of all requests
    event_P = targets.visible_V[read_P]
    user_keys = batch.users.keys()
    single = [name for name in user_keys if name not in user_lists]
    code_X, ones_SF = users_of(batch.users, single, targets.row_S, by_row=True)
    lists = users_of(batch.users, user_lists, targets.row_S, by_row=True)
    features = {
        "feature_NF": batch.features_NF[event_P],
        "known_MF": batch.features_NF[targets.event_S, :num_known],
    }
    return {
        "history_NW": words_NW[event_P],
        "action_N": batch.action_N[event_P],
        "time_N": batch.timestamp_N[event_P],
        "offsets_B1": offsets_S1,
        "candidate_MW": words_NW[targets.event_S],
        "request_M": torch.arange(len(lengths_S), device=lengths_S.device),
        "request_time_B": batch.timestamp_N[targets.event_S],
        "num_events_B": batch.order_N[targets.event_S],
        "user_BF": code_X.view(ones_SF.shape),
        **(features if batch.features_NF.shape[1] else {}),
        **(dict(zip(LIST_INPUTS, lists, strict=True)) if user_lists else {}),
    }
