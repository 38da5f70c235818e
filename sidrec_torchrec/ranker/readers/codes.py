"""A reader of packed SIDs, in code space."""

import torch
from torch import Tensor

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.readers.base import READERS, ItemVectors, Reader, Requests
from sidrec_torchrec.ranker.targets import Targets
from sidrec_torchrec.side.code_attention import CodeAttention, Masses
from sidrec_torchrec.side.expansion import SIDEConfig


@READERS.register("codes")
class CodeReader(Reader):
    """Reads packed SIDs in code space: only targets become vectors, and nothing is padded. See ``Reader``.

    Raises:
        ValueError: without ``sid``.
    """

    reads_codes = True
    is_default = True
    unservable = None

    def __init__(
        self,
        config: RankerConfig,
        items_dim: int,
        sid: SIDEConfig | None,
        num_actions: int,
        device: torch.device,
    ) -> None:
        super().__init__(config, items_dim, sid, num_actions, device)
        if sid is None:
            raise ValueError("attention to codes needs the SIDs' codec and mode; got no sid")
        self.spec = sid.codec.spec
        self.attention = CodeAttention(
            sid,
            config.dim,
            config.num_heads,
            side_information={"action": num_actions},
            time_gaps=True,
            vectors=ItemVectors(items_dim, config.dim, config.dropout),
            device=device,
        )

    def item_vectors(self, items: Tensor | None, event_K: Tensor) -> Tensor:
        assert items is not None  # SIDs always travel
        return self.attention.event_vectors(items[event_K])

    def forward(self, batch: RankBatch, items: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
        assert items is not None
        q_SD = self.item_vectors(items, targets.event_S)
        pooled_SPD = self.attention(
            self.queries(q_SD),
            items[targets.visible_V],
            targets.begin_S,
            targets.end_S,
            batch.action_N[targets.visible_V].unsqueeze(1),
            batch.timestamp_N[targets.visible_V],
            batch.timestamp_N[targets.event_S],
            timeless=self.queries.num_learned,
        )
        return q_SD, pooled_SPD

    def serve(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """Candidates of a request share its history; learned queries, which are the same for all, read it once."""
        words_NW, buckets_N1 = requests.items, requests.action_N.unsqueeze(1)
        time_M = requests.request_time_B[requests.request_M]
        q_MD = self.attention.event_vectors(requests.candidates)
        pooled_MD = self.attention.shared(q_MD, words_NW, *requests.ranges, buckets_N1, requests.time_N, time_M)
        pooled_MPD = pooled_MD.unsqueeze(1)
        if self.queries.seeds_KD is None:
            return q_MD, pooled_MPD
        masses = requests.learned
        if masses is None:
            masses = self.learned_masses(words_NW, requests.action_N, requests.begin_B, requests.end_B)
        return q_MD, torch.cat([pooled_MPD, self.attention.pool(masses)[requests.request_M]], dim=1)

    def learned_masses(self, words_NW: Tensor, action_N: Tensor, begin_B: Tensor, end_B: Tensor) -> Masses:
        """What the K learned queries, of which there must be some, need of the events begin .. end - 1 of each of B users.

        No time is looked at: those of later events can be merged into it.
        """
        seeds_KD = self.queries.seeds_KD
        assert seeds_KD is not None
        query_BKD = seeds_KD.expand(begin_B.shape[0], -1, -1)
        return self.attention.masses(query_BKD, words_NW, begin_B, end_B, action_N.unsqueeze(1))
