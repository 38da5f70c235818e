"""Gives every item a SID of its own: one more digit numbers the items that share one."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidrec_torchrec.codec.alphabet import OneHot
from sidrec_torchrec.codec.codec import CODEC_FOLDER, Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.codec.report import PrefixGroups
from sidrec_torchrec.data.ids import shown
from sidrec_torchrec.data.sids import SIDS_FILE, open_sids, write_sids
from sidrec_torchrec.errors import DataError, RunMismatchError
from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.training.config import JobConfig

_BLOCK = 1 << 16  # SIDs packed again at once


@dataclass(frozen=True, kw_only=True)
class CodecDisambiguateConfig(JobConfig):
    """What to make unique.

    Args:
        sids: folder encode-corpus wrote.
        out: folder for the longer SIDs and their codec.
        radix: values of the added digit: the most items that may ever share a SID. Part of the new codec's identity, so
            leave room for items to come.

    Raises:
        ValueError: on a radix that no digit can have.
    """

    sids: Path
    out: Path
    radix: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        OneHot(self.radix)


def main(config: CodecDisambiguateConfig) -> None:
    """Writes ``sids.parquet`` and ``codec``, as encode-corpus does.

    An item's added digit is the number of earlier items of the file with the same SID: items appended to the corpus
    change no digit of those before them. One process; memory as in codec_collisions.

    Raises:
        DataError: on files that are missing or broken, or more than ``radix`` items of one SID; names some.
        CodecMismatchError: if the codec beside the SIDs is not theirs.
        RunMismatchError: if ``out`` is there and not empty.
    """
    if config.out.exists() and any(config.out.iterdir()):
        raise RunMismatchError(f"{config.out}: holds files already; give an empty or new folder")
    codec = Codec.load(config.sids / CODEC_FOLDER)
    sids = open_sids(config.sids)
    codec.check(sids.spec.fingerprint, str(sids.path))
    longer = codec.with_serial_digit(config.radix)
    item_ids, words_NW = sids.read()
    rank_N = PrefixGroups.of(codec.spec, words_NW).ranks()
    if rank_N.max() >= config.radix:
        last = int(rank_N.argmax())
        same = item_ids.filter(pa.array((words_NW == words_NW[last]).all(1)))
        raise DataError(
            f"{sids.path}: {len(same):,} items share a SID (item_id {', '.join(shown(same, i) for i in range(min(3, len(same))))}, ...), but a digit of "
            f"radix {config.radix} tells {config.radix} apart; raise the radix, or encode with more digits"
        )
    with atomic_path(config.out) as folder:
        folder.mkdir()
        write_sids(
            folder / SIDS_FILE, longer.spec, _batches(codec.spec, longer.spec, item_ids, words_NW, rank_N), sids.id_type
        )
        longer.save(folder / CODEC_FOLDER)
    print(
        f"{config.out}: {len(item_ids):,} items, each with a SID of its own; the most that shared one: {rank_N.max() + 1}"
    )


def _batches(
    spec: SIDSpec, longer: SIDSpec, item_ids: pa.Array, words_NW: np.ndarray, rank_N: np.ndarray
) -> Iterator[tuple[pa.Array, np.ndarray]]:
    for first in range(0, len(item_ids), _BLOCK):
        block = slice(first, first + _BLOCK)
        digits_NL = np.column_stack([spec.unpack(words_NW[block]), rank_N[block]])
        yield item_ids[block], longer.pack(digits_NL)
