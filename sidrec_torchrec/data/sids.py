"""``sids.parquet``: the packed SID of every item, marked with the codec that made it."""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.codec.alphabet import format_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec, word_names
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path

SIDS_FILE = "sids.parquet"
CODEC_FOLDER = "codec"  # beside the file, so that a folder of SIDs decodes by itself
_FINGERPRINT, _STAGES = b"sidrec.fingerprint", b"sidrec.stages"


def write_sids(path: Path, spec: SIDSpec, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes item ids, int64 [N], and packed SIDs, int64 [N, W], batch by batch; the whole file or none."""
    names = word_names("sid", spec.num_words)
    metadata = {_FINGERPRINT: spec.fingerprint, _STAGES: format_stages(spec.stages)}
    schema = pa.schema([(name, pa.int64()) for name in ("item_id", *names)], metadata=metadata)
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for item_ids_N, words_NW in batches:
            writer.write_batch(
                pa.RecordBatch.from_arrays([pa.array(item_ids_N), *map(pa.array, words_NW.T)], schema=schema)
            )


def join_sids(parts: Iterable[Path], path: Path) -> None:
    """Joins SID files of one codec, in order, row group by row group; the whole file or none."""
    with atomic_path(path) as temporary, ExitStack() as stack:
        writer = None
        for part in parts:
            with pq.ParquetFile(part) as file:
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(temporary, file.schema_arrow, compression="zstd"))
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))


def read_sids(path: Path, codec: Codec) -> tuple[np.ndarray, np.ndarray]:
    """Item ids, int64 [N], and packed SIDs, int64 [N, W], in file order.

    Args:
        path: the file, or the folder that holds it.
        codec: that must have made them.

    Raises:
        DataError: if the file is missing, broken or no SID file.
        CodecMismatchError: if another codec made it.
    """
    path = path / SIDS_FILE if path.is_dir() else path
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run encode-corpus first") from None
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file, or a broken one ({error})") from error
    fingerprint = (table.schema.metadata or {}).get(_FINGERPRINT)
    if fingerprint is None:
        raise DataError(f"{path}: says of no codec that made it; write SIDs with encode-corpus")
    codec.check(fingerprint.decode(), str(path))
    names = word_names("sid", codec.spec.num_words)
    for name in ("item_id", *names):
        if name not in table.column_names:
            raise DataError(f"{path}: no column '{name}'; encode the corpus again")
    words_NW = np.stack([table[name].to_numpy() for name in names], axis=1)
    return table["item_id"].to_numpy(), words_NW
