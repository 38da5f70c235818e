"""A ranker that trains the tokenizer with it: each event's item is encoded anew, and its gradient goes through the digits."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.fusion.item_store import ItemStore
from sidrec_torchrec.fusion.model import VQFusion
from sidrec_torchrec.ranker.model import Ranker, RankerConfig, RankerOutput

_KEY = "item"


class ItemRows:
    """What travels with an event while its tokenizer is trained: the row of its item."""

    keys = (_KEY,)

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        """int64 [N] of int32 [N]."""
        return {_KEY: torch.from_numpy(item_N.astype(np.int64))}


class TokenizedItems(nn.Module):
    """Items as their SIDs will decode to, by a tokenizer in training.

    Args:
        tokenizer: trained with the ranker.
        items: content by row.
        own_rows: int64, rows of the items that the tokenizer's own loss is taken over.
        own_items: how many of them are drawn for a batch, over all processes.
        own_weight: of the tokenizer's own loss.
        seed: of the draws.
    """

    def __init__(
        self, tokenizer: VQFusion, items: ItemStore, own_rows: np.ndarray, own_items: int, own_weight: float, seed: int
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.own_weight = own_weight
        self._items = items
        self._own_rows = torch.from_numpy(own_rows)
        self._own_items = own_items
        self._seed = seed
        # counted in checkpoints: a resumed run draws what it would have drawn
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, items: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """Vectors of N events, float [N, latent_dim]; the tokenizer's own loss, a scalar, 0 in evaluation."""
        row_U, event_N = items[_KEY].values().unique(return_inverse=True)
        content = self._items.select(row_U).to(row_U.device)
        z_UD = self.tokenizer.quantizer(self.tokenizer.latent(content)).z_q_ND
        z_UD = z_UD * z_UD.shape[1] ** 0.5  # from total variance 1 to variance 1 of each component
        return z_UD[event_N], self._own_loss(row_U.device)

    def _own_loss(self, device: torch.device) -> Tensor:
        """As in the tokenizer's training, on items drawn alike in all processes, of which each takes its share."""
        if not self.training:
            return torch.zeros((), device=device)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + int(self.step))
        self.step += 1
        drawn_G = torch.randint(len(self._own_rows), (self._own_items,), generator=generator)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        loss, _, _ = self.tokenizer(self._items.select(self._own_rows[drawn_G[rank::world_size]]).to(device))
        return self.own_weight * loss


class TuningRanker(Ranker):
    """A ranker of items that a tokenizer in training encodes; learns both.

    Gradients pass straight through the digits to the encoders, and reach the basis, which decodes them, as they are: what
    the SIDs say turns towards what predicts labels. The tokenizer's own loss keeps them telling what items are.

    Args:
        config: sizes; attention to vectors, as codes have no gradient.
        items: encodes.
        user_features: number of codes by user feature.
        device: where to build the user tables.
        num_tasks: labels of an event.
    """

    def __init__(
        self,
        config: RankerConfig,
        items: TokenizedItems,
        user_features: dict[str, int],
        device: torch.device,
        num_tasks: int = 1,
    ) -> None:
        super().__init__(config, items, items.tokenizer.config.latent_dim, None, user_features, device, num_tasks)

    def forward(self, batch: RankBatch) -> tuple[Tensor, RankerOutput]:
        """As ``Ranker``; the loss includes the tokenizer's own."""
        items_ND, own_loss = self.items(batch.items)
        loss, output = self.rank(batch, items_ND)
        return loss + own_loss, output
