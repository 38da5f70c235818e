"""Decodes SIDs back into what they keep of each item's sources and targets."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sidrec_torchrec.data.sids import open_sids, read_sids
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.files import atomic_path, check_is_no_input, sha256_of
from sidrec_torchrec.fusion.tokenizer import Decoded, Tokenizer
from sidrec_torchrec.output import show
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.progress import stage

_BLOCK = 8192  # SIDs decoded at once


@dataclass(frozen=True, kw_only=True)
class DecodeSIDsConfig(JobConfig):
    """What to decode.

    Args:
        sids: folder encode-corpus wrote, or the file of one generation.
        tokenizer: folder train-tokenizer wrote; must be the one the SIDs were made with.
        out: Parquet file to write.
        num_digits: decode only this many first digits of each SID; 0 for all.
    """

    sids: Path
    tokenizer: Path
    out: Path
    num_digits: int = 0


def main(config: DecodeSIDsConfig) -> None:
    """Writes ``item_id``, each source as ``fixed_size_list<float>[d]`` and each target's ``NAME_probability`` by class.

    Raises:
        CodecMismatchError: if another codec made the SIDs.
        DataError: if a file is missing or broken.
        SidrecError: if the SIDs have fewer digits than asked for, or ``out`` is their file.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    available = tokenizer.codec.spec.num_digits
    if not 0 <= config.num_digits <= available:
        raise SidrecError(f"num_digits must be 0 to {available}, the digits of these SIDs; got {config.num_digits}")
    check_is_no_input(
        config.out, [part.path for file in open_sids(config.sids).generations for part in file.table.parts]
    )
    item_ids, words_NW = read_sids(config.sids, tokenizer.codec)
    with atomic_path(config.out) as path, stage("decode", len(item_ids), show=True, line=False) as progress:
        writer: pq.ParquetWriter | None = None
        for first in range(0, len(item_ids), _BLOCK):
            words = torch.from_numpy(words_NW[first : first + _BLOCK])
            decoded = tokenizer.decode(words, num_digits=config.num_digits or None)
            table = pa.table({"item_id": item_ids[first : first + _BLOCK]} | dict(_columns(decoded)))
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True)
            writer.write_table(table)
            progress.advance(len(table))
        if writer is not None:
            writer.close()
    show(f"{config.out}: {len(item_ids):,} items, sha256 {sha256_of(config.out)}")


def _columns(decoded: Decoded) -> Iterator[tuple[str, pa.Array]]:
    named = decoded.sources | {f"{target}_probability": p for target, p in decoded.probabilities.items()}
    for name, value_ND in named.items():
        yield name, pa.FixedSizeListArray.from_arrays(pa.array(value_ND.reshape(-1).numpy()), value_ND.shape[1])
