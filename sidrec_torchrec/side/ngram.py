"""Traditional SIDs: n-grams of residual codes in hashed tables (Zheng et al., arXiv 2504.02137), the baseline."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import OneHot
from sidrec_torchrec.codec.packing import SIDSpec, is_missing
from sidrec_torchrec.names import escape


@dataclass(frozen=True)
class PrefixNgram:
    """Tokens of a residual SID's prefixes.

    The token of the prefix of i digits c_1 .. c_i over K codewords is sum_t K^(i-t) (c_t + 1) - 1, modulo the table's
    rows (section 4 of the paper).

    Args:
        spec: of the SIDs; every digit one-hot of the same size K.
        num_rows: rows of the table the tokens index; K times as many must fit an int64.
        depth: prefixes of 1 to ``depth`` digits.

    Raises:
        ValueError: on other digits, a depth the SID does not have, or a number of rows that is not positive or too large.
    """

    spec: SIDSpec
    num_rows: int
    depth: int

    def __post_init__(self) -> None:
        if len(set(self.spec.stages)) != 1 or not isinstance(self.spec.stages[0], OneHot):
            raise ValueError("prefix n-grams need a SID whose digits are all one-hot of one size, as residual VQ makes")
        if not 1 <= self.depth <= self.spec.num_digits:
            raise ValueError(f"depth must be 1 to {self.spec.num_digits}, the SID's digits; got {self.depth}")
        most_rows = torch.iinfo(torch.int64).max // self.spec.radices[0]
        if not 1 <= self.num_rows <= most_rows:
            raise ValueError(f"num_rows must be 1 to {most_rows}, got {self.num_rows}")

    def tokens(self, words_NW: Tensor) -> Tensor:
        """Tokens of packed SIDs, int64 [N, one per key], each in [0, num_rows).

        A table has no row for nothing: those of a missing SID are some SID's. Who reads it must know it for missing.
        """
        digits_NL = self.spec.unpack(words_NW.masked_fill(is_missing(words_NW).unsqueeze(1), 0)).long()
        K, tokens = self.spec.radices[0], []
        # Another start's tokens follow those of all n-grams of the start before.
        offset = sum(K**i for i in range(1, self.depth + 1)) % self.num_rows
        for start in self._starts():
            token_N = torch.zeros_like(digits_NL[:, 0])
            for digit_N in digits_NL[:, start : start + self.depth].unbind(1):
                # Horner's rule for token + 1, reduced at every step: the full number may not fit 64 bits
                token_N = (token_N * K + digit_N + 1) % self.num_rows
                tokens.append((token_N - 1 + start * offset % self.num_rows) % self.num_rows)
        return torch.stack(tokens, dim=1)

    def keys(self, feature: str) -> list[str]:
        """KJT keys of a feature's tokens: by first digit, then by length."""
        return [f"{feature}_digits{first + 1}to{last}" for first, last in self._spans()]

    def _starts(self) -> range:
        return range(1)

    def _spans(self) -> list[tuple[int, int]]:
        """Digits of each n-gram, the last excluded."""
        digits = self.spec.num_digits
        return [(s, s + i) for s in self._starts() for i in range(1, self.depth + 1) if s + i <= digits]


class AllNgram(PrefixNgram):
    """Tokens of all n-grams of a residual SID: runs of 1 to ``depth`` digits that start at any digit.

    The token of a run that starts at digit s + 1 is that of the same codes as a prefix, plus s times the number of
    prefixes there are, K + .. + K^depth, modulo the table's rows.
    """

    def _starts(self) -> range:
        return range(self.spec.num_digits)


class NgramVectors(nn.Module):
    """The sum of a SID's n-gram embeddings, per source; learned tables, sharded like any TorchRec collection.

    The batch's KeyedJaggedTensor holds the tokens already (``PrefixNgram.tokens`` under ``PrefixNgram.keys``), so that
    TorchRec can send them to their shards while the batch before is computed.

    Args:
        ngrams: by source.
        embedding_dim: width of each source's table.
        device: where to build the tables.
    """

    def __init__(self, ngrams: dict[str, PrefixNgram], embedding_dim: int, device: torch.device) -> None:
        super().__init__()
        self._keys = [ngram.keys(source) for source, ngram in ngrams.items()]
        # Rows start at zero: an n-gram never trained on says nothing, and sharding cannot change the start.
        self.collection = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=self.table(source),
                    embedding_dim=embedding_dim,
                    num_embeddings=ngram.num_rows,
                    feature_names=ngram.keys(source),
                    init_fn=nn.init.zeros_,
                )
                for source, ngram in ngrams.items()
            ],
            device=device,
        )

    @staticmethod
    def table(source: str) -> str:
        """Name of a source's table."""
        return escape(f"{source}_ngrams")

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Sums of n-gram embeddings, the sources side by side: float32 [N, sources * embedding_dim]."""
        embeddings = self.collection(features)
        sums = [sum(embeddings[key].values() for key in keys) for keys in self._keys]
        return torch.cat(sums, dim=1)
