"""A reader of vectors of all events."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.ranker.attention import TargetAttention
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.readers.base import READERS, ItemVectors, Reader, Requests
from sidrec_torchrec.ranker.readers.history import PaddedHistory, pool_requests
from sidrec_torchrec.ranker.targets import Targets
from sidrec_torchrec.side.expansion import SIDEConfig


@READERS.register("vectors")
class VectorReader(Reader):
    """Reads vectors of all events, in padded blocks; for any arm. See ``Reader``."""

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
        self.vectors = ItemVectors(items_dim, config.dim, config.dropout)
        self.attention = TargetAttention(config.dim, config.num_heads, num_actions, features)
        self.to(device)

    def item_vectors(self, items: Tensor | None, event_K: Tensor, has_item_N: Tensor | None = None) -> Tensor:
        has_item_K = None if has_item_N is None else has_item_N[event_K]
        if items is None:  # all items alike
            linear = self.vectors.linear
            return self.vectors(linear.weight.new_zeros(len(event_K), linear.in_features), has_item_K)
        return self.vectors(items[event_K], has_item_K)

    def forward(self, batch: RankBatch, items: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
        is_read_N = batch.visible_N.clone()
        is_read_N[targets.event_S] = True
        x_KD = self.item_vectors(items, is_read_N.nonzero().squeeze(1), batch.has_item_N)
        place_N = is_read_N.cumsum(0) - 1  # of those that are read, among them
        q_SD = x_KD[place_N[targets.event_S]]
        history = PaddedHistory.of(batch, targets.visible_V)
        return q_SD, history.pool(self.attention, self.queries(q_SD), targets, x_KD[place_N[targets.visible_V]])

    def serve(self, requests: Requests) -> tuple[Tensor, Tensor]:
        x_ND, q_MD = self.vectors(requests.items, requests.has_item_N), self.vectors(requests.candidates)
        return q_MD, pool_requests(self.attention, self.queries, q_MD, x_ND, requests)
