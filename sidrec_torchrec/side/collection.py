"""SIDE collections: where a TorchRec embedding collection stood, SIDs are expanded instead of looked up.

Parameter-free: the only tensors are buffers that follow from the codec. A feature ``f`` of a codec with one word reads
the KJT key ``f``, with W words the keys ``f_0`` ... ``f_{W-1}``; each event is one packed SID.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
    process_pooled_embeddings,
    reorder_inverse_indices,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import word_names
from sidrec_torchrec.ops.side_decode import chunk_tables, side_decode

MODES = ("digits", "decoded")


@dataclass(frozen=True, kw_only=True)
class SIDEConfig:
    """One SIDE "table": some features whose values are SIDs of one codec.

    Args:
        name: unique in its collection, as a table's name is.
        feature_names: features it serves.
        codec: of their SIDs.
        mode: ``digits`` gives the digits themselves as floats (25 trits: 25 numbers of -1, 0, 1), ``decoded`` the vector
            the codec decodes them to.
        pooling: how ``SIDEBagCollection`` pools a bag.

    Raises:
        ValueError: on an unknown mode.
    """

    name: str
    feature_names: list[str]
    codec: Codec
    mode: str = "digits"
    pooling: PoolingType = PoolingType.SUM

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"SIDE '{self.name}': mode must be one of {', '.join(MODES)}; got '{self.mode}'")

    @property
    def embedding_dim(self) -> int:
        """Floats per event."""
        if self.mode == "decoded":
            return self.codec.dim
        return sum(stage.width for stage in self.codec.spec.stages)

    def embedding_config(self) -> EmbeddingConfig:
        """As TorchRec describes a table; the one "row" stands for no table at all."""
        return EmbeddingConfig(
            name=self.name, embedding_dim=self.embedding_dim, num_embeddings=1, feature_names=self.feature_names
        )

    def embedding_bag_config(self) -> EmbeddingBagConfig:
        """As TorchRec describes a pooled table."""
        return EmbeddingBagConfig(
            name=self.name,
            embedding_dim=self.embedding_dim,
            num_embeddings=1,
            feature_names=self.feature_names,
            pooling=self.pooling,
        )


class SIDExpansion(nn.Module):
    """Packed SIDs of one codec as vectors; the constants, and the check that SIDs and checkpoints are this codec's.

    Args:
        config: codec and mode.
        device: a real device.

    Raises:
        ValueError: on the meta device: TorchRec would fill the constants with zeros in silence.
    """

    def __init__(self, config: SIDEConfig, device: torch.device | None = None) -> None:
        super().__init__()
        device = torch.device("cpu") if device is None else torch.device(device)
        if device.type == "meta":
            raise ValueError(f"SIDE '{config.name}' cannot be built on the meta device; build it on the real one")
        codec = config.codec
        self._spec = codec.spec
        self._codec = codec
        decoded = config.mode == "decoded"
        tables = chunk_tables(codec.spec, codec.digit_tables if decoded else codec.value_tables())
        for name in ("table_RD", "word_C", "divisor_C", "size_C", "first_row_C"):
            self.register_buffer(name, getattr(tables, name).to(device), persistent=False)
        offset_D = codec.offset_D if decoded else torch.zeros(config.embedding_dim)
        self.register_buffer("offset_D", offset_D.to(device), persistent=False)
        last_W = torch.tensor([limit - 1 for limit in codec.spec.word_limits])
        self.register_buffer("last_W", last_W.to(device), persistent=False)

    def forward(self, words_NW: Tensor) -> Tensor:
        """float32 [N, embedding_dim] of packed SIDs, int64 [N, W].

        Raises:
            ValueError: on CPU, on a word that is no packed SID of this codec; on CUDA the device asserts.
        """
        self._check(words_NW)
        expanded_ND = side_decode(
            words_NW, self.table_RD, self.word_C, self.divisor_C, self.size_C, self.first_row_C
        )
        return expanded_ND + self.offset_D

    def get_extra_state(self) -> dict[str, str]:
        """What a checkpoint keeps: whose SIDs the model was trained on. The constants follow from the codec."""
        return self._spec.to_json()

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Refuses a checkpoint of another codec.

        Raises:
            CodecMismatchError: names both fingerprints.
        """
        self._codec.check(state["fingerprint"], "checkpoint")

    def _check(self, words_NW: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if words_NW.device.type == "cpu":
            self._spec.check_words(words_NW)
        else:  # without waiting for the device
            torch._assert_async(((words_NW >= 0) & (words_NW <= self.last_W)).all())


class _Expansions(nn.Module):
    """The part both collections share: features to words to vectors."""

    def __init__(self, tables: list[SIDEConfig], device: torch.device | None) -> None:
        super().__init__()
        names = [table.name for table in tables]
        if len(set(names)) != len(names):
            raise ValueError(f"table names must be unique, got {names}")
        self._tables = tables
        self._device = torch.device("cpu") if device is None else torch.device(device)
        self.expansions = nn.ModuleDict({table.name: SIDExpansion(table, self._device) for table in tables})

    def vectors(self, table: SIDEConfig, feature: str, features: dict[str, JaggedTensor]) -> tuple[JaggedTensor, Tensor]:
        """The feature's first word, for its lengths and weights, and its vectors [N, D]."""
        words = [features[key] for key in word_names(feature, table.codec.spec.num_words)]
        words_NW = torch.stack([word.values() for word in words], dim=1)
        return words[0], self.expansions[table.name](words_NW)


class SIDECollection(EmbeddingCollectionInterface):
    """KeyedJaggedTensor of SIDs -> a vector per event, where an ``EmbeddingCollection`` stood.

    Args:
        tables: features and codecs.
        device: where to build the constants; not meta.

    Example::

        side = SIDECollection(tables=[SIDEConfig(name="item", feature_names=["history"], codec=codec)])
        vectors_ND = side(features)["history"].values()
    """

    def __init__(self, tables: list[SIDEConfig], device: torch.device | None = None) -> None:
        super().__init__()
        self._tables = tables
        self._expansions = _Expansions(tables, device)
        self._names_by_table = get_embedding_names_by_table([t.embedding_config() for t in tables])
        dims = {table.embedding_dim for table in tables}
        self._embedding_dim = max(dims)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """By embedding name (the feature's, or ``feature@table`` if tables share it), float32 [N, embedding_dim]."""
        by_key = features.to_dict()
        output = {}
        for table, names in zip(self._tables, self._names_by_table, strict=True):
            for feature, name in zip(table.feature_names, names, strict=True):
                word, vectors_ND = self._expansions.vectors(table, feature, by_key)
                output[name] = JaggedTensor(values=vectors_ND, lengths=word.lengths(), offsets=word.offsets())
        return output

    def embedding_configs(self) -> list[EmbeddingConfig]:
        return [table.embedding_config() for table in self._tables]

    def need_indices(self) -> bool:
        return False

    def embedding_dim(self) -> int:
        return self._embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        return self._names_by_table

    @property
    def device(self) -> torch.device:
        return self._expansions._device


class SIDEBagCollection(EmbeddingBagCollectionInterface):
    """KeyedJaggedTensor of SIDs -> a pooled vector per bag, where an ``EmbeddingBagCollection`` stood.

    Args:
        tables: features, codecs and pooling.
        is_weighted: whether a bag's vectors are weighted by the KJT's weights (sum pooling only).
        device: where to build the constants; not meta.

    Raises:
        ValueError: on mean pooling with weights, as TorchRec.

    Example::

        side = SIDEBagCollection(tables=[SIDEConfig(name="item", feature_names=["clicked"], codec=codec)])
        dlrm = DLRM(embedding_bag_collection=side, ...)
    """

    def __init__(
        self, tables: list[SIDEConfig], is_weighted: bool = False, device: torch.device | None = None
    ) -> None:
        super().__init__()
        if is_weighted and any(table.pooling == PoolingType.MEAN for table in tables):
            raise ValueError("mean pooling takes no weights; use sum pooling")
        self._tables = tables
        self._is_weighted = is_weighted
        self._expansions = _Expansions(tables, device)
        self._names = [n for names in get_embedding_names_by_table(self.embedding_bag_configs()) for n in names]
        self._features = [feature for table in tables for feature in table.feature_names]
        self._lengths = [table.embedding_dim for table in tables for _ in table.feature_names]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """float32 [B, embedding_dim] by embedding name; an empty bag is zeros."""
        inverse = features.inverse_indices_or_none()
        first_keys = [
            word_names(feature, table.codec.spec.num_words)[0] for table in self._tables for feature in table.feature_names
        ]
        by_key = features.to_dict()
        pooled = []
        for table in self._tables:
            for feature in table.feature_names:
                word, vectors_ND = self._expansions.vectors(table, feature, by_key)
                pooled.append(self._pool(table, word, vectors_ND))
        return KeyedTensor(
            keys=self._names,
            values=process_pooled_embeddings(pooled, reorder_inverse_indices(inverse, first_keys)),
            length_per_key=self._lengths,
        )

    def _pool(self, table: SIDEConfig, word: JaggedTensor, vectors_ND: Tensor) -> Tensor:
        lengths_B = word.lengths().long()
        if self._is_weighted:
            vectors_ND = vectors_ND * word.weights().unsqueeze(1)
        bag_N = torch.repeat_interleave(torch.arange(len(lengths_B), device=vectors_ND.device), lengths_B)
        pooled_BD = vectors_ND.new_zeros(len(lengths_B), vectors_ND.shape[1]).index_add(0, bag_N, vectors_ND)
        if table.pooling == PoolingType.MEAN:
            pooled_BD = pooled_BD / lengths_B.clamp_min(1).unsqueeze(1)
        return pooled_BD

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return [table.embedding_bag_config() for table in self._tables]

    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        return self._expansions._device
