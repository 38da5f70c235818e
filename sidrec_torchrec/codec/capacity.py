"""At most so many items of a SID: what is beyond moves to the nearest SID that has room."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.directory import Directory, mix
from sidrec_torchrec.codec.nearest import NearestSIDs
from sidrec_torchrec.codec.report import PrefixGroups
from sidrec_torchrec.errors import DataError

_BLOCK = 1024  # items whose candidates are found at once
_FEWEST, _MOST = 64, 1 << 17  # candidates of an item


@dataclass(frozen=True, eq=False)
class Moves:
    """Which items moved, and how far. Made by ``within_capacity``.

    Args:
        words_NW: int64 [N, W], every item's SID.
        rows_M: int64 [M], items that moved.
        before_M: float64 [M], their squared distances from the vector of their own SID.
        after_M: float64 [M], from that of the SID they moved to.
        scale_M: float64 [M], from the codec's offset, which stands for no item in particular.
    """

    words_NW: np.ndarray
    rows_M: np.ndarray
    before_M: np.ndarray
    after_M: np.ndarray
    scale_M: np.ndarray


def within_capacity(
    codec: Codec,
    words_NW: np.ndarray,
    capacity: int,
    *,
    published_PW: np.ndarray | None = None,
    vectors: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Moves:
    """Gives no SID to more than ``capacity`` items, and moves as few as that takes.

    The first items keep their SID, as many as find room beside published ones; only then do the others move, one after another in
    their order, each to the SID nearest to its vector, by squared distance in the codec's space, that has room left.

    Args:
        codec: of the SIDs.
        words_NW: int64 [N, W], in the order in which items may choose.
        capacity: most items of a SID.
        published_PW: int64 [P, W], SIDs of items that stay where they are.
        vectors: of rows, int64 [M], the items' own vectors, float [M, D]; None for the vectors of their SIDs, which is all that
            SIDs tell of them.

    Raises:
        DataError: if SIDs do not suffice, or not those near an item.
    """
    published_PW = np.empty((0, codec.spec.num_words), np.int64) if published_PW is None else published_PW
    all_NW = np.concatenate([published_PW, words_NW])
    groups = PrefixGroups.of(codec.spec, all_NW)
    is_beyond_N = groups.ranks() >= capacity
    is_beyond_N[: len(published_PW)] = False
    rows_M = np.flatnonzero(is_beyond_N) - len(published_PW)
    near = NearestSIDs(codec)
    if not len(rows_M):
        return Moves(words_NW, rows_M, *(np.empty(0),) * 3)
    if len(all_NW) > near.count * capacity:
        raise DataError(
            f"{len(all_NW):,} items, but {near.count:,} SIDs with room for {capacity} each; raise the capacity"
        )
    depth = codec.spec.num_digits
    label_N = groups.labels(depth)
    beyond_G = np.bincount(label_N[is_beyond_N], minlength=label_N.max() + 1)
    rooms = _Rooms.of(all_NW[groups.order_N[groups.starts(depth)]], groups.sizes(depth) - beyond_G, capacity)
    home_MW = words_NW[rows_M]
    x_MD = _decoded(codec, home_MW) if vectors is None else vectors(rows_M)
    moved_MW = _move(near, rooms, x_MD, beyond_G[label_N[is_beyond_N]])
    settled_NW = words_NW.copy()
    settled_NW[rows_M] = moved_MW
    scale_M = np.square(x_MD.astype(np.float64) - codec.offset_D.double().numpy()).sum(1)
    return Moves(settled_NW, rows_M, near.distances(x_MD, home_MW), near.distances(x_MD, moved_MW), scale_M)


def _decoded(codec: Codec, words_MW: np.ndarray) -> np.ndarray:
    return codec.decode(torch.from_numpy(words_MW)).numpy()


@dataclass
class _Rooms:
    """How many items each SID has: those known at first in arrays, those that come in a dict."""

    directory: Directory
    words_GW: np.ndarray
    count_G: np.ndarray
    capacity: int
    come: dict[bytes, int] = field(default_factory=dict)

    @staticmethod
    def of(words_GW: np.ndarray, count_G: np.ndarray, capacity: int) -> "_Rooms":
        directory, order_G = Directory.build(mix(*words_GW.T))
        return _Rooms(directory, words_GW[order_G], count_G[order_G], capacity)

    def counts(self, words_CW: np.ndarray) -> np.ndarray:
        """Items that each SID had at first, int64 [C]."""
        place_C = self.directory.find(
            mix(*words_CW.T), lambda places, rows: (self.words_GW[places] == words_CW[rows]).all(1)
        )
        return np.where(place_C >= 0, self.count_G[place_C], 0)

    def take(self, words_W: np.ndarray, count: int) -> bool:
        """Whether there was room, which is then taken."""
        key = words_W.tobytes()
        come = self.come.get(key, 0)
        if count + come >= self.capacity:
            return False
        self.come[key] = come + 1
        return True


@dataclass
class _Candidates:
    """SIDs near a vector; those before ``at`` are full."""

    words_BW: np.ndarray
    count_B: np.ndarray
    at: int = 0

    def take(self, rooms: _Rooms) -> np.ndarray | None:
        """The first with room, int64 [W]; None if all are full."""
        while self.at < len(self.words_BW):
            words_W = self.words_BW[self.at]
            if rooms.take(words_W, int(self.count_B[self.at])):
                return words_W
            self.at += 1
        return None


def _move(near: NearestSIDs, rooms: _Rooms, x_MD: np.ndarray, crowd_M: np.ndarray) -> np.ndarray:
    """Where each goes, int64 [M, W]; ``crowd_M``: how many leave its SID, most of whom will want the same others."""
    # items of one vector share their candidates: thousands without any content, say
    first_V, vector_M, left_V = np.unique(x_MD, axis=0, return_index=True, return_inverse=True, return_counts=True)[1:]
    vector_M = vector_M.reshape(-1)
    crowd_V = np.zeros(len(first_V), np.int64)
    np.maximum.at(crowd_V, vector_M, crowd_M)
    wanted_V = np.clip(2 * crowd_V // rooms.capacity, _FEWEST, _MOST)
    beam_V = 1 << np.ceil(np.log2(wanted_V)).astype(np.int64)
    known: dict[int, _Candidates] = {}
    moved = []
    for first in range(0, len(x_MD), _BLOCK):
        block = vector_M[first : first + _BLOCK]
        new = np.array(sorted(set(block.tolist()) - known.keys()), np.int64)
        for beam in np.unique(beam_V[new]):
            vectors = new[beam_V[new] == beam]
            for vector, candidates in zip(vectors, _find(near, rooms, x_MD[first_V[vectors]], int(beam)), strict=True):
                known[int(vector)] = candidates
        for vector in block.tolist():
            words_W = known[vector].take(rooms)
            while words_W is None:
                known[vector] = _more(near, rooms, x_MD[first_V[vector]], len(known[vector].words_BW))
                words_W = known[vector].take(rooms)
            moved.append(words_W)
            left_V[vector] -= 1
            if not left_V[vector]:
                del known[vector]
    return np.stack(moved)


def _find(near: NearestSIDs, rooms: _Rooms, x_ND: np.ndarray, beam: int) -> list[_Candidates]:
    words_NBW, _ = near.find(x_ND, beam)
    count_NB = rooms.counts(words_NBW.reshape(-1, words_NBW.shape[2])).reshape(words_NBW.shape[:2])
    return [_Candidates(words_BW, count_B) for words_BW, count_B in zip(words_NBW, count_NB, strict=True)]


def _more(near: NearestSIDs, rooms: _Rooms, x_D: np.ndarray, beam: int) -> _Candidates:
    """Four times as many; those that were full before are so still, and are passed over again."""
    if beam == near.count or beam >= 4 * _MOST:
        raise DataError(
            f"the {beam:,} SIDs nearest to an item are full; raise the capacity, or encode with more digits"
        )
    return _find(near, rooms, x_D[None], 4 * beam)[0]
