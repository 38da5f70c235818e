"""Popularity-matched negatives for logs that hold positives only."""

from dataclasses import replace

import numpy as np

from sidrec_torchrec.data.census import Census
from sidrec_torchrec.data.ids import seed_of
from sidrec_torchrec.data.sequences import EVENT_ARRAYS, Sequence

_TRIES = 20  # redraws before an item the user has met is given up as a negative


class NegativeSampler:
    """Draws negatives for targets.

    A negative of a training (or validation) target is the item of a random training event; one of a test target, the
    item of a random test event of the same kind, seen or cold. So positives and negatives have the same distribution
    over items, and neither popularity nor being new tells the label. Items the user has met himself are redrawn.

    Args:
        census: training and test events by item, and which items training has.
        negatives: draws per target.
        seed: of the draws; they depend on the user alone, not on the order of users.
    """

    def __init__(self, census: Census, negatives: int, seed: int) -> None:
        self._seen = census.seen_I
        self._negatives = negatives
        self._seed = seed
        self._train = np.cumsum(census.training_I)
        self._test_seen = np.cumsum(census.test_I * self._seen)
        self._test_cold = np.cumsum(census.test_I * ~self._seen)

    def add_negatives(self, sequence: Sequence, first_target: int, *, is_test: bool, met_items: np.ndarray) -> Sequence:
        """The sequence with negatives after each event from ``first_target`` on; the first target stays in place.

        A negative has the features, and the weight, of the event it stands beside: it could have been chosen at that place and hour.

        Args:
            sequence: real events only.
            first_target: place of the first target.
            is_test: whether to draw from test events.
            met_items: int32 [n], every item the user has met; never drawn.
        """
        rng = np.random.default_rng([self._seed, int(is_test), seed_of(sequence.user_id)])
        history = np.arange(first_target)
        targets = np.arange(first_target, len(sequence))
        negatives_MK = self._draw(sequence.item[targets], is_test, met_items, rng)
        # Each target followed by its negatives: source position of every event, and the item that stands there.
        position_MK = np.repeat(targets[:, None], 1 + self._negatives, axis=1)
        item_MK = np.concatenate([sequence.item[targets, None], negatives_MK], axis=1)
        real_MK = np.zeros(item_MK.shape, bool)
        real_MK[:, 0] = True
        kept = (item_MK >= 0) | real_MK
        position = np.concatenate([history, position_MK[kept]])
        real = np.concatenate([np.ones(len(history), bool), real_MK[kept]])
        columns = {name: getattr(sequence, name)[position] for name in EVENT_ARRAYS}
        columns["item"] = np.concatenate([sequence.item[history], item_MK[kept]])
        columns["action"] = columns["action"] * real
        return replace(sequence, **columns | {"visible": real})

    def _draw(self, item_M: np.ndarray, is_test: bool, met_items: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """int32 [M, negatives] items; -1 where every try gave an item the user has met."""
        drawn_MK = np.full((len(item_M), self._negatives), -1, np.int32)
        for kind in (True, False):
            rows = np.flatnonzero((self._seen[item_M] == kind) & (item_M >= 0))
            cumulated = self._train if not is_test else self._test_seen if kind else self._test_cold
            if not len(rows) or not cumulated[-1]:
                continue
            wanted = np.repeat(rows, self._negatives) * self._negatives + np.tile(np.arange(self._negatives), len(rows))
            for _ in range(_TRIES):
                if not len(wanted):
                    break
                draws = np.searchsorted(cumulated, rng.integers(cumulated[-1], size=len(wanted)), side="right")
                fresh = ~np.isin(draws, met_items)
                drawn_MK.reshape(-1)[wanted[fresh]] = draws[fresh]
                wanted = wanted[~fresh]
        return drawn_MK
