"""SIDE beside a small learned table: frozen detail, and a row of its own for each coarse cluster of items."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.packing import SIDSpec, word_names
from sidrec_torchrec.side.collection import SIDECollection
from sidrec_torchrec.side.expansion import SIDEConfig


@dataclass(frozen=True)
class CoarseIds:
    """The first digits of a SID as one id: items alike in the coarse share it.

    Args:
        spec: of the SIDs.
        num_digits: how many first digits make the id; they lie in the SID's first word.

    Raises:
        ValueError: on a number of digits the SID's first word has not.
    """

    spec: SIDSpec
    num_digits: int

    def __post_init__(self) -> None:
        in_first_word = self.spec.layout.words.count(0)
        if not 1 <= self.num_digits <= in_first_word:
            raise ValueError(
                f"num_digits must be 1 to {in_first_word}, the digits of the first word; got {self.num_digits}"
            )

    @staticmethod
    def at_most(spec: SIDSpec, num_ids: int) -> "CoarseIds":
        """The longest prefix with at most ``num_ids`` ids.

        Raises:
            ValueError: if the first digit alone has more values.
        """
        num_digits = 0
        while num_digits < spec.num_digits and math.prod(spec.radices[: num_digits + 1]) <= num_ids:
            num_digits += 1
        if not num_digits:
            raise ValueError(f"the SID's first digit has {spec.radices[0]} values, more than {num_ids} coarse ids")
        return CoarseIds(spec, num_digits)

    @property
    def num_ids(self) -> int:
        """Ids are below this."""
        return math.prod(self.spec.radices[: self.num_digits])

    def ids(self, words_NW: Tensor) -> Tensor:
        """Ids of packed SIDs int64 [N, W], int64 [N]; of a missing SID 0, for tables have no row for nothing."""
        return words_NW[:, 0].clamp_min(0) // (self.spec.word_limits[0] // self.num_ids)

    @staticmethod
    def key(feature: str) -> str:
        """KJT key of a feature's coarse ids."""
        return f"{feature}_coarse"


class HybridVectors(nn.Module):
    """SIDE's vectors and rows of a learned table; the table is sharded like any TorchRec collection.

    The batch's KeyedJaggedTensor holds the coarse ids already (``CoarseIds.ids`` under ``CoarseIds.key``), so that TorchRec
    can send them to their shards while the batch before is computed.

    Args:
        side: codec, mode, and the one feature.
        coarse: ids of the same SIDs.
        embedding_dim: width of the table; a multiple of 4, as fbgemm needs.
        device: where to build the table; SIDE's constants are built on a real one.

    Raises:
        ValueError: if the ids are of another codec, or SIDE serves several features.
    """

    def __init__(
        self, side: SIDEConfig, coarse: CoarseIds, embedding_dim: int, device: torch.device | None = None
    ) -> None:
        super().__init__()
        if coarse.spec != side.codec.spec or len(side.feature_names) != 1:
            raise ValueError(f"'{side.name}': coarse ids need SIDs of the same codec, and SIDE one feature")
        (self._feature,) = side.feature_names
        self._first_word = word_names(self._feature, side.codec.spec.num_words)[0]
        self.side = SIDECollection([side], device)
        # Rows start at zero: a cluster never trained on says nothing, and sharding cannot change the start.
        self.table = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=f"{side.name}_coarse",
                    embedding_dim=embedding_dim,
                    num_embeddings=coarse.num_ids,
                    feature_names=[coarse.key(self._feature)],
                    init_fn=nn.init.zeros_,
                )
            ],
            device=device,
        )

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """SIDE's vectors, float32 [N, E], and the table's rows, float32 [N, embedding_dim]; zeros for a missing SID."""
        rows_ND = self.table(features)[CoarseIds.key(self._feature)].values()
        has_sid_N1 = (features[self._first_word].values() >= 0).unsqueeze(1)
        return self.side(features)[self._feature].values(), rows_ND * has_sid_N1
