"""SIDE collections: in place of a TorchRec embedding collection, SIDs are expanded instead of looked up.

Parameter-free unless a table is ``learned``. A feature ``f`` of a codec with one word reads the KJT key ``f``, with W words
the keys ``f_0`` ... ``f_{W-1}``; each event is one packed SID, or ``NO_SID`` in all words, which gives zeros.
"""

from functools import partial
from typing import Any, cast

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

from sidrec_torchrec.codec.packing import word_names
from sidrec_torchrec.side.expansion import FrozenSIDE, LearnedSIDE, SIDEConfig, build_side

# fx wraps functions by the module they are called from: TorchRec's own wrapping does not reach this one
torch.fx.wrap("process_pooled_embeddings")
torch.fx.wrap("reorder_inverse_indices")


# What all collections share works on a plain ModuleDict, which refuses tables named as its attributes are: TorchRec's own
# collections refuse those too, and a class of ours would refuse more.


def build_sides(tables: list[SIDEConfig], device: torch.device | None) -> nn.ModuleDict:
    """SIDE of each table, by the table's name.

    Args:
        tables: of unique names.
        device: where to build the constants; not meta.

    Raises:
        ValueError: on tables of equal names, or none.
    """
    names = [table.name for table in tables]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"a collection needs tables of unique names, got {names}")
    return nn.ModuleDict({table.name: build_side(table, device) for table in tables})


def device_of(sides: nn.ModuleDict) -> torch.device:
    """Where the constants are."""
    return next(sides.buffers()).device


def expand(
    sides: nn.ModuleDict, table: SIDEConfig, feature: str, features: KeyedJaggedTensor
) -> tuple[JaggedTensor, Tensor]:
    """The SIDs of one of a table's features, with lengths and weights, and their vectors [N, D]."""
    side = cast(FrozenSIDE | LearnedSIDE, sides[table.name])
    sids = side.read(features, feature)
    return sids, side(sids.values())


def expand_and_pool(
    sides: nn.ModuleDict, tables: list[SIDEConfig], features: KeyedJaggedTensor, is_weighted: bool
) -> Tensor:
    """The pooled vectors of each feature of each table side by side, [B, sum of D]; an empty bag is zeros."""
    pooled, first_keys = [], []
    for table in tables:
        for feature in table.feature_names:
            sids, vectors_ND = expand(sides, table, feature, features)
            pooled.append(_pool(sids, vectors_ND, table.pooling == PoolingType.MEAN, is_weighted))
            first_keys.append(word_names(feature, table.codec.spec.num_words)[0])
    inverse = reorder_inverse_indices(features.inverse_indices_or_none(), first_keys)
    return process_pooled_embeddings(pooled, inverse)


def rename_keys(module: nn.Module, old: str, new: str) -> None:
    """Lets ``module`` load checkpoints in which the names of a part of it began with ``old`` where they do with ``new``."""
    module.register_load_state_dict_pre_hook(partial(_rename, old, new))  # a closure could not be pickled


def _rename(old: str, new: str, _: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    for key in [key for key in state_dict if key.startswith(prefix + old)]:
        state_dict[prefix + new + key[len(prefix + old) :]] = state_dict.pop(key)


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
    """KeyedJaggedTensor of SIDs -> a vector per event, in place of an ``EmbeddingCollection``.

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
        self.tables = build_sides(tables, device)
        rename_keys(self, "_expansions.expansions.", "tables.")  # what 0.1 called it
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
                sids, vectors_ND = expand(self.tables, table, feature, features)
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
        return device_of(self.tables)


class SIDEBagCollection(EmbeddingBagCollectionInterface):
    """KeyedJaggedTensor of SIDs -> a pooled vector per bag, in place of an ``EmbeddingBagCollection``.

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
        self.tables = build_sides(tables, device)
        rename_keys(self, "_expansions.expansions.", "tables.")  # what 0.1 called it
        self._names = [n for names in get_embedding_names_by_table(self.embedding_bag_configs()) for n in names]
        self._lengths = [table.embedding_dim for table in tables for _ in table.feature_names]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """float32 [B, embedding_dim] by embedding name; an empty bag is zeros.

        Raises:
            DataError: as ``SIDECollection``.
        """
        pooled_BE = expand_and_pool(self.tables, self._tables, features, self._is_weighted)
        return KeyedTensor(keys=self._names, values=pooled_BE, length_per_key=self._lengths)

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return [table.embedding_bag_config() for table in self._tables]

    def is_weighted(self) -> bool:
        return self._is_weighted

    @property
    def device(self) -> torch.device:
        return device_of(self.tables)
