"""Lays out what an arm needs per item as arrays beside the prepared sequences; made once, shared by arms and seeds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data.fingerprint import file_fingerprint
from sidrec_torchrec.data.format import open_items
from sidrec_torchrec.data.item_arrays import write_rows, write_vectors
from sidrec_torchrec.data.prepare import Prepared
from sidrec_torchrec.data.sids import CODEC_FOLDER, SIDS_FILE, read_sids
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.ranker.arms import NGRAM_ARMS, SIDE_ARMS, ArmInputs, SIDArray


def load_arm_inputs(
    arm: str,
    *,
    data: Path,
    prepared: Prepared,
    sources: tuple[str, ...],
    sids: tuple[Path, ...],
) -> ArmInputs:
    """What ``arm`` needs, laid out under ``prepared``'s folder where it is not yet; on every process.

    Args:
        arm: its name; only what it needs is laid out.
        data: folder of ``items.parquet``.
        prepared: the prepared sequences.
        sources: for ``raw``; empty for all.
        sids: folders encode-corpus wrote, for arms that read SIDs.

    Raises:
        SidrecError: if the arm needs SIDs and got none.
        DataError: if ``data``'s items are not those the sequences were prepared from, or the SIDs are of other items.
    """
    prepared.check_items(data)
    folder = prepared.folder / "arrays"
    vectors = {}
    if arm == "raw":
        for source in sources or tuple(open_items(data).source_dims):
            vectors[source] = folder / f"vectors-{source}.npy"
            _once(vectors[source], lambda path, source=source: write_vectors(data, source, path))
    reads_sids = arm in (*SIDE_ARMS, *NGRAM_ARMS)
    if reads_sids and not sids:
        raise SidrecError(f"the arm '{arm}' needs SIDs; name the folders encode-corpus wrote with --sids")
    if len({path.name for path in sids}) < len(sids):
        raise SidrecError(f"--sids: two folders of one name, {', '.join(map(str, sids))}; SIDs are told apart by it")
    return ArmInputs(
        num_items=prepared.num_items,
        vectors=vectors,
        sids={path.name: _sid_array(data, path, folder) for path in sids} if reads_sids else {},
    )


def _sid_array(data: Path, encoded: Path, folder: Path) -> SIDArray:
    codec = Codec.load(encoded / CODEC_FOLDER)
    if not (encoded / SIDS_FILE).exists():
        raise DataError(f"{encoded / SIDS_FILE}: not found; run encode-corpus first")
    path = folder / f"sid-{codec.spec.fingerprint}-{file_fingerprint(encoded / SIDS_FILE)}.npy"
    _once(path, lambda path: _write_sids(data, encoded, codec, path))
    return SIDArray(path, codec)


def _write_sids(data: Path, encoded: Path, codec: Codec, path: Path) -> None:
    items = open_items(data, sources=(), targets=())
    item_ids, words_NW = read_sids(encoded, codec)
    if not np.array_equal(item_ids, items.ids()):
        raise DataError(f"{encoded}: holds SIDs of other items than {items.path}; encode this corpus again")
    write_rows(path, words_NW.shape, np.int64, iter([words_NW]))


def _once(path: Path, write: Callable[[Path], None]) -> None:
    if dist.get_rank() == 0 and not path.exists():
        write(path)
    dist.barrier()
