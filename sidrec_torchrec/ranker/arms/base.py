"""What an arm is, and what it is made of.

An arm has two sides. In the loader, ``values`` gives what travels with each event (looked up by item row in arrays mapped
from disk; in production it is logged with the event). In the model, ``module`` turns the batch's KeyedJaggedTensor into
one vector per event.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import NO_SID, SIDSpec, word_names
from sidrec_torchrec.data.columns import vector_lists
from sidrec_torchrec.data.item_arrays import map_rows
from sidrec_torchrec.errors import SidrecError, check_at_least, check_share
from sidrec_torchrec.registry import Registry
from sidrec_torchrec.side.expansion import MODES, SIDEConfig

_BLOCK_ITEMS = 4_096


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    """Choices within arms.

    Args:
        side_mode: what SIDE turns a SID into, ``digits`` or ``decoded``.
        table_dim: width of learned item tables (``id``, ``hashed-id``, ``hybrid``, n-grams and pieces); a multiple of 4, as fbgemm needs.
        ngram_rows: rows of each hashed table: of a SID's n-grams, and of ``hashed-id``.
        ngram_depth: longest n-gram, in digits; 0 for all.
        piece_rows: rows of each SID's table of pieces: one for each value of each digit, one for none, the others merged.
        coarse_ids: rows of the hybrid arm's table, at most; the longest prefix of the SID that has no more values.
        table_dropout: share of events whose learned rows are dropped whole in training, so that the ranker also learns
            to do without: tables give zeros (which unseen items have), ``learned-side`` the rows it started with.
        digit_dropout: share of each event's digits that SIDE leaves out in training, where its vectors are attended to.
    """

    side_mode: str = "decoded"
    table_dim: int = 64
    ngram_rows: int = 65_536
    ngram_depth: int = 0
    piece_rows: int = 8_192
    coarse_ids: int = 4_096
    table_dropout: float = 0.35
    digit_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(self, 0, "ngram_depth")
        check_at_least(self, 1, "ngram_rows", "piece_rows", "coarse_ids")
        check_share(self, "table_dropout", "digit_dropout")
        if self.table_dim < 4 or self.table_dim % 4:  # fbgemm wants table rows of whole 16 bytes
            raise ValueError(f"table_dim must be a multiple of 4, got {self.table_dim}")
        if self.side_mode not in MODES:
            raise ValueError(f"side_mode must be one of {', '.join(MODES)}; got '{self.side_mode}'")


class Needs(Enum):
    """What an arm is made of, besides the number of items."""

    NOTHING = auto()
    VECTORS = auto()  # of sources
    SIDS = auto()  # of all sources in one, or of each


class Tokenizers(Enum):
    """Which tokenizers make an arm's SIDs, in a study that does not say it itself."""

    FUSED = auto()  # one that fuses all sources
    PER_SOURCE = auto()  # a residual one of each source


@dataclass(frozen=True)
class SIDArray:
    """Packed SIDs of every item: ``.npy`` of int64 [num_items, num_words], and the codec that made them."""

    path: Path
    codec: Codec


def sid_columns(words: Mapping[str, np.ndarray], item_N: np.ndarray) -> dict[str, pa.Array]:
    """Columns of a log that keeps packed SIDs as they are.

    Args:
        words: of all items by tokenizer, int64 [num_items, W] each.
        item_N: rows of the item file, int32; -1 for a missing item, whose words are ``NO_SID``.
    """
    return {
        column: pa.array(word_N)
        for name, words_IW in words.items()
        for column, word_N in zip(word_names(name, words_IW.shape[1]), words_of(words_IW, item_N).T, strict=True)
    }


def words_of(words_IW: np.ndarray, item_N: np.ndarray) -> np.ndarray:
    """Packed SIDs of items, int64 [N, W]: ``NO_SID`` for the row -1, which is that of a missing item."""
    return _rows_of(words_IW, item_N, NO_SID)


def vectors_of(vectors_ID: np.ndarray, item_N: np.ndarray) -> np.ndarray:
    """Vectors of items, [N, D]: zeros for the row -1, which is that of a missing item."""
    return _rows_of(vectors_ID, item_N, 0)


def side_by_side(sources: Sequence[np.ndarray], row_F: np.ndarray) -> Iterator[np.ndarray]:
    """Vectors of some rows of all sources, float64 [B, D]: a block at a time, whatever their number."""
    for start in range(0, len(row_F), _BLOCK_ITEMS):
        rows = row_F[start : start + _BLOCK_ITEMS]
        yield np.concatenate([array[rows] for array in sources], axis=1, dtype=np.float64)


def trained_sources(inputs: "ArmInputs") -> tuple[list[np.ndarray], np.ndarray]:
    """What an arm that looks at vectors learns from: the sources, [num_items, d] each, and rows of the items that training has, int64.

    Raises:
        SidrecError: if the inputs do not say how often training has each item.
    """
    own = inputs.learned
    if own.training_events is None:
        raise SidrecError("this arm needs training_events: it looks at the items that training has")
    return [map_rows(path) for path in own.vectors.values()], np.flatnonzero(map_rows(own.training_events))


def stored_vectors(vectors_ID: np.ndarray, item_N: np.ndarray) -> pa.Array:
    """A column of a log that keeps vectors as they are; null for a missing item."""
    return vector_lists(vectors_of(vectors_ID, item_N), item_N >= 0)


def _rows_of(array_IX: np.ndarray, item_N: np.ndarray, missing: int) -> np.ndarray:
    rows_NX = array_IX[item_N]
    rows_NX[item_N < 0] = missing
    return rows_NX


@dataclass(frozen=True, kw_only=True)
class ArmInputs:
    """What arms are made of: arrays mapped from disk, one row per row of the item file.

    Args:
        num_items: rows of the item file.
        vectors: per source, a ``.npy`` of float16 [num_items, d], of root mean square 1; zeros where missing. Empty unless
            the arm needs vectors.
        sids: SIDs by tokenizer: one for all sources, or one per source. Empty unless the arm needs SIDs.
        training_events: a ``.npy`` of int64 [num_items], how many real events training has of each item; no other event is
            counted. None unless the arm ``counts_events``.
        trained_on: what the arm of the trained ranker was made of, if these are other items; None: they are the same.
        own_rows: int64 [num_items], the row that each item has among those; -1 for a new one. None as above.
    """

    num_items: int
    vectors: dict[str, Path] = field(default_factory=dict)
    sids: dict[str, SIDArray] = field(default_factory=dict)
    training_events: Path | None = None
    trained_on: "ArmInputs | None" = None
    own_rows: np.ndarray | None = None

    @property
    def learned(self) -> "ArmInputs":
        """What the arm learns from: that which the ranker was trained on, whatever it is given now."""
        return self if self.trained_on is None else self.trained_on


class Arm(ABC):
    """One way of feeding items. Registered by name in ``ARMS``, it is all that others know of it.

    Args:
        inputs: what it needs.
        config: choices within arms.

    Attributes:
        needs: what ``inputs`` must hold.
        tokenizers: which tokenizers make its SIDs by default, if it needs SIDs.
        counts_events: whether ``inputs`` must also say how often training has each item.
        travels_as_codes: whether its SIDs can be read in code space. An instance that can be has one of them in ``sids``.
        is_base: whether it is what the gains of the others are relative to.
        is_bound: whether it has all of the content as it comes, which others condense.
        takes_new_items: whether a trained one can be given other items (``inputs.own_rows``); None: if it reads vectors or SIDs
            and does not count events, so that it needs no more than the items themselves.
        keys: keys of the batch's item KJT.
        dim: width of the module's output.
        sids: the packed SIDs that travel, for readers of codes; empty if they are none's to read.
        words: packed SIDs of all items, by the SIDs' names, int64 [num_items, W] each; empty if it is not made of SIDs.

    Raises:
        SidrecError: on SIDs that the arm cannot read.

    Example::

        @ARMS.register("popularity")
        class Popularity(Arm):
            keys = ("popularity",)

            def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None: ...
            def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]: ...
            def module(self, device: torch.device) -> nn.Module: ...
    """

    needs: ClassVar[Needs] = Needs.NOTHING
    tokenizers: ClassVar[Tokenizers] = Tokenizers.FUSED
    counts_events: ClassVar[bool] = False
    travels_as_codes: ClassVar[bool] = False
    is_base: ClassVar[bool] = False
    is_bound: ClassVar[bool] = False
    takes_new_items: ClassVar[bool | None] = None

    keys: tuple[str, ...] = ()
    dim: int = 1
    sids: tuple[SIDEConfig, ...] = ()
    words: Mapping[str, np.ndarray] = MappingProxyType({})

    def __init__(self, inputs: ArmInputs, config: ArmConfig) -> None:
        pass

    @abstractmethod
    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        """By key, a tensor [N] or [N, width] for rows of the item file, int32 [N].

        The row -1 is of an event whose item is missing; no target is one. Its SID is ``NO_SID`` and its vector zeros. Where a
        table needs an id, and has no row for nothing, any id will do: readers take the item's vector for zero, so that
        nothing of the row is read, and none of it learns.
        """

    @abstractmethod
    def module(self, device: torch.device) -> nn.Module:
        """KeyedJaggedTensor of N events -> float32 [N, dim]; or None, if all items are alike."""

    def served_sids(self) -> dict[str, SIDSpec]:
        """Specs of ``words``, which a server sends; empty if it cannot be served."""
        return {}

    def served_module(self, module: nn.Module) -> nn.Module:
        """What a server runs in the place of the trained ``module``, whole and sharing its parameters, without TorchRec.

        Returns:
            Packed SIDs, int64 [N, W], those of ``served_sids`` side by side -> float32 [N, dim].
        """
        raise NotImplementedError

    def stored(self, item_N: np.ndarray) -> dict[str, pa.Array]:
        """Columns an event log keeps for this arm; by default what travels in the KJT.

        Of a missing item, the row -1, a log keeps ``NO_SID`` or null.
        """
        return {key: pa.array(value.numpy()) for key, value in self.values(item_N).items()}


ARMS: Registry[type[Arm]] = Registry("arm")
