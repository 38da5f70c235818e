"""``replace_tables``: tables of an existing model give way to SIDE; the model sees the same names, order and widths."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import get_module_to_default_sharders
from torchrec.distributed.types import ShardedModule
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
    EmbeddingCollection,
    EmbeddingCollectionInterface,
    get_embedding_names_by_table,
)
from torchrec.modules.embedding_tower import EmbeddingTower, EmbeddingTowerCollection
from torchrec.modules.itep_embedding_modules import ITEPEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import word_names
from sidrec_torchrec.side.collection import build_sides, device_of, expand, expand_and_pool, rename_keys
from sidrec_torchrec.side.expansion import SIDEConfig

# What holds tables; all but the exact EmbeddingBagCollection and EmbeddingCollection is left whole: it is sharded or
# quantized already, TorchRec shards it as one module, or it changes ids before they are looked up.
_HOLDERS = (
    EmbeddingBagCollectionInterface,
    EmbeddingCollectionInterface,
    DistributedDataParallel,
    DistributedModelParallel,
    ShardedModule,
    EmbeddingTower,
    EmbeddingTowerCollection,
    ITEPEmbeddingBagCollection,
    *get_module_to_default_sharders(),
)


def replace_tables(
    model: nn.Module,
    codecs: Mapping[str, Codec],
    *,
    mode: str = "digits",
    learned: bool = False,
    digit_dropout: float = 0.0,
    device: torch.device | None = None,
) -> nn.Module:
    """Replaces tables with SIDE, in the model's ``EmbeddingBagCollection`` and ``EmbeddingCollection`` modules.

    The KeyedJaggedTensor then carries packed SIDs where it carried those tables' ids: of one word under the key
    ``feature``, of W words under ``feature_0`` ... ``feature_{W-1}``. Names, order, widths and pooling of the embeddings
    stay as they were. A linear map without bias, learned with the dense parameters, takes SIDE's vectors to the table's
    width; only vectors of mode ``decoded`` that have this width already enter as they are.

    Call it before optimizers, sharding and quantization. The other tables stay in a real TorchRec collection, one name
    deeper (``embedding_bag_collection.tables.embedding_bags.NAME``), and keep their parameters.

    Args:
        model: changed in place; its tables may be on the meta device.
        codecs: by table name, the codec of the SIDs that take the place of the table's ids.
        mode: of SIDE, ``digits`` or ``decoded``.
        learned: whether training changes SIDE's rows; see ``LearnedSIDE``.
        digit_dropout: share of the digits that are left out in training; see ``SIDEConfig``.
        device: where SIDE and its maps are built, never meta; by default where the collection is, or for a meta
            collection on the CPU, from where ``DistributedModelParallel`` moves them with the dense parameters.

    Returns:
        The model; if ``model`` is itself a collection, what replaces it.

    Raises:
        TypeError: if ``codecs`` holds something else.
        ValueError: on a table the model does not have, has twice, or has where it cannot be replaced; on a KJT key that
            would have to carry SIDs and ids, or SIDs of two codecs; on a collection that returns indices. The model is
            then unchanged.

    Example::

        model = DLRM(EmbeddingBagCollection(tables=tables, device=torch.device("meta")), ...)
        model = replace_tables(model, {"item": Codec.load("RUN/sids/side/codec")})
        model = DistributedModelParallel(model)
    """
    for name, codec in codecs.items():
        if not isinstance(codec, Codec):
            raise TypeError(f"table '{name}': expected a Codec, got {type(codec).__name__}; Codec.load reads one")
    by_collection = _locate(model, codecs)
    options = {"mode": mode, "learned": learned, "digit_dropout": digit_dropout}
    replacements = {
        collection: _REPLACED[type(collection)](collection, its_codecs, options, device)
        for collection, its_codecs in by_collection.items()
    }
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would pass over a child's second name
            if child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)


def _holders(module: nn.Module, path: str = "") -> dict[nn.Module, str]:
    """The outermost modules that hold tables, with their paths."""
    if isinstance(module, _HOLDERS) and not isinstance(module, _Replaced):
        return {module: path or "the model itself"}
    found: dict[nn.Module, str] = {}
    for name, child in module.named_children():
        found |= _holders(child, f"{path}.{name}" if path else name)
    return found


def _locate(model: nn.Module, codecs: Mapping[str, Codec]) -> dict[nn.Module, dict[str, Codec]]:
    """The codecs by the collection that holds their tables."""
    holders = _holders(model)
    where: dict[str, list[nn.Module]] = {}
    for holder in holders:
        if type(holder) in _REPLACED:
            for config in _configs(holder):
                where.setdefault(config.name, []).append(holder)
    if not codecs:
        raise ValueError(f"no table named; those that can be replaced: {sorted(where)}")
    by_collection: dict[nn.Module, dict[str, Codec]] = {}
    for name, codec in codecs.items():
        if name not in where:
            others = [
                f"{path} ({type(holder).__name__} of {type(holder).__module__})"
                for holder, path in holders.items()
                if type(holder) not in _REPLACED
            ]
            hint = f". Not looked into: {', '.join(others)}; replace before sharding or quantizing" if others else ""
            raise ValueError(f"no table '{name}'; those that can be replaced: {sorted(where)}{hint}")
        if len(where[name]) > 1:
            paths = " and ".join(holders[holder] for holder in where[name])
            raise ValueError(f"table '{name}' is in {paths}; call replace_tables on the submodule you mean")
        by_collection.setdefault(where[name][0], {})[name] = codec
    return by_collection


def _configs(collection: Any) -> list[EmbeddingBagConfig] | list[EmbeddingConfig]:
    is_bag = isinstance(collection, EmbeddingBagCollectionInterface)
    return collection.embedding_bag_configs() if is_bag else collection.embedding_configs()


def _check_keys(configs: list[EmbeddingBagConfig] | list[EmbeddingConfig], codecs: Mapping[str, Codec]) -> None:
    """Refuses a KJT key that two tables would read in two ways."""
    read_by: dict[str, tuple[str, str | None]] = {}
    for config in configs:
        codec = codecs.get(config.name)
        fingerprint = codec.spec.fingerprint if codec else None
        for feature in config.feature_names:
            for key in word_names(feature, codec.spec.num_words) if codec else [feature]:
                other, its_fingerprint = read_by.setdefault(key, (config.name, fingerprint))
                if its_fingerprint != fingerprint:
                    kinds = "SIDs of one codec and of another" if codec and its_fingerprint else "SIDs and ids"
                    raise ValueError(
                        f"key '{key}' of the KeyedJaggedTensor would have to carry {kinds}, for tables '{other}' and "
                        f"'{config.name}'; give one of them a feature of its own"
                    )


_GATHERS = ("use_gather_select", "use_gather_select_per_sharding")  # the second since torchrec 1.8


def _keep(collection: Any, configs: list[EmbeddingBagConfig] | list[EmbeddingConfig]) -> Any:
    """A collection of the same type, for sharders match it exactly, with these tables and their parameters."""
    nothing = torch.device("meta")  # allocated and initialised, that is
    if isinstance(collection, EmbeddingBagCollection):
        kept = EmbeddingBagCollection(configs, collection.is_weighted(), device=nothing)
        kept.embedding_bags = nn.ModuleDict({c.name: collection.embedding_bags[c.name] for c in configs})
    else:
        known = [name for name in _GATHERS if hasattr(collection, name)]
        kept = EmbeddingCollection(configs, device=nothing, **{name: getattr(collection, name)() for name in known})
        kept.embeddings = nn.ModuleDict({c.name: collection.embeddings[c.name] for c in configs})
    kept._device = collection.device
    return kept


def _side_config(config: EmbeddingBagConfig | EmbeddingConfig, codec: Codec, options: dict[str, Any]) -> SIDEConfig:
    pooling = getattr(config, "pooling", PoolingType.SUM)  # a table of sequences has none, and SIDE does not ask then
    return SIDEConfig(
        name=config.name,
        feature_names=config.feature_names,
        codec=codec,
        pooling=pooling,
        **options,
    )


def _projection(table: SIDEConfig, width: int, device: torch.device) -> nn.Module:
    """SIDE's vectors to the table's width; without bias, so that empty bags stay zeros and pooling may come first."""
    if table.mode == "decoded" and table.embedding_dim == width:
        return nn.Identity()
    return nn.Linear(table.embedding_dim, width, bias=False, device=device)


class _Replaced(nn.Module):
    """What both collections share: the tables that are left, and SIDE with a linear map for each that is gone."""

    def __init__(
        self,
        collection: nn.Module,
        codecs: Mapping[str, Codec],
        options: dict[str, Any],
        device: torch.device | None,
    ) -> None:
        super().__init__()
        configs = _configs(collection)
        _check_keys(configs, codecs)
        if device is None:
            device = next(collection.parameters()).device  # collection.device does not follow a move
            device = torch.device("cpu") if device.type == "meta" else device
        kept = [config for config in configs if config.name not in codecs]
        gone = [config for config in configs if config.name in codecs]
        self.tables: Any = _keep(collection, kept) if kept else None
        self._side_tables = [_side_config(config, codecs[config.name], options) for config in gone]
        self.side = build_sides(self._side_tables, device)
        self.projections = nn.ModuleDict()
        for config, table in zip(gone, self._side_tables, strict=True):
            self.projections[config.name] = _projection(table, config.embedding_dim, device)
            rename_keys(self, f"sides.{config.name}._expansions.expansions.", "side.")  # what 0.1 called it
        self._configs = [replace(c, num_embeddings=1) if c.name in codecs else c for c in configs]
        self._names_by_table = get_embedding_names_by_table(configs)
        self._names = [name for names in self._names_by_table for name in names]
        # names within a part: a feature that tables share may be one table's alone among those left
        names_of_kept = iter(get_embedding_names_by_table(kept))
        self._sources = [
            (config.name, name)
            for config in configs
            for name in (config.feature_names if config.name in codecs else next(names_of_kept))
        ]
        self.train(collection.training)

    @property
    def device(self) -> torch.device:
        """Where SIDE is."""
        return device_of(self.side)


class ReplacedBagCollection(_Replaced, EmbeddingBagCollectionInterface):
    """An ``EmbeddingBagCollection`` with SIDE for some of its tables; made by ``replace_tables``.

    ``tables`` holds the others, or is None; ``side`` and ``projections`` hold SIDE and its linear map, by table name.
    """

    def __init__(self, collection: EmbeddingBagCollection, *arguments) -> None:
        super().__init__(collection, *arguments)
        self._is_weighted = collection.is_weighted()
        if self._is_weighted and any(table.pooling == PoolingType.MEAN for table in self._side_tables):
            raise ValueError("mean pooling takes no weights; use sum pooling")
        self._side_features = [(table.name, name) for table in self._side_tables for name in table.feature_names]
        self._side_widths = [table.embedding_dim for table in self._side_tables for _ in table.feature_names]
        self._lengths = [
            config.embedding_dim
            for config, names in zip(self._configs, self._names_by_table, strict=True)
            for _ in names
        ]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """float32 [B, embedding_dim] by embedding name, in the order of the collection it stands for.

        Raises:
            DataError: as ``SIDEBagCollection``.
        """
        kept = {} if self.tables is None else self.tables(features)  # first: sharded, it communicates meanwhile
        parts = expand_and_pool(self.side, self._side_tables, features, self._is_weighted).split(
            self._side_widths, dim=1
        )
        pooled = {feature: parts[i] for i, feature in enumerate(self._side_features)}  # fx cannot zip them
        columns = [
            self.projections[table](pooled[table, name]) if (table, name) in pooled else kept[name]
            for table, name in self._sources
        ]
        return KeyedTensor(keys=self._names, length_per_key=self._lengths, values=torch.cat(columns, dim=1))

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._configs

    def is_weighted(self) -> bool:
        return self._is_weighted


class ReplacedCollection(_Replaced, EmbeddingCollectionInterface):
    """An ``EmbeddingCollection`` with SIDE for some of its tables; made by ``replace_tables``.

    ``tables`` holds the others, or is None; ``side`` and ``projections`` hold SIDE and its linear map, by table name.
    """

    def __init__(self, collection: EmbeddingCollection, *arguments) -> None:
        super().__init__(collection, *arguments)
        if collection.need_indices():
            names = ", ".join(f"'{table.name}'" for table in self._side_tables)
            raise ValueError(
                f"table {names} is in a collection that returns indices, which SIDE has none of; build it with "
                "need_indices=False"
            )

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """By embedding name, in the order of the collection it stands for, float32 [N, embedding_dim].

        Raises:
            DataError: as ``SIDECollection``.
        """
        kept = {} if self.tables is None else self.tables(features)  # first: sharded, it communicates meanwhile
        expanded = {
            (table.name, name): self._expand(table, name, features)
            for table in self._side_tables
            for name in table.feature_names
        }
        return {
            embedding: expanded[table, name] if (table, name) in expanded else kept[name]
            for embedding, (table, name) in zip(self._names, self._sources, strict=True)
        }

    def _expand(self, table: SIDEConfig, feature: str, features: KeyedJaggedTensor) -> JaggedTensor:
        sids, vectors_ND = expand(self.side, table, feature, features)
        vectors_ND = self.projections[table.name](vectors_ND)
        return JaggedTensor(values=vectors_ND, lengths=sids.lengths(), offsets=sids.offsets())

    def embedding_configs(self) -> list[EmbeddingConfig]:
        return self._configs

    def need_indices(self) -> bool:
        return False

    def embedding_dim(self) -> int:
        return self._configs[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        return self._names_by_table


_REPLACED = {EmbeddingBagCollection: ReplacedBagCollection, EmbeddingCollection: ReplacedCollection}
