"""Arms: the ways of feeding items to the ranker that a comparison swaps, everything else being equal.

An arm has two sides. In the loader, ``values`` gives what travels with each event (looked up by item row in arrays mapped
from disk; in production it is logged with the event). In the model, ``module`` turns the batch's KeyedJaggedTensor into
one vector per event.
"""

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec, word_names
from sidrec_torchrec.data.item_arrays import map_rows
from sidrec_torchrec.errors import SidrecError, check_at_least, check_share
from sidrec_torchrec.side.collection import SIDECollection
from sidrec_torchrec.side.expansion import MODES, OfCodec, SIDEConfig
from sidrec_torchrec.side.hybrid import CoarseIds, HybridCollection
from sidrec_torchrec.side.ngram import AllNgram, NgramCollection, PrefixNgram

SIDE_ARMS = ("side", "learned-side", "hybrid")  # the fused tokenizer's SID, expanded
NGRAM_ARMS = ("prefix-ngram", "all-ngram")  # traditional SIDs, looked up
ARMS = ("none", "raw", *NGRAM_ARMS, *SIDE_ARMS, "id")


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """Choices within arms.

    Args:
        side_mode: what SIDE turns a SID into, ``digits`` or ``decoded``.
        table_dim: width of learned item tables (``id``, ``hybrid`` and n-grams); a multiple of 4, as fbgemm needs.
        ngram_rows: rows of each SID's table of n-grams.
        ngram_depth: longest n-gram, in digits; 0 for all.
        coarse_ids: rows of the hybrid arm's table, at most; the longest prefix of the SID that has no more values.
        table_dropout: share of events whose learned rows are dropped whole in training, so that the ranker also learns
            to do without: tables give zeros (which unseen items have), ``learned-side`` the rows it started with.
        digit_dropout: share of each event's digits that SIDE leaves out in training, where its vectors are attended to.
    """

    side_mode: str = "decoded"
    table_dim: int = 64
    ngram_rows: int = 65_536
    ngram_depth: int = 0
    coarse_ids: int = 4_096
    table_dropout: float = 0.35
    digit_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(self, 0, "ngram_depth")
        check_at_least(self, 1, "ngram_rows", "coarse_ids")
        check_share(self, "table_dropout", "digit_dropout")
        if self.table_dim < 4 or self.table_dim % 4:  # fbgemm wants table rows of whole 16 bytes
            raise ValueError(f"table_dim must be a multiple of 4, got {self.table_dim}")
        if self.side_mode not in MODES:
            raise ValueError(f"side_mode must be one of {', '.join(MODES)}; got '{self.side_mode}'")


class Arm(ABC):
    """One way of feeding items.

    Attributes:
        keys: keys of the batch's item KJT.
        dim: width of the module's output.
    """

    keys: tuple[str, ...] = ()
    dim: int = 1

    @abstractmethod
    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        """By key, a tensor [N] or [N, width] for rows of the item file, int32 [N]."""

    @abstractmethod
    def module(self, device: torch.device) -> nn.Module:
        """KeyedJaggedTensor of N events -> float32 [N, dim]."""

    @property
    def events(self) -> SIDEConfig | None:
        """The SIDs that travel, for attention to codes; None if the arm has none."""
        return None

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        """Columns an event log keeps for this arm; by default what travels in the KJT."""
        return {key: pa.array(value.numpy()) for key, value in self.values(item_N).items()}


@dataclass(frozen=True)
class SIDArray:
    """Packed SIDs of every item: ``.npy`` of int64 [num_items, num_words], and the codec that made them."""

    path: Path
    codec: Codec


@dataclass(frozen=True, kw_only=True)
class ArmInputs:
    """What arms are made of: arrays mapped from disk, one row per row of the item file.

    Args:
        num_items: rows of the item file.
        vectors: per source, a ``.npy`` of float16 [num_items, d], of root mean square 1; zeros where missing.
        sids: SIDs by tokenizer: one for all sources, or one per source.
    """

    num_items: int
    vectors: dict[str, Path] = field(default_factory=dict)
    sids: dict[str, SIDArray] = field(default_factory=dict)


def build_arm(name: str, config: ArmConfig, inputs: ArmInputs) -> Arm:
    """The arm of this name.

    Raises:
        SidrecError: on an unknown name, or SIDs that the arm cannot read.
    """
    match name:
        case "none":
            return NoneArm()
        case "raw":
            return RawArm(inputs.vectors)
        case "id":
            return IdArm(inputs.num_items, config)
        case "side":
            return SideArm(inputs.sids, config, learned=False)
        case "learned-side":
            return SideArm(inputs.sids, config, learned=True)
        case "hybrid":
            return HybridArm(inputs.sids, config)
        case "prefix-ngram":
            return NgramArm(inputs.sids, config, PrefixNgram)
        case "all-ngram":
            return NgramArm(inputs.sids, config, AllNgram)
    raise SidrecError(f"unknown arm '{name}'; there are {', '.join(ARMS)}")


class NoneArm(Arm):
    """No item content: a candidate is told apart by its context alone."""

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        return {}

    def module(self, device: torch.device) -> nn.Module:
        return _NoItems()


class RawArm(Arm):
    """Every source's vector travels with the event: the upper bound on content, and on bytes."""

    def __init__(self, vectors: dict[str, Path]) -> None:
        self.keys = tuple(vectors)
        self._vectors = {name: map_rows(path) for name, path in vectors.items()}
        self._dims = {name: array.shape[1] for name, array in self._vectors.items()}
        self.dim = sum(self._dims.values())

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        return {name: torch.from_numpy(array[item_N]) for name, array in self._vectors.items()}

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        return {
            name: pa.FixedSizeListArray.from_arrays(pa.array(array[item_N].reshape(-1)), self._dims[name])
            for name, array in self._vectors.items()
        }

    def module(self, device: torch.device) -> nn.Module:
        return _RawVectors(self._dims)


class IdArm(Arm):
    """A learned row per item."""

    keys = ("item_id",)

    def __init__(self, num_items: int, config: ArmConfig) -> None:
        self.dim = config.table_dim
        self._num_items = num_items
        self._dropout = config.table_dropout

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        return {"item_id": torch.from_numpy(item_N.astype(np.int64))}

    def module(self, device: torch.device) -> nn.Module:
        # Rows start at zero: an item never trained on says nothing, and sharding cannot change the start.
        table = EmbeddingConfig(
            name="item_id",
            embedding_dim=self.dim,
            num_embeddings=self._num_items,
            feature_names=["item_id"],
            init_fn=nn.init.zeros_,
        )
        return _OneFeature(EmbeddingCollection(tables=[table], device=device), "item_id", self._dropout)


class SideArm(Arm):
    """SIDE: packed SIDs travel, and are expanded by a module without parameters, or with learned rows (``LearnedSIDE``).

    One SID travels as ``sid``; several, side by side, under the names of their tokenizers.
    """

    def __init__(self, sids: dict[str, SIDArray], config: ArmConfig, *, learned: bool) -> None:
        by_feature = dict(zip(["sid"], sids.values(), strict=True)) if len(sids) == 1 else sids
        self._words = {feature: map_rows(sid.path) for feature, sid in by_feature.items()}
        self._tables = [
            SIDEConfig(name=feature, feature_names=[feature], codec=sid.codec, mode=config.side_mode, learned=learned)
            for feature, sid in by_feature.items()
        ]
        self._dropout, self._digit_dropout = config.table_dropout, config.digit_dropout
        self.keys = tuple(key for feature, words in self._words.items() for key in word_names(feature, words.shape[1]))
        self.dim = sum(table.embedding_dim for table in self._tables)

    @property
    def events(self) -> SIDEConfig | None:
        return self._tables[0] if len(self._tables) == 1 else None

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        words = [torch.from_numpy(words[item_N]).unbind(1) for words in self._words.values()]
        return dict(zip(self.keys, itertools.chain(*words), strict=False))  # a subclass may have more keys

    def module(self, device: torch.device) -> nn.Module:
        modules = [self._expansion(table, device) for table in self._tables]
        return modules[0] if len(modules) == 1 else _SideBySide(modules)

    def _expansion(self, table: SIDEConfig, device: torch.device) -> nn.Module:
        (feature,) = table.feature_names
        fixed = dataclasses.replace(table, learned=False, digit_dropout=self._digit_dropout)
        frozen = _OneFeature(SIDECollection(tables=[fixed], device=device), feature, 0.0)
        if not table.learned:
            return frozen
        learned = _OneFeature(SIDECollection(tables=[table], device=device), feature, 0.0)
        return _Fallback(learned, frozen, self._dropout)


class HybridArm(SideArm):
    """SIDE, and a learned row per prefix of the SID; the id of the prefix is made when the batch is."""

    def __init__(self, sids: dict[str, SIDArray], config: ArmConfig) -> None:
        if len(sids) != 1:
            raise SidrecError(f"the arm 'hybrid' reads one SID, got {', '.join(sids)}")
        super().__init__(sids, config, learned=False)
        (self._table,) = self._tables
        try:
            self._coarse = CoarseIds.at_most(self._table.codec.spec, config.coarse_ids)
        except ValueError as error:
            raise SidrecError(f"the arm 'hybrid': {error}; raise coarse_ids") from None
        self.keys = (*self.keys, self._coarse.key("sid"))
        self.dim += config.table_dim
        self._config = config

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        words_NW = torch.from_numpy(self._words["sid"][item_N])
        return {**super().values(item_N), self._coarse.key("sid"): self._coarse.ids(words_NW)}

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        return {key: pa.array(value.numpy()) for key, value in super().values(item_N).items()}

    def module(self, device: torch.device) -> nn.Module:
        table = dataclasses.replace(self._table, digit_dropout=self._digit_dropout)
        collection = HybridCollection(table, self._coarse, self._config.table_dim, device)
        return _Hybrid(collection, self._config.table_dropout)


class NgramArm(Arm):
    """Traditional SIDs (Zheng et al., arXiv 2504.02137): per tokenizer, n-grams of residual codes in a hashed table."""

    def __init__(self, sids: dict[str, SIDArray], config: ArmConfig, ngram: type[PrefixNgram]) -> None:
        self._words = {name: map_rows(sid.path) for name, sid in sids.items()}
        self._ngrams = {name: _ngrams(name, sid.codec.spec, config, ngram) for name, sid in sids.items()}
        self.keys = tuple(key for name, ngrams in self._ngrams.items() for key in ngrams.keys(name))
        self.dim = config.table_dim * len(sids)
        self._config = config

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        values = {}
        for name, ngrams in self._ngrams.items():
            tokens_NP = ngrams.tokens(torch.from_numpy(self._words[name][item_N]))
            values |= dict(zip(ngrams.keys(name), tokens_NP.unbind(1), strict=True))
        return values

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        # A log keeps the code itself; its n-grams are made when the batch is.
        return {
            column: pa.array(word_N)
            for name, words in self._words.items()
            for column, word_N in zip(word_names(name, words.shape[1]), words[item_N].T, strict=True)
        }

    def module(self, device: torch.device) -> nn.Module:
        tables = NgramCollection(self._ngrams, embedding_dim=self._config.table_dim, device=device)
        return nn.Sequential(tables, _RowDropout(self._config.table_dropout))


def _ngrams(name: str, spec: SIDSpec, config: ArmConfig, ngram: type[PrefixNgram]) -> PrefixNgram:
    try:
        return ngram(spec, num_rows=config.ngram_rows, depth=config.ngram_depth or spec.num_digits)
    except ValueError as error:
        raise SidrecError(f"n-grams of the SIDs '{name}': {error}") from None


class PackedSIDs(nn.Module):
    """The batch's SIDs as they travel: KeyedJaggedTensor of N events -> int64 [N, W], checked."""

    def __init__(self, events: SIDEConfig, device: torch.device) -> None:
        super().__init__()
        self._feature = events.feature_names[0]
        self.codec = OfCodec(events, {}, device)

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        return self.codec.read(items, self._feature).values()


class _NoItems(nn.Module):
    def forward(self, items: KeyedJaggedTensor) -> None:
        return None


class _RawVectors(nn.Module):
    """Vectors of each source side by side."""

    def __init__(self, dims: dict[str, int]) -> None:
        super().__init__()
        self._dims = dims

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        return torch.cat([items[name].values().view(-1, dim).float() for name, dim in self._dims.items()], dim=1)


class _SideBySide(nn.ModuleList):
    """Modules' vectors side by side."""

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        return torch.cat([module(items) for module in self], dim=1)


class _OneFeature(nn.Module):
    """The vectors an embedding collection gives one feature."""

    def __init__(self, collection: nn.Module, feature: str, dropout: float) -> None:
        super().__init__()
        self.collection = collection
        self.dropout = _RowDropout(dropout)
        self._feature = feature

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        return self.dropout(self.collection(items)[self._feature].values())


class _Hybrid(nn.Module):
    """SIDE's vectors and the table's rows side by side."""

    def __init__(self, collection: HybridCollection, dropout: float) -> None:
        super().__init__()
        self.collection = collection
        self.dropout = _RowDropout(dropout)

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        side_NE, rows_ND = self.collection(items)
        return torch.cat([side_NE, self.dropout(rows_ND)], dim=1)


class _Fallback(nn.Module):
    """What ``learned`` gives; in training, for a share ``p`` of the events, what ``frozen`` gives."""

    def __init__(self, learned: nn.Module, frozen: nn.Module, p: float) -> None:
        super().__init__()
        self.learned, self.frozen = learned, frozen
        self.p = p

    def forward(self, items: KeyedJaggedTensor) -> Tensor:
        x_NE = self.learned(items)
        if not self.training or not self.p:
            return x_NE
        kept_N1 = torch.rand(len(x_NE), 1, device=x_NE.device) >= self.p
        return torch.where(kept_N1, x_NE, self.frozen(items))


class _RowDropout(nn.Module):
    """Zeroes whole rows in training with probability ``p``; the others are not scaled, as in serving."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_ND: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x_ND
        return x_ND * (torch.rand(len(x_ND), 1, device=x_ND.device) >= self.p)
