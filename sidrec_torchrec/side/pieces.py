"""Subword pieces of SIDs: runs of digits that training meets often, each with a learned row of its own.

What is popular comes to be one piece, so that its row can say what only itself is like; what is rare stays in pieces it shares
with others (Singh et al., "Better Generalization with Semantic IDs", arXiv 2306.08121, who use SentencePiece; PLUM, arXiv
2510.07784). Pieces are learned as byte pairs are (Sennrich et al., arXiv 1508.07909).

They are learned here rather than by a library: a digit is its own symbol at each place, so that a SID holds no piece twice, which
leaves little to do; and text tokenizers take an item's number of events only as that many lines of text.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.packing import SIDSpec, is_missing
from sidrec_torchrec.names import escape
from sidrec_torchrec.side.expansion import can_look_at

NOTHING = 0  # stands where a SID has fewer pieces than digits

Pair = tuple[int, int]


@dataclass(frozen=True)
class Pieces:
    """A vocabulary of pieces. Piece 0 is none; then comes each value of each digit, first digit first; then what merges made.

    Args:
        spec: of the SIDs.
        merges: pairs of neighbouring pieces that become one, in the order in which they do.
    """

    spec: SIDSpec
    merges: tuple[Pair, ...]

    @staticmethod
    def learn(spec: SIDSpec, words_NW: np.ndarray, events_N: np.ndarray, num_rows: int) -> "Pieces":
        """The pieces that byte-pair encoding makes of items' SIDs.

        Again and again, the two neighbouring pieces that most events have become one; of equals, those with the lowest numbers.

        Args:
            spec: of the SIDs.
            words_NW: packed SIDs of N items, int64 [N, W].
            events_N: events of each item, integers [N]; those without any teach nothing.
            num_rows: pieces there may be, piece 0 included; fewer are made if no neighbours are left.

        Raises:
            ValueError: if there are not rows enough for every value of every digit.
        """
        first = _first_merged(spec)
        if num_rows < first:
            raise ValueError(f"num_rows must be {first} at least, one for each value of each digit; got {num_rows}")
        met_N = events_N > 0
        words_UW, distinct_N = np.unique(words_NW[met_N], axis=0, return_inverse=True)
        events_U = np.zeros(len(words_UW), np.int64)
        np.add.at(events_U, distinct_N.reshape(-1), events_N[met_N])
        merging = _Merging(_of_digits(spec, torch.from_numpy(words_UW)).tolist(), events_U.tolist())
        merges = itertools.islice(merging.merges(first), num_rows - first)
        return Pieces(spec, tuple(merges))

    @property
    def num_pieces(self) -> int:
        """Pieces are below this."""
        return _first_merged(self.spec) + len(self.merges)

    def of(self, words_NW: Tensor) -> Tensor:
        """The pieces of packed SIDs.

        Args:
            words_NW: int64 [N, W].

        Returns:
            int64 [N, L], first digit first, L being the SID's digits; after the last piece ``NOTHING``. A missing SID has
            no pieces.

        Raises:
            ValueError: on words that are no packed SIDs of the spec; names the first bad row.
        """
        missing_N1 = is_missing(words_NW).unsqueeze(1)
        pieces_NL = _of_digits(self.spec, words_NW.masked_fill(missing_N1, 0)).masked_fill(missing_N1, NOTHING)
        last = pieces_NL.shape[1] - 1
        if not self.merges or not last:
            return pieces_NL
        place_L = torch.arange(last + 1, device=pieces_NL.device)
        pairs_M, made_M = (column.to(pieces_NL.device) for column in self._sorted_merges)
        for _ in range(last):
            # Of the pairs that can be merged, the one learned first: what it makes is the lowest number.
            pair_NP = pieces_NL[:, :-1] * self.num_pieces + pieces_NL[:, 1:]
            found_NP = torch.searchsorted(pairs_M, pair_NP)
            made_NP = made_M[found_NP].where(pairs_M[found_NP] == pair_NP, self.num_pieces)
            made_N1, at_N1 = made_NP.min(dim=1, keepdim=True)
            is_merged_N1 = made_N1 < self.num_pieces
            if can_look_at(is_merged_N1) and not is_merged_N1.any():
                break
            # The merged piece stands at its first part's place, and what follows its second moves up.
            moved_NL = torch.cat([pieces_NL[:, 1:], torch.full_like(made_N1, NOTHING)], dim=1)
            new_NL = moved_NL.where(place_L > at_N1, pieces_NL).where(place_L != at_N1, made_N1)
            pieces_NL = new_NL.where(is_merged_N1, pieces_NL)
        return pieces_NL

    @staticmethod
    def key(feature: str) -> str:
        """KJT key of a feature's pieces, as many values an event as its SID has digits."""
        return f"{feature}_pieces"

    @cached_property
    def _sorted_merges(self) -> tuple[Tensor, Tensor]:
        """Pairs as one number each, ascending, and what they make; an entry above all pairs ends them."""
        left_M, right_M = torch.tensor(self.merges).unbind(1)
        pairs_M, order_M = (left_M * self.num_pieces + right_M).sort()
        made_M = order_M + _first_merged(self.spec)
        return nn.functional.pad(pairs_M, (0, 1), value=self.num_pieces**2), nn.functional.pad(made_M, (0, 1))


class PieceVectors(nn.Module):
    """The sum of the rows of a SID's pieces, per source; learned tables, sharded like any TorchRec collection.

    The batch's KeyedJaggedTensor holds the pieces already (``Pieces.of`` under ``Pieces.key``), so that TorchRec can send them to
    their shards while the batch before is computed.

    Args:
        pieces: by source.
        num_rows: rows of each source's table; as many as it has pieces, at least.
        embedding_dim: width of each source's table; a multiple of 4, as fbgemm needs.
        device: where to build the tables.
    """

    def __init__(self, pieces: dict[str, Pieces], num_rows: int, embedding_dim: int, device: torch.device) -> None:
        super().__init__()
        self._digits = {Pieces.key(source): p.spec.num_digits for source, p in pieces.items()}
        # Rows start at zero: a piece never trained on says nothing, and sharding cannot change the start.
        self.collection = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=escape(key),
                    embedding_dim=embedding_dim,
                    num_embeddings=num_rows,
                    feature_names=[key],
                    init_fn=nn.init.zeros_,
                )
                for key in self._digits
            ],
            device=device,
        )

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Sums of the pieces' rows, the sources side by side: float32 [N, sources * embedding_dim]."""
        rows = self.collection(features)
        sums = []
        for key, digits in self._digits.items():
            is_piece_NL1 = features[key].values().view(-1, digits, 1) != NOTHING
            rows_NLD = rows[key].values().unflatten(0, (-1, digits))
            sums.append((rows_NLD * is_piece_NL1).sum(1))
        return torch.cat(sums, dim=1)


class _Merging:
    """Byte pairs, merged one after another.

    Args:
        sids: by distinct SID, its pieces; changed in place.
        events: of each.
    """

    def __init__(self, sids: list[list[int]], events: list[int]) -> None:
        self._sids = sids
        self._events = events
        self._holders: defaultdict[Pair, set[int]] = defaultdict(set)  # the SIDs that hold a pair
        self._counts: defaultdict[Pair, int] = defaultdict(int)  # and their events
        for u, sid in enumerate(sids):
            for pair in itertools.pairwise(sid):
                self._add(pair, u)

    def merges(self, first: int) -> Iterator[Pair]:
        """Pairs in the order in which they become pieces ``first``, ``first + 1``, ..."""
        # A pair's count only falls once the pieces in it are made, so the heap's is never too low.
        heap = [(-count, pair) for pair, count in self._counts.items()]
        heapq.heapify(heap)
        made = first
        while heap:
            count, pair = heapq.heappop(heap)
            if -count != self._counts[pair]:
                if self._counts[pair]:
                    heapq.heappush(heap, (-self._counts[pair], pair))
                continue
            yield pair
            for new in self._merge(pair, made):
                heapq.heappush(heap, (-self._counts[new], new))
            made += 1

    def _merge(self, pair: Pair, made: int) -> set[Pair]:
        """Merges a pair wherever it is; returns the pairs that come of it."""
        left, right = pair
        news = set()
        for u in sorted(self._holders[pair]):
            sid = self._sids[u]
            at = sid.index(left)  # no piece is twice in a SID: it stands for values at places
            before, after = sid[:at][-1:], sid[at + 2 :][:1]
            changed = [((b, left), (b, made)) for b in before] + [((right, a), (made, a)) for a in after]
            for old, new in changed:
                self._remove(old, u)
                self._add(new, u)
                news.add(new)
            self._remove(pair, u)
            sid[at : at + 2] = [made]
        return news

    def _add(self, pair: Pair, u: int) -> None:
        self._holders[pair].add(u)
        self._counts[pair] += self._events[u]

    def _remove(self, pair: Pair, u: int) -> None:
        self._holders[pair].discard(u)
        self._counts[pair] -= self._events[u]


def _first_merged(spec: SIDSpec) -> int:
    """The first piece that a merge makes."""
    return 1 + sum(spec.radices)


def _of_digits(spec: SIDSpec, words_NW: Tensor) -> Tensor:
    """Each digit as a piece, int64 [N, L]."""
    before_L = torch.tensor([0, *itertools.accumulate(spec.radices[:-1])], device=words_NW.device)
    return spec.unpack(words_NW).long() + before_L + (NOTHING + 1)
