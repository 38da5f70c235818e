"""What an arm costs in bytes: per event in a log, per event in the batch, and in tables of the model."""

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.sequence_files import open_sequences
from sidrec_torchrec.ranker.arms import Arm
from sidrec_torchrec.side.expansion import OfCodec

_SAMPLE_EVENTS = 16_384


def bytes_per_event(arm: Arm, prepared: Prepared) -> dict[str, float]:
    """Bytes an event's item costs, measured on a sample of test events in log order.

    Returns:
        ``bytes_per_event_stored``: in a Parquet file of the arm's columns alone, compressed with zstd. Without
        dictionaries, which would credit an arm for the small number of distinct items of a small corpus.
        ``bytes_per_event_kjt``: in the values of the batch's item KeyedJaggedTensor.
    """
    items: list[np.ndarray] = []
    with open_sequences(prepared.path("test")) as files:
        for group in range(files.num_groups):
            items += [row.item for row in files.rows(group)]
            if sum(map(len, items)) >= _SAMPLE_EVENTS:
                break
    item_N = np.concatenate(items)[:_SAMPLE_EVENTS]
    in_kjt = sum(value.nbytes for value in arm.values(item_N).values())
    return {
        "bytes_per_event_stored": _parquet_bytes(arm.stored(item_N)) / len(item_N),
        "bytes_per_event_kjt": in_kjt / len(item_N),
    }


def table_bytes(model: nn.Module) -> int:
    """Bytes of the item arm's tables and constants in the whole model, over all its processes."""
    ranker: Any = model.module if hasattr(model, "module") else model
    holders = [ranker.items, *(module for module in ranker.head.modules() if isinstance(module, OfCodec))]
    named = [item for holder in holders for item in (dict(holder.named_buffers()) | holder.state_dict()).items()]
    tensors = [value for name, value in named if not name.endswith("fingerprint")]  # a word on the codec, no table
    # size() and dtype also work for a ShardedTensor, whose size is that of all shards together.
    return sum(math.prod(value.size()) * value.dtype.itemsize for value in tensors if hasattr(value, "dtype"))


def _parquet_bytes(columns: dict[str, pa.Array]) -> int:
    if not columns:
        return 0
    with TemporaryDirectory() as folder:
        path = Path(folder) / "events.parquet"
        pq.write_table(pa.table(columns), path, compression="zstd", use_dictionary=False)
        metadata = pq.read_metadata(path)
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        return sum(group.column(j).total_compressed_size for group in groups for j in range(metadata.num_columns))
