"""SIDE collections: where a TorchRec embedding collection stood, SIDs are expanded instead of looked up.

Parameter-free: the only tensors are buffers that follow from the codec. A feature ``f`` of a codec with one word reads
the KJT key ``f``, with W words the keys ``f_0`` ... ``f_{W-1}``; each event is one packed SID.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

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

from sidrec_torchrec.codec.alphabet import format_stages, parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec, word_names
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.ops.layout import CodeLayout, digit_rows
from sidrec_torchrec.ops.side_decode import side_decode

MODES = ("digits", "decoded")

# fx wraps functions by the module they are called from: TorchRec's own wrapping does not reach this one
torch.fx.wrap("process_pooled_embeddings")
torch.fx.wrap("reorder_inverse_indices")


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
        ValueError: on an unknown mode, or without features.
    """

    name: str
    feature_names: list[str]
    codec: Codec
    mode: str = "digits"
    pooling: PoolingType = PoolingType.SUM

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"SIDE '{self.name}': mode must be one of {', '.join(MODES)}; got '{self.mode}'")
        if not self.feature_names:
            raise ValueError(f"SIDE '{self.name}' serves no feature; name at least one in feature_names")

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
    """Packed SIDs of one codec as vectors: the constants, and the check that a checkpoint is this codec's.

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
        self._codec = codec = config.codec
        decoded = config.mode == "decoded"
        joined = CodeLayout.of(codec.spec).join()
        table_VD = digit_rows(codec.digit_tables if decoded else codec.value_tables(), joined.digits)
        table_RD = joined.expand(table_VD)
        if decoded:
            table_RD[: joined.fields.radices[0]] += codec.offset_D  # every SID takes one of these rows
        self.radices, self.words = list(joined.fields.radices), list(joined.fields.words)
        last_W = torch.tensor([limit - 1 for limit in codec.spec.word_limits])
        self._constants = {"table_RD": table_RD, "last_W": last_W}
        for name, constant in self._constants.items():
            self.register_buffer(name, constant.to(device, copy=True), persistent=False)
        self.stages = format_stages(codec.spec.stages)

    def forward(self, words_NW: Tensor) -> Tensor:
        """float32 [N, embedding_dim] of packed SIDs, int64 [N, W], which ``_packed_sids`` has checked."""
        return side_decode(words_NW, self.table_RD, self.radices, self.words)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SIDExpansion":
        super()._apply(fn, recurse)
        for name, constant in self._constants.items():  # after to_empty() they would hold whatever was in memory
            getattr(self, name).copy_(constant)
        return self

    def get_extra_state(self) -> str:
        """What a checkpoint keeps: whose SIDs the model was trained on. The constants follow from the codec.

        Text, because distributed checkpoints take a dict apart, and miss it where a table lies on another process.
        """
        return json.dumps(self._codec.spec.to_json())

    def set_extra_state(self, state: str) -> None:
        """Refuses a checkpoint of another codec.

        Raises:
            CodecMismatchError: names both fingerprints.
        """
        self._codec.check(json.loads(state)["fingerprint"], "checkpoint")


class _Expansions(nn.Module):
    """The part both collections share: features to words to vectors."""

    def __init__(self, tables: list[SIDEConfig], device: torch.device | None) -> None:
        super().__init__()
        names = [table.name for table in tables]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"a collection needs tables of unique names, got {names}")
        self.expansions = nn.ModuleDict({table.name: SIDExpansion(table, device) for table in tables})

    @property
    def device(self) -> torch.device:
        """Where the constants are."""
        return next(self.buffers()).device

    def vectors(self, table: SIDEConfig, feature: str, features: KeyedJaggedTensor) -> tuple[JaggedTensor, Tensor]:
        """The feature's SIDs, with lengths and weights, and their vectors [N, D]."""
        expansion = self.expansions[table.name]
        sids = _packed_sids(features, feature, expansion.stages, expansion.last_W)
        return sids, expansion(sids.values())


# What follows looks at values, or asks tensors for their device: fx must call it rather than trace it.


@lru_cache
def _spec(stages: str) -> SIDSpec:
    return SIDSpec(parse_stages(stages), "")


@torch.fx.wrap
def _packed_sids(features: KeyedJaggedTensor, feature: str, stages: str, last_W: Tensor) -> JaggedTensor:
    """A feature's SIDs, values int64 [N, W], gathered from the keys of its words and checked."""
    spec, by_key = _spec(stages), features.to_dict()
    keys = word_names(feature, spec.num_words)
    missing = [key for key in keys if key not in by_key]
    if missing:
        raise DataError(
            f"feature '{feature}': the KeyedJaggedTensor has no key '{missing[0]}'; its keys are {features.keys()}, and "
            f"SIDs of {stages} travel under {keys}"
        )
    words = [by_key[key] for key in keys]
    _check_lengths(feature, keys, words)
    words_NW = torch.stack([word.values() for word in words], dim=1)
    _check_words(feature, spec, words_NW, last_W)
    first = words[0]
    return JaggedTensor(words_NW, weights=first.weights_or_none(), lengths=first.lengths(), offsets=first.offsets())


def _check_lengths(feature: str, keys: list[str], words: list[JaggedTensor]) -> None:
    first, *others = words
    for key, other in zip(keys[1:], others, strict=True):
        message = (
            f"feature '{feature}': keys '{keys[0]}' and '{key}' have different lengths; every SID has a word in each"
        )
        if first.lengths().shape != other.lengths().shape:
            raise DataError(message)
        equal = (first.lengths() == other.lengths()).all()
        if _can_look_at(equal):
            if not equal:
                raise DataError(message)
        else:
            torch._assert_async(equal, message)


def _check_words(feature: str, spec: SIDSpec, words_NW: Tensor, last_W: Tensor) -> None:
    if _can_look_at(words_NW) or words_NW.dtype != torch.int64:
        try:
            spec.check_words(words_NW)
        except ValueError as error:
            raise DataError(f"feature '{feature}': {error}") from None
    else:
        message = f"feature '{feature}': a word is no packed SID of {format_stages(spec.stages)}"
        torch._assert_async(((words_NW >= 0) & (words_NW <= last_W)).all(), message)


def _can_look_at(values: Tensor) -> bool:
    """Whether a check can read values now; else it must be an assertion: on CUDA, to wait for nothing, and in a graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


@torch.fx.wrap
def _pool(sids: JaggedTensor, vectors_ND: Tensor, mean: bool, is_weighted: bool) -> Tensor:
    """float [B, D]: the sum, weighted sum or mean of each bag's vectors; zeros for an empty bag."""
    lengths_B = sids.lengths().long()
    if is_weighted:
        vectors_ND = vectors_ND * sids.weights().unsqueeze(1)
    bag_N = torch.repeat_interleave(lengths_B, output_size=vectors_ND.shape[0])
    pooled_BD = vectors_ND.new_zeros(lengths_B.shape[0], vectors_ND.shape[1]).index_add(0, bag_N, vectors_ND)
    return pooled_BD / lengths_B.clamp_min(1).unsqueeze(1) if mean else pooled_BD


class SIDECollection(EmbeddingCollectionInterface):
    """KeyedJaggedTensor of SIDs -> a vector per event, where an ``EmbeddingCollection`` stood.

    Args:
        tables: features and codecs, all of one ``embedding_dim``, as TorchRec demands of an ``EmbeddingCollection``.
        device: where to build the constants; not meta.

    Raises:
        ValueError: on tables of equal names or different widths.

    Example::

        side = SIDECollection(tables=[SIDEConfig(name="item", feature_names=["history"], codec=codec)])
        vectors_ND = side(features)["history"].values()
    """

    def __init__(self, tables: list[SIDEConfig], device: torch.device | None = None) -> None:
        super().__init__()
        self._tables = tables
        self._expansions = _Expansions(tables, device)
        self._names_by_table = get_embedding_names_by_table([t.embedding_config() for t in tables])
        self._embedding_dim = tables[0].embedding_dim
        for table in tables[1:]:
            if table.embedding_dim != self._embedding_dim:
                raise ValueError(
                    f"tables '{tables[0].name}' and '{table.name}' give {self._embedding_dim} and {table.embedding_dim} "
                    "floats per event; one collection has one embedding_dim, so put them in two"
                )

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """By embedding name (the feature's, or ``feature@table`` if tables share it), float32 [N, embedding_dim].

        Raises:
            DataError: if a feature's key is missing or, on CPU, a value is no packed SID of its codec; names feature and
                row. On CUDA and in graphs an assertion fails instead, without a wait.
        """
        output = {}
        for table, names in zip(self._tables, self._names_by_table, strict=True):
            for feature, name in zip(table.feature_names, names, strict=True):
                sids, vectors_ND = self._expansions.vectors(table, feature, features)
                output[name] = JaggedTensor(values=vectors_ND, lengths=sids.lengths(), offsets=sids.offsets())
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
        return self._expansions.device


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

    def __init__(self, tables: list[SIDEConfig], is_weighted: bool = False, device: torch.device | None = None) -> None:
        super().__init__()
        if is_weighted and any(table.pooling == PoolingType.MEAN for table in tables):
            raise ValueError("mean pooling takes no weights; use sum pooling")
        self._tables = tables
        self._is_weighted = is_weighted
        self._expansions = _Expansions(tables, device)
        self._names = [n for names in get_embedding_names_by_table(self.embedding_bag_configs()) for n in names]
        self._first_keys = [
            word_names(feature, table.codec.spec.num_words)[0] for table in tables for feature in table.feature_names
        ]
        self._lengths = [table.embedding_dim for table in tables for _ in table.feature_names]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """float32 [B, embedding_dim] by embedding name; an empty bag is zeros.

        Raises:
            DataError: as ``SIDECollection``.
        """
        pooled = []
        for table in self._tables:
            for feature in table.feature_names:
                sids, vectors_ND = self._expansions.vectors(table, feature, features)
                pooled.append(_pool(sids, vectors_ND, table.pooling == PoolingType.MEAN, self._is_weighted))
        inverse = reorder_inverse_indices(features.inverse_indices_or_none(), self._first_keys)
        return KeyedTensor(
            keys=self._names, values=process_pooled_embeddings(pooled, inverse), length_per_key=self._lengths
        )

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return [table.embedding_bag_config() for table in self._tables]

    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        return self._expansions.device
