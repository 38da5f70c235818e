"""An arm by its name: what it needs per item is laid out as arrays beside the prepared sequences, once for all that share it."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from sidrec_torchrec.codec.codec import CODEC_FOLDER, Codec
from sidrec_torchrec.data.format import DataFolder, open_items
from sidrec_torchrec.data.ids import IdIndex, mixed_types, same_ids, shown
from sidrec_torchrec.data.item_arrays import write_rows, write_vectors
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.sids import open_sids, read_sids
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.names import escape
from sidrec_torchrec.processes import made_once
from sidrec_torchrec.ranker.arms.base import ARMS, Arm, ArmConfig, ArmInputs, Needs, SIDArray


def open_arm(
    name: str,
    config: ArmConfig,
    *,
    data: Path | DataFolder,
    prepared: Prepared,
    sources: Sequence[str] = (),
    sids: Sequence[Path] = (),
) -> Arm:
    """The arm of this name; what it needs is laid out under ``prepared``'s folder where it is not yet. On every process.

    Args:
        name: in ``ARMS``.
        config: choices within arms.
        data: the data folder.
        prepared: the prepared sequences.
        sources: whose vectors an arm gets that needs vectors; empty for all.
        sids: folders encode-corpus wrote, for an arm that needs SIDs.

    Raises:
        SidrecError: on an unknown name, or if the arm needs SIDs and got none, or some that it cannot read.
        DataError: if ``data``'s items are not those the sequences were prepared from, or the SIDs are of other items.
    """
    return ARMS[name](arm_inputs(name, data=data, prepared=prepared, sources=sources, sids=named(sids)), config)


def named(sids: Sequence[Path]) -> dict[str, Path]:
    """Folders of SIDs by their names.

    Raises:
        SidrecError: if two have one name.
    """
    if len({path.name for path in sids}) < len(sids):
        raise SidrecError(f"--sids: two folders of one name, {', '.join(map(str, sids))}; SIDs are told apart by it")
    return {path.name: path for path in sids}


def arm_inputs(
    name: str,
    *,
    data: Path | DataFolder,
    prepared: Prepared,
    sources: Sequence[str] = (),
    sids: Mapping[str, Path] = MappingProxyType({}),
) -> ArmInputs:
    """What the arm of this name is made of; see ``open_arm``."""
    kind, data = ARMS[name], DataFolder.of(data)
    prepared.check_items(data)
    if kind.needs is Needs.SIDS and not sids:
        raise SidrecError(f"the arm '{name}' needs SIDs; name the folders encode-corpus wrote with --sids")
    folder = prepared.arrays
    return ArmInputs(
        num_items=prepared.num_items,
        vectors=_vectors(data, sources, folder) if kind.needs is Needs.VECTORS else {},
        sids={key: _sid_array(data, path, folder) for key, path in sids.items()} if kind.needs is Needs.SIDS else {},
        training_events=training_events_file(prepared) if kind.counts_events else None,
    )


def _vectors(data: DataFolder, sources: Sequence[str], folder: Path) -> dict[str, Path]:
    vectors = {}
    for source in sources or open_items(data).source_dims:
        path = folder / f"{escape(f'vectors-{source}')}.npy"
        vectors[source] = made_once(path, partial(write_vectors, data, source))
    return vectors


def _sid_array(data: DataFolder, encoded: Path, folder: Path) -> SIDArray:
    codec = Codec.load(encoded / CODEC_FOLDER)
    path = folder / f"sid-{codec.spec.fingerprint}-{open_sids(encoded).identity}.npy"
    return SIDArray(made_once(path, partial(_write_sids, data, encoded, codec)), codec)


def training_events_file(prepared: Prepared) -> Path:
    """``ArmInputs.training_events`` of the sequences, laid out where it is not yet. On every process."""
    return made_once(prepared.arrays / "training-events.npy", partial(_write_training_events, prepared))


def _write_training_events(prepared: Prepared, path: Path) -> None:
    write_rows(path, (prepared.num_items,), np.int64, iter([prepared.training_events()]))


def _write_sids(data: DataFolder, encoded: Path, codec: Codec, path: Path) -> None:
    items = open_items(data, sources=(), targets=())
    known_ids, words_NW = read_sids(encoded, codec)
    item_ids = items.ids()
    if not same_ids(known_ids, item_ids):  # more than these, or in another order
        words_NW = words_NW[_places(known_ids, item_ids, encoded, items.path)]
    write_rows(path, words_NW.shape, np.int64, iter([words_NW]))


def _places(known_ids: pa.Array, item_ids: pa.Array, encoded: Path, items: Path) -> np.ndarray:
    """Where the SIDs of items are, int64 [num_items].

    Raises:
        DataError: if an item has none.
    """
    if known_ids.type != item_ids.type:
        raise mixed_types(items, item_ids.type, encoded, known_ids.type)
    place_N = IdIndex(known_ids).find(item_ids)
    missing = np.flatnonzero(place_N < 0)
    if len(missing):
        raise DataError(
            f"{encoded}: has no SID of item_id {shown(item_ids, missing[0])} and {len(missing) - 1:,} more of {items}; add those "
            "with encode-corpus --append"
        )
    return place_N
