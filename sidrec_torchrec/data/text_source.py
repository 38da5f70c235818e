"""A text source that needs no model: hashed TF-IDF of words and character n-grams, reduced by a truncated SVD.

What to use when nothing better is at hand: it sees shared words and word parts, not meaning. The SVD is latent semantic
analysis (Deerwester et al. 1990), computed by the randomized range finder of Halko, Martinsson & Tropp 2011, algorithm
4.3 with two power iterations; hashing features is Weinberger et al. 2009, without the signs.
"""

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

_WORD = re.compile(r"\w+")
_OVERSAMPLE = 16
_POWER_ITERATIONS = 2


class HashedTfidf:
    """Vectors of texts.

    Args:
        dim: width of the vectors.
        num_buckets: words and n-grams are hashed into this many.
        max_words: words beyond these many of a text are not read.
        max_fit: the SVD is computed from at most this many texts, chosen at random; bounds its memory.
        seed: of that choice, and of the SVD.

    Attributes:
        idf_: float32 [num_buckets], weight of each bucket.
        basis_: float32 [num_buckets, dim], orthonormal columns; columns beyond the rank of the texts are 0.

    Example::

        text_emb_ND = HashedTfidf(dim=256).fit(texts).transform(texts)
    """

    def __init__(
        self, dim: int = 256, *, num_buckets: int = 1 << 16, max_words: int = 300, max_fit: int = 20_000, seed: int = 0
    ) -> None:
        self.dim = dim
        self.num_buckets = num_buckets
        self.max_words = max_words
        self.max_fit = max_fit
        self.seed = seed
        self._buckets_of_word: dict[str, list[int]] = {}

    def fit(self, texts: Sequence[str]) -> "HashedTfidf":
        """Learns ``idf_`` and ``basis_`` from N texts; at least one of them must hold a word."""
        rng = np.random.default_rng(self.seed)
        if len(texts) > self.max_fit:
            texts = [texts[i] for i in np.sort(rng.choice(len(texts), self.max_fit, replace=False))]
        counts_NF = self._counts(texts)
        seen_F = torch.bincount(counts_NF.indices()[1], minlength=self.num_buckets)
        self.idf_ = torch.log((1 + len(texts)) / (1 + seen_F)) + 1
        self.basis_ = self._range(self._weigh(counts_NF))
        return self

    def transform(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of N texts: float32 [N, dim] of unit length; all zeros for a text without a known word."""
        x_ND = torch.sparse.mm(self._weigh(self._counts(texts)), self.basis_)
        norm_N1 = x_ND.norm(dim=1, keepdim=True)
        return torch.where(norm_N1 > 1e-6, x_ND / norm_N1.clamp_min(1e-6), 0.0).numpy()

    def _counts(self, texts: Sequence[str]) -> Tensor:
        """How often each bucket occurs in each text, sparse [N, num_buckets]."""
        columns = [np.array(self._buckets(text), np.int64) for text in texts]
        rows_E = np.repeat(np.arange(len(texts)), [len(c) for c in columns])
        columns_E = np.concatenate(columns) if columns else np.empty(0, np.int64)
        indices_2E = torch.from_numpy(np.stack([rows_E, columns_E]))
        values_E = torch.ones(len(rows_E))
        return torch.sparse_coo_tensor(
            indices_2E, values_E, (len(texts), self.num_buckets), check_invariants=False
        ).coalesce()

    def _buckets(self, text: str) -> list[int]:
        words = _WORD.findall(text.lower())[: self.max_words]
        buckets = [bucket for word in words for bucket in self._parts(word)]
        buckets += [self._hash(f"{a} {b}") for a, b in pairwise(words)]
        return buckets

    def _parts(self, word: str) -> list[int]:
        """Buckets of a word and of its n-grams of 3 to 5 characters, its ends marked."""
        known = self._buckets_of_word.get(word)
        if known is None:
            marked = f"<{word}>"
            grams = {marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)}
            known = self._buckets_of_word[word] = [self._hash(part) for part in sorted(grams | {word})]
        return known

    def _hash(self, part: str) -> int:
        return zlib.crc32(part.encode()) % self.num_buckets

    def _weigh(self, counts_NF: Tensor) -> Tensor:
        """(1 + log count) * idf, rows scaled to unit length."""
        row_E, column_E = counts_NF.indices()
        value_E = (1 + counts_NF.values().log()) * self.idf_[column_E]
        square_N = torch.zeros(counts_NF.shape[0]).index_add_(0, row_E, value_E**2)
        value_E = value_E / square_N[row_E].sqrt()
        return torch.sparse_coo_tensor(
            counts_NF.indices(), value_E, counts_NF.shape, check_invariants=False, is_coalesced=True
        )

    def _range(self, x_NF: Tensor) -> Tensor:
        """The ``dim`` leading right singular vectors of a sparse matrix, as columns [F, dim]."""
        generator = torch.Generator().manual_seed(self.seed)
        width = min(self.dim + _OVERSAMPLE, *x_NF.shape)
        x_FN = x_NF.t().coalesce()
        q_NW = torch.linalg.qr(torch.sparse.mm(x_NF, torch.randn(self.num_buckets, width, generator=generator)))[0]
        for _ in range(_POWER_ITERATIONS):
            q_NW = torch.linalg.qr(torch.sparse.mm(x_NF, torch.sparse.mm(x_FN, q_NW)))[0]
        q_FW, r_WW = torch.linalg.qr(torch.sparse.mm(x_FN, q_NW))
        u_WW, s_W, _ = torch.linalg.svd(r_WW)
        v_FW = q_FW @ (u_WW * (s_W > 1e-5 * s_W[0]))
        basis_FD = torch.zeros(self.num_buckets, self.dim)
        kept = min(self.dim, width)
        basis_FD[:, :kept] = v_FW[:, :kept]
        return basis_FD
