"""Traditional SIDs (Zheng et al., arXiv 2504.02137): per tokenizer, n-grams of residual codes in a hashed table."""

from abc import ABC
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.item_arrays import map_rows
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.ranker.arms.base import (
    ARMS,
    Arm,
    ArmConfig,
    ArmInputs,
    Needs,
    SIDArray,
    Tokenizers,
    sid_columns,
    words_of,
)
from sidrec_torchrec.ranker.arms.modules import OfSIDs, RowDropout, SumOfRows
from sidrec_torchrec.side.ngram import AllNgram, NgramVectors, PrefixNgram


class _NgramArm(Arm, ABC):
    """N-grams of each SID, made when the batch is, and looked up in a table of the SID's own."""

    needs = Needs.SIDS
    tokenizers = Tokenizers.PER_SOURCE
    ngram: ClassVar[type[PrefixNgram]]

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        self._config = config
        self.words = {name: map_rows(sid.path) for name, sid in inputs.sids.items()}
        self._ngrams = {name: self._ngrams_of(name, sid) for name, sid in inputs.sids.items()}
        self.keys = tuple(key for name, ngrams in self._ngrams.items() for key in ngrams.keys(name))
        self.dim = config.table_dim * len(inputs.sids)

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, ngrams in self._ngrams.items():
            tokens_NP = ngrams.tokens(torch.from_numpy(words_of(self.words[name], item_N)))
            values |= dict(zip(ngrams.keys(name), tokens_NP.unbind(1), strict=True))
        return values

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        # A log keeps the code itself; its n-grams are made when the batch is.
        return sid_columns(self.words, item_N)

    def module(self, device: torch.device) -> nn.Module:
        tables = NgramVectors(self._ngrams, embedding_dim=self._config.table_dim, device=device)
        return nn.Sequential(tables, RowDropout(self._config.table_dropout))

    def served_sids(self) -> dict[str, SIDSpec]:
        return {name: own.spec for name, own in self._ngrams.items()}

    def served_module(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Sequential) and isinstance(module[0], NgramVectors)
        tables = module[0].collection.embeddings
        rows = {
            name: SumOfRows(own.tokens, tables[NgramVectors.table(name)].weight) for name, own in self._ngrams.items()
        }
        return OfSIDs(rows, self.served_sids())

    def _ngrams_of(self, name: str, sid: SIDArray) -> PrefixNgram:
        spec = sid.codec.spec
        try:
            return self.ngram(spec, num_rows=self._config.ngram_rows, depth=self._config.ngram_depth or spec.num_digits)
        except ValueError as error:
            raise SidrecError(f"n-grams of the SIDs '{name}': {error}") from None


@ARMS.register("prefix-ngram")
class PrefixNgramArm(_NgramArm):
    """Traditional SIDs: residual codes of each embedding; a learned row, of a hashed table, for every prefix of a SID."""

    ngram = PrefixNgram


@ARMS.register("all-ngram")
class AllNgramArm(_NgramArm):
    """As prefix n-grams, with a learned row for every run of digits, wherever it begins."""

    ngram = AllNgram
