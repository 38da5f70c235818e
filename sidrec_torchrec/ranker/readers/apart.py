"""Several histories read apart: what targets pool of each is a pool of its own, in which no other history takes weight."""

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
    """Reads each history as if it were all there is, by one reader whose parameters the histories share.

    Every event is read once, in its own history, so that code space stays code space. What is pooled of one history does not
    depend on how long or how recent the others are.

    Args:
        reader: of a history.
        histories: that are read.
    """

    def __init__(self, reader: Reader | BlockReader, histories: HistoriesBy) -> None:
        super().__init__()
        self.reader = reader
        self.histories = histories

    @property
    def reads_codes(self) -> bool:
        """See ``Reader``."""
        return self.reader.reads_codes

    @property
    def unservable(self) -> str | None:
        """See ``Reader``."""
        return self.reader.unservable

    @property
    def num_pools(self) -> int:
        """Vectors pooled for each target: as many of each history as ``reader`` pools."""
        return self.histories.count * self.reader.num_pools

    def forward(self, batch: RankBatch, items: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
        """As ``reader``'s, of one history after another: float [S, D] and [S, num_pools, D]."""
        code_N = self.histories.code(batch.side_NC)
        vectors, pools = [], []
        for code in range(1, self.histories.count + 1):
            history = replace(batch, visible_N=batch.visible_N & (code_N == code))
            q_SD, pooled_SPD = self.reader(history, items, Targets.of(history))
            vectors.append(q_SD)
            pools.append(pooled_SPD)
        return vectors[0], torch.cat(pools, dim=1)

    def serve(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """As ``forward``, of requests' candidates; all histories are read at once, as those of more requests."""
        H = self.histories.count
        q_XD, pooled_XPD = self.reader.serve(self._apart(requests))
        pooled_MHPD = pooled_XPD.unflatten(0, (H, -1)).transpose(0, 1)
        return q_XD.unflatten(0, (H, -1))[0], pooled_MHPD.flatten(1, 2)

    def _apart(self, requests: Requests) -> Requests:
        """A request for each history of each request: first those of the first history, then those of the second, ..."""
        H, B = self.histories.count, requests.begin_B.shape[0]
        device = requests.begin_B.device
        event_N = torch.arange(requests.time_N.shape[0], device=device)
        request_N = torch.searchsorted(requests.end_B, event_N, right=True)
        # a history of a request has a number, by which events are put in order; those that are in none come first
        number_N = self.histories.code(requests.side_NC) * B + request_N
        number_N, place_N = number_N.sort(stable=True)
        number_X = torch.arange(B, B + H * B, device=device)
        first_H1 = torch.arange(H, device=device).unsqueeze(1) * B
        return replace(
            requests,
            items=requests.items[place_N],
            has_item_N=requests.has_item_N[place_N],
            side_NC=requests.side_NC[place_N],
            time_N=requests.time_N[place_N],
            begin_B=torch.searchsorted(number_N, number_X),
            end_B=torch.searchsorted(number_N, number_X, right=True),
            candidates=requests.candidates.repeat(H, 1),
            request_M=(first_H1 + requests.request_M).flatten(),
            request_time_B=requests.request_time_B.repeat(H),
        )
