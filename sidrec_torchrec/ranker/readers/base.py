"""What a reader is, what it can read, and what all of them have: item vectors, and queries."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.ops.code_attention import gap_bucket
from sidrec_torchrec.ranker.arms.base import ARMS, Arm
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.targets import Targets
from sidrec_torchrec.registry import Registry
from sidrec_torchrec.side.code_attention import Masses
from sidrec_torchrec.side.expansion import OfCodec, SIDEConfig
from sidrec_torchrec.side.layer_norm_map import LayerNormMap


class Queries(nn.Module):
    """What each target asks of a history: its own vector, and learned queries that are the same for all targets.

    What the learned ones pool says what the history is like whatever the target is. Source: pooling by multi-head
    attention, Lee et al. 2019 (Set Transformer), section 3.2; they share the maps of the target's own attention.

    Args:
        num_learned: how many are learned; P is one more.
        dim: width D of queries.
    """

    def __init__(self, num_learned: int, dim: int) -> None:
        super().__init__()
        self.num_learned = num_learned
        # like item vectors, whose LayerNorm gives them this scale; the paper calls them seeds, and so do checkpoints
        self.seeds_KD = nn.Parameter(torch.randn(num_learned, dim)) if num_learned else None

    def forward(self, q_SD: Tensor) -> Tensor:
        """float [..., P, D] of the targets' own, [..., D]."""
        own_S1D = q_SD.unsqueeze(-2)
        if self.seeds_KD is None:
            return own_S1D
        return torch.cat([own_S1D, self.seeds_KD.expand(*q_SD.shape[:-1], -1, -1)], dim=-2)


class ItemVectors(LayerNormMap):
    """An arm's item features to item vectors; in training, a share of a vector's components is dropped.

    Args:
        items_dim: width of the features.
        dim: width D of the vectors.
        dropout: the share.
    """

    def __init__(self, items_dim: int, dim: int, dropout: float) -> None:
        super().__init__(items_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features_NE: Tensor, has_item_N: Tensor | None = None) -> Tensor:
        """float [N, D] of float [N, E]; zeros where there is no item."""
        return self.dropout(super().forward(features_NE, has_item_N))


class PackedSIDs(nn.Module):
    """The batch's SIDs as they travel: KeyedJaggedTensor of N events -> int64 [N, W], checked.

    Args:
        sid: codec of the SIDs, and the feature they travel as.
        device: where its constants are.
    """

    def __init__(self, sid: SIDEConfig, device: torch.device) -> None:
        super().__init__()
        self._feature = sid.feature_names[0]
        self.codec = OfCodec(sid, {}, device)

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        return self.codec.read(items, self._feature).values()


@dataclass(frozen=True)
class Requests:
    """What a server is asked of a reader.

    Args:
        items: what the reader reads of all requests' events, one request after another, oldest first: packed SIDs, int64
            [N, W], or features, float [N, E].
        has_item_N: bool, False for an event whose item is missing.
        side_NC: action and features of each event, int64.
        time_N: of each event, int64.
        begin_B, end_B: where each request's events begin and end, int64.
        candidates: as ``items``, of all candidates, [M, ...].
        request_M: which request each candidate belongs to, int64.
        request_time_B: of each request, int64.
        learned: what the learned queries of a reader of codes need of all events of each request's user, if it is kept; else
            they read the events above.
    """

    items: Tensor
    has_item_N: Tensor
    side_NC: Tensor
    time_N: Tensor
    begin_B: Tensor
    end_B: Tensor
    candidates: Tensor
    request_M: Tensor
    request_time_B: Tensor
    learned: Masses | None = None

    @property
    def ranges(self) -> tuple[Tensor, Tensor]:
        """Where the events that each candidate reads begin and end, [M] each."""
        return self.begin_B[self.request_M], self.end_B[self.request_M]

    @property
    def gap_N(self) -> Tensor:
        """Time-gap bucket of each event from its request, int32; of events of no request, that from some other."""
        event_N = torch.arange(self.time_N.shape[0], device=self.time_N.device)
        last = self.end_B.shape[0] - 1
        request_N = torch.searchsorted(self.end_B, event_N, right=True).clamp_max(last)
        return gap_bucket(self.request_time_B[request_N] - self.time_N)


class Reader(nn.Module, ABC):
    """How targets read a history. Registered in ``READERS`` under the name that ``RankerConfig.attention`` gives.

    What it reads is of one of two kinds: the vectors that an arm's module makes of events, or packed SIDs as they travel.

    Args:
        config: sizes.
        items_dim: width E of the arm's features.
        sid: codec and mode of the packed SIDs, for a reader of codes.
        num_actions: actions an event can have.
        device: where to build it.
        features: number of codes of each feature of an event, by name.

    Attributes:
        reads_codes: whether it reads packed SIDs, which have no gradient; else vectors.
        finds_top_events: whether it does what ``RankerConfig.top_events`` says; others are refused with it.
        is_default: whether ``auto`` chooses it, for what it reads.
        unservable: why ``ServingRanker`` cannot ask it, to follow "this ranker"; None if it can, by ``serve``.
        queries: what each target asks.
        spec: of the SIDs that a reader of codes reads.
    """

    reads_codes: ClassVar[bool] = False
    finds_top_events: ClassVar[bool] = False
    is_default: ClassVar[bool] = False
    unservable: ClassVar[str | None] = "has a reader that servers cannot ask; train one with another --model.attention"
    spec: SIDSpec

    def __init__(
        self,
        config: RankerConfig,
        items_dim: int,
        sid: SIDEConfig | None,
        num_actions: int,
        device: torch.device,
        features: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.queries = Queries(config.learned_queries, config.dim).to(device)

    @classmethod
    def check_arm(cls, name: str) -> None:
        """Refuses an arm it cannot read, before anything is built.

        Raises:
            SidrecError: on such an arm; names those it can read.
        """
        if cls.reads_codes and not ARMS[name].travels_as_codes:
            travel = ", ".join(arm for arm in ARMS if ARMS[arm].travels_as_codes)
            raise SidrecError(f"attention to codes needs an arm whose SIDs travel: {travel}; got '{name}'")

    @classmethod
    def items(cls, arm: Arm, device: torch.device) -> nn.Module:
        """The module that makes what it reads: item KJT of N events -> float [N, E], or packed SIDs int64 [N, W].

        Raises:
            SidrecError: for a reader of codes, if the arm has not one SID to read; its class alone is refused earlier, by
                ``check_arm``.
        """
        if not cls.reads_codes:
            return arm.module(device)
        if len(arm.sids) != 1:
            raise SidrecError(f"attention to codes reads one SID of each event; this arm has {len(arm.sids)}")
        return PackedSIDs(arm.sids[0], device)

    @property
    def num_pools(self) -> int:
        """P: vectors it pools for each target."""
        return 1 + self.queries.num_learned

    @abstractmethod
    def item_vectors(self, items: Tensor | None, event_K: Tensor, has_item_N: Tensor | None = None) -> Tensor:
        """Vectors of some events' items, float [K, D]; zeros where an item is missing.

        Args:
            items: see ``forward``.
            event_K: places, int64.
            has_item_N: bool, of all events, False for one whose item is missing; None if none is, or if the words say it.
        """

    @abstractmethod
    def forward(self, batch: RankBatch, items: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
        """Vectors of the targets, float [S, D], and what their queries pool, float [S, P, D].

        Args:
            batch: N events.
            items: what the module of ``items`` gave: float [N, E], None if all items are alike; or packed SIDs, int64.
            targets: of the batch.
        """

    def serve(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """As ``forward``, of requests' candidates: float [M, D] and [M, P, D]."""
        raise NotImplementedError


READERS: Registry[type[Reader]] = Registry("reader")
