"""Several histories read apart: what targets pool of each is a pool of its own, in which no other history takes weight."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.data.features import Features
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.ranker.readers.base import Reader, Requests
from sidrec_torchrec.ranker.readers.blocks import BlockReader
from sidrec_torchrec.ranker.targets import Targets

MAX_HISTORIES = 8


@dataclass(frozen=True)
class HistoriesBy:
    """Which history each event belongs to: that of its value of a feature, in the order of the values' codes.

    Args:
        column: of the feature in ``RankBatch.side_NC``.
        count: H, values that training has. An event without a value, or with another, is in no history.
    """

    column: int
    count: int

    @staticmethod
    def feature(name: str, features: Features) -> "HistoriesBy":
        """Those that a feature tells apart.

        Args:
            name: of the feature; that of an item's feature begins with ``item.``.
            features: of events.

        Raises:
            SidrecError: if there is no such feature, it is no category, or has more than ``MAX_HISTORIES`` values.
        """
        by_name = dict(zip(features.sizes, features.all, strict=True))
        if name not in by_name:
            known = ", ".join(by_name) or "no features"
            raise SidrecError(
                f"histories by '{name}': no such feature of events; these sequences have {known}. Name it when preparing "
                f"(--event-features {name}, or --history-features {name} if it is known only afterwards)"
            )
        if by_name[name].bounds is not None:
            raise SidrecError(
                f"histories by '{name}': it is dense, and histories are told apart by a category; prepare with '{name}:category', "
                "or choose another"
            )
        values = by_name[name].values
        if len(values) > MAX_HISTORIES:
            raise SidrecError(
                f"histories by '{name}': it has {len(values)} values, and {MAX_HISTORIES} histories at most are read apart; "
                "join values of it into fewer, or choose another"
            )
        return HistoriesBy(column=1 + list(by_name).index(name), count=len(values))

    def code(self, side_NC: Tensor) -> Tensor:
        """int64 [N], from 1 for the first history; 0 of an event in none."""
        return side_NC[:, self.column]


class ApartReader(nn.Module):
    """Reads each history as if it were all there is, by a reader of its own.

    Every event is read once, by its own history's reader, so that code space stays code space. What is pooled of one history does
    not depend on how long or how recent the others are.

    Args:
        readers: one for each history, alike but for their parameters.
        histories: that are read.
    """

    def __init__(self, readers: Sequence[Reader | BlockReader], histories: HistoriesBy) -> None:
        super().__init__()
        self.readers = nn.ModuleList(readers)
        self.histories = histories

    @property
    def reads_codes(self) -> bool:
        """See ``Reader``."""
        return self._each[0].reads_codes

    @property
    def unservable(self) -> str | None:
        """See ``Reader``."""
        return self._each[0].unservable

    @property
    def num_pools(self) -> int:
        """Vectors pooled for each target: as many of each history as its reader pools."""
        return self.histories.count * self._each[0].num_pools

    @property
    def _each(self) -> list[Reader | BlockReader]:
        return [*self.readers]

    def forward(self, batch: RankBatch, items: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
        """Vectors of the targets, as the first reader has them, and pools, one history after another: float [S, D], [S, num_pools, D]."""
        code_N = self.histories.code(batch.side_NC)
        read = []
        for code, reader in enumerate(self._each, start=1):
            history = replace(batch, visible_N=batch.visible_N & (code_N == code))
            read.append(reader(history, items, Targets.of(history)))
        return read[0][0], torch.cat([pooled_SPD for _, pooled_SPD in read], dim=1)

    def serve(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """As ``forward``, of requests' candidates: float [M, D] and [M, num_pools, D]."""
        code_N = self.histories.code(requests.side_NC)
        event_N = torch.arange(requests.time_N.shape[0], device=code_N.device)
        request_N = torch.searchsorted(requests.end_B, event_N, right=True)
        read = []
        for code, reader in enumerate(self._each, start=1):
            history = _of_events(requests, (code_N == code).nonzero().squeeze(1), request_N)
            read.append(reader.serve(history))
        return read[0][0], torch.cat([pooled_MPD for _, pooled_MPD in read], dim=1)


def _of_events(requests: Requests, event_K: Tensor, request_N: Tensor) -> Requests:
    """The requests with some of their events alone.

    Args:
        requests: that have N events.
        event_K: places of those, rising.
        request_N: which request each of the N belongs to.
    """
    request_K, request_B = request_N[event_K], torch.arange(requests.begin_B.shape[0], device=event_K.device)
    return replace(
        requests,
        items=requests.items[event_K],
        has_item_N=requests.has_item_N[event_K],
        side_NC=requests.side_NC[event_K],
        time_N=requests.time_N[event_K],
        begin_B=torch.searchsorted(request_K, request_B),
        end_B=torch.searchsorted(request_K, request_B, right=True),
    )
