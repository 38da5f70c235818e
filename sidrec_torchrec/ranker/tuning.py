"""A ranker that trains the tokenizer with it: each event's item is encoded anew, and its gradient goes through the digits."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.fusion.item_store import ItemStore
from sidrec_torchrec.fusion.model import VQFusion
from sidrec_torchrec.ranker.model import Ranker, RankerOutput

_KEY = "item"
_KEPT_AT_ONCE = 512  # published items drawn at a step


class ItemRows:
    """What travels with an event while its tokenizer is trained: the row of its item."""

    keys: tuple[str, ...] = (_KEY,)

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        """int64 [N] of int32 [N]; -1 for a missing item."""
        return {_KEY: torch.from_numpy(item_N.astype(np.int64))}


class TokenizedItems(nn.Module):
    """Items as their SIDs will decode to, by a tokenizer in training.

    Args:
        tokenizer: trained with the ranker.
        items: content by row.
        own_weight: of the tokenizer's own loss.
        digit_dropout: share of each item's digits that are left out of its vector in training, as SIDE leaves out some when it
            feeds a ranker; the tokenizer's own loss is of all of them.

    A tokenizer that holds on to published SIDs (``VQFusion.hold``) does so for a random few of all published items at each
    step, so that those which events rarely meet are kept like any other.
    """

    def __init__(self, tokenizer: VQFusion, items: ItemStore, own_weight: float, *, digit_dropout: float = 0.0) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.own_weight = own_weight
        self.digit_dropout = digit_dropout
        self._items = items
        self._published_M = items.published_rows()

    def forward(self, items: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """Vectors of N events, float [N, latent_dim], zeros where an item is missing; the tokenizer's own loss over their
        items, 0 in evaluation.

        Both are of the same digits: what an item loses by dropout of hidden units is missing in both. Losses over other items, or other
        draws of dropout, made rankers worse on new items.
        """
        item_N = items[_KEY].values()
        has_item_N = item_N >= 0
        row_U, place_K = item_N[has_item_N].unique(return_inverse=True)
        content = self._items.select(row_U).to(row_U.device)
        quantized = self.tokenizer.quantizer(self.tokenizer.latent(content))
        scale = self.tokenizer.config.latent_dim**0.5  # from total variance 1 to variance 1 of each component
        z_UD, own_loss = quantized.z_q_ND, torch.zeros((), device=row_U.device)
        if self.training:
            own_loss = self.own_weight * self.tokenizer.losses(quantized, content)[0] + self._keep_loss(row_U.device)
            if self.digit_dropout:
                is_off_UL = torch.rand(quantized.digits_NL.shape, device=row_U.device) < self.digit_dropout
                z_UD = self.tokenizer.without(quantized, is_off_UL)
        vectors_ND = z_UD.new_zeros(len(item_N), z_UD.shape[1])
        vectors_ND[has_item_N] = z_UD[place_K] * scale
        return vectors_ND, own_loss

    def _keep_loss(self, device: torch.device) -> Tensor:
        if self.tokenizer.keep is None or not len(self._published_M):
            return torch.zeros((), device=device)
        drawn_K = torch.randint(len(self._published_M), (min(_KEPT_AT_ONCE, len(self._published_M)),))
        return self.tokenizer.keep_loss(self._items.select(self._published_M[drawn_K]).to(device))


class TuningRanker(Ranker):
    """A ranker of items that a tokenizer in training encodes; learns both.

    Gradients pass straight through the digits to the encoders, and reach the basis, which decodes them, as they are: what
    the SIDs say turns towards what predicts labels. The tokenizer's own loss keeps them telling what items are.

    Its ``items`` are ``TokenizedItems``; it attends to vectors, as codes have no gradient.
    """

    def forward(self, batch: RankBatch) -> tuple[Tensor, RankerOutput]:
        """As ``Ranker``; the loss includes the tokenizer's own."""
        items_ND, own_loss = self.items(batch.items)
        loss, output = self.rank(batch, items_ND)
        return loss + own_loss, output
