"""A reader of packed SIDs, in code space."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.ops.code_attention import gap_bucket
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.pair_attention import PairAttention
from sidrec_torchrec.ranker.readers.base import READERS, ItemVectors, Reader, Requests
from sidrec_torchrec.ranker.side_information import SideInformation
from sidrec_torchrec.ranker.targets import Targets
from sidrec_torchrec.side.code_attention import CodeAttention, Masses
from sidrec_torchrec.side.expansion import SIDEConfig


@READERS.register("codes")
class CodeReader(Reader):
    """Reads packed SIDs in code space: only targets become vectors, and nothing is padded. See ``Reader``.

    With ``top_events`` K, the K events to which a target gives the highest scores become vectors, too, which it reads by
    ``PairAttention``; what that pools is the last of its pools.

    Raises:
        ValueError: without ``sid``.
    """

    reads_codes = True
    finds_top_events = True
    is_default = True
    unservable = None

    def __init__(
        self,
        config: RankerConfig,
        items_dim: int,
        sid: SIDEConfig | None,
        num_actions: int,
        device: torch.device,
        features: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(config, items_dim, sid, num_actions, device, features)
        if sid is None:
            raise ValueError("attention to codes needs the SIDs' codec and mode; got no sid")
        self.spec = sid.codec.spec
        side = SideInformation.of(num_actions, features)
        self.attention = CodeAttention(
            sid,
            config.dim,
            config.num_heads,
            side_information=side.sizes,
            time_gaps=True,
            vectors=ItemVectors(items_dim, config.dim, config.dropout),
            device=device,
        )
        side.start(self.attention.bucket_value_AD)
        self.top_events = config.top_events
        self.pairs = None
        if config.top_events:
            self.pairs = PairAttention(config.dim, config.num_heads, num_actions, features).to(device)

    @property
    def num_pools(self) -> int:
        return super().num_pools + (self.pairs is not None)

    def item_vectors(self, items: Tensor | None, event_K: Tensor, has_item_N: Tensor | None = None) -> Tensor:
        assert items is not None  # SIDs always travel
        return self.attention.event_vectors(items[event_K])

    def forward(self, batch: RankBatch, items: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
        assert items is not None
        q_SD = self.item_vectors(items, targets.event_S)
        events = (
            items[targets.visible_V],
            targets.begin_S,
            targets.end_S,
            batch.side_NC[targets.visible_V],
            batch.timestamp_N[targets.visible_V],
            batch.timestamp_N[targets.event_S],
        )
        pooled_SPD = self.attention(self.queries(q_SD), *events, timeless=self.queries.num_learned)
        return q_SD, torch.cat([pooled_SPD, *self._pool_top(q_SD, *events)], dim=1)

    def serve(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """Candidates of a request share its history; learned queries, which are the same for all, read it once."""
        words_NW, side_NC = requests.items, requests.side_NC
        time_M = requests.request_time_B[requests.request_M]
        q_MD = self.attention.event_vectors(requests.candidates)
        events = (words_NW, *requests.ranges, side_NC, requests.time_N, time_M)
        pools = [self.attention.shared(q_MD, *events).unsqueeze(1)]
        if self.queries.seeds_KD is not None:
            masses = requests.learned
            if masses is None:
                masses = self.learned_masses(words_NW, side_NC, requests.begin_B, requests.end_B)
            pools.append(self.attention.pool(masses)[requests.request_M])
        return q_MD, torch.cat([*pools, *self._pool_top(q_MD, *events)], dim=1)

    def learned_masses(self, words_NW: Tensor, side_NC: Tensor, begin_B: Tensor, end_B: Tensor) -> Masses:
        """What the K learned queries, of which there must be some, need of the events begin .. end - 1 of each of B users.

        No time is looked at: those of later events can be merged into it.
        """
        seeds_KD = self.queries.seeds_KD
        assert seeds_KD is not None
        query_BKD = seeds_KD.expand(begin_B.shape[0], -1, -1)
        return self.attention.masses(query_BKD, words_NW, begin_B, end_B, side_NC)

    def _pool_top(
        self,
        q_MD: Tensor,
        words_NW: Tensor,
        begin_M: Tensor,
        end_M: Tensor,
        side_NC: Tensor,
        time_N: Tensor,
        time_M: Tensor,
    ) -> list[Tensor]:
        """What each target pools of its top events, float [M, 1, D]; nothing without such events."""
        if self.pairs is None:
            return []
        event_MK = self.attention.top_events(q_MD, words_NW, begin_M, end_M, side_NC, time_N, time_M, k=self.top_events)
        is_event_MK = event_MK >= 0
        # where there is no event, one of zeros stands behind all others: there may be none at all
        event_MK = torch.where(is_event_MK, event_MK, words_NW.shape[0])
        # targets share many of their events, of which each is decoded once
        event_U, place_MK = torch.unique(event_MK, return_inverse=True)
        x_UD = self.item_vectors(F.pad(words_NW, (0, 0, 0, 1)), event_U)
        x_MKD = F.embedding(place_MK, x_UD)
        gap_MK = gap_bucket(time_M.unsqueeze(1) - F.pad(time_N, (0, 1))[event_MK])
        side_MKC = F.pad(side_NC, (0, 0, 0, 1))[event_MK]
        return [self.pairs(q_MD, x_MKD, side_MKC, gap_MK, is_event_MK).unsqueeze(1)]
