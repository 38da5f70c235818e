"""The SIDs whose vectors lie nearest to a vector, in order of their distance: a beam over the digits, coarse to fine.

A beam keeps, digit after digit, the first digits that leave the shortest rest of the vector. It may lose a SID that begins badly
and ends well; one of ``beam`` SIDs at least as large as their number loses none.
"""

import math

import numpy as np

from sidrec_torchrec.codec.codec import Codec

_NUMBERS_HELD = 1 << 22  # products of rests with rows of the tables, float64
_PRECISION = (
    1e-9  # distances that agree to this share of the vectors' scale are equal, whatever processor added them up
)


class NearestSIDs:
    """Finds SIDs near vectors; all that can be computed once is.

    Args:
        codec: whose SIDs.
    """

    def __init__(self, codec: Codec) -> None:
        self._spec = codec.spec
        self._offset_D = codec.offset_D.double().numpy()
        rows_RD = np.concatenate([table.double().numpy() for table in codec.digit_tables])
        self._rows_RD = rows_RD
        self._gram_RR = rows_RD @ rows_RD.T
        self._firsts = np.cumsum((0, *self._spec.radices))
        self._scale = max(float(np.diag(self._gram_RR).max()), np.finfo(np.float64).tiny)

    @property
    def count(self) -> int:
        """SIDs there are."""
        return math.prod(self._spec.radices)

    def find(self, x_ND: np.ndarray, beam: int) -> tuple[np.ndarray, np.ndarray]:
        """Packed SIDs, int64 [N, B, W], nearest first, and their squared distances, float64 [N, B].

        Equal distances are in the order of the SIDs. B is ``beam``, or the number of SIDs if that is less.

        Args:
            x_ND: vectors in the codec's space.
            beam: candidates kept after each digit. Time and memory grow linearly.
        """
        beam = min(beam, self.count)
        rows = max(1, _NUMBERS_HELD // (beam * len(self._rows_RD)))
        found = [self._find(x_ND[first : first + rows], beam) for first in range(0, len(x_ND), rows)]
        if not found:
            return np.empty((0, beam, self._spec.num_words), np.int64), np.empty((0, beam))
        return np.concatenate([words for words, _ in found]), np.concatenate([distance for _, distance in found])

    def distances(self, x_ND: np.ndarray, words_NW: np.ndarray) -> np.ndarray:
        """Squared distance of each vector from the vector of its SID, float64 [N]."""
        digits_NL = self._spec.unpack(words_NW).astype(np.int64)
        rest_ND = x_ND.astype(np.float64) - self._offset_D
        for digit, first in enumerate(self._firsts[:-1]):
            rest_ND -= self._rows_RD[first + digits_NL[:, digit]]
        return np.square(rest_ND).sum(1)

    def _find(self, x_ND: np.ndarray, beam: int) -> tuple[np.ndarray, np.ndarray]:
        rest_ND = x_ND.astype(np.float64) - self._offset_D
        product_NBR = (rest_ND @ self._rows_RD.T)[:, None]  # of each candidate's rest with the rows of digits to come
        distance_NB = np.square(rest_ND).sum(1)[:, None]
        digits_NBL = np.zeros((len(x_ND), 1, 0), np.int16)
        for digit, radix in enumerate(self._spec.radices):
            row = self._firsts[digit]
            own = slice(row, row + radix)
            # ||rest - t||^2 = ||rest||^2 - 2 rest t + t t
            after_NBK = distance_NB[:, :, None] - 2 * product_NBR[:, :, :radix] + np.diag(self._gram_RR)[own]
            after_NC = after_NBK.reshape(len(x_ND), -1)
            if after_NC.shape[1] > beam:
                kept_NB = np.argpartition(after_NC, beam - 1, axis=1)[:, :beam]
            else:
                kept_NB = np.broadcast_to(np.arange(after_NC.shape[1]), after_NC.shape)
            distance_NB = np.take_along_axis(after_NC, kept_NB, 1)
            parent_NB, value_NB = np.divmod(kept_NB, radix)
            product_NBR = np.take_along_axis(product_NBR[:, :, radix:], parent_NB[:, :, None], 1)
            product_NBR -= self._gram_RR[row + value_NB, row + radix :]
            digits_NBL = np.take_along_axis(digits_NBL, parent_NB[:, :, None], 1)
            digits_NBL = np.concatenate([digits_NBL, value_NB[:, :, None].astype(np.int16)], axis=2)
        words_NBW = self._spec.pack(digits_NBL.reshape(-1, self._spec.num_digits)).reshape(*distance_NB.shape, -1)
        rounded_NB = np.round(distance_NB / (self._scale * _PRECISION))
        order_NB = np.lexsort((*np.moveaxis(words_NBW, 2, 0)[::-1], rounded_NB), axis=1)
        return np.take_along_axis(words_NBW, order_NB[:, :, None], 1), np.take_along_axis(distance_NB, order_NB, 1)
