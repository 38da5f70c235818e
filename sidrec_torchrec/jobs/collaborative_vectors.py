"""Adds to the items a vector each of what users do with them, for tokenizers to predict."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from sidrec_torchrec.data.collaborative import CollaborativeConfig, CollaborativeVectors, collaborative_vectors
from sidrec_torchrec.data.format import ITEMS_FILE
from sidrec_torchrec.data.prepare import open_prepared
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import open_run


@dataclass(frozen=True, kw_only=True)
class CollaborativeVectorsConfig(JobConfig):
    """What to learn from.

    Args:
        data: folder of ``items.parquet``.
        prepared: folder the prepare job wrote from it; its training targets are all that is read of the events.
        out: folder for ``items.parquet`` with the new column.
        column: its name.
        vectors: how they are made.
    """

    data: Path
    prepared: Path
    out: Path
    column: str = "collaborative"
    vectors: CollaborativeConfig = field(default_factory=CollaborativeConfig)

    def files(self) -> list[Path]:
        """The files the vectors are made from."""
        return [self.data / ITEMS_FILE, *open_prepared(self.prepared).files()]


def main(config: CollaborativeVectorsConfig) -> dict[str, Any]:
    """Writes ``out/items.parquet``: the items as they are, and a float32 vector for each that occurs often enough in training.

    Returns:
        ``items`` and ``with_vector``, how many of them have one.

    Raises:
        DataError: if the items are not those of the sequences, or have a column of this name already.
        RunMismatchError: if ``out`` holds another run.
    """
    with process_group() as processes, open_run(config.out, config, inputs=config.files()) as run:
        if run.result is not None:
            return run.result
        prepared = open_prepared(config.prepared)
        prepared.check_items(config.data)
        if config.column in pq.read_schema(config.data / ITEMS_FILE).names:
            raise DataError(
                f"{config.data / ITEMS_FILE}: there is a column '{config.column}' already; rename it, or name another"
            )
        with stage("collaborative vectors", None, show=processes.is_main) as progress:
            vectors = collaborative_vectors(
                prepared, config.vectors, rank=processes.rank, world_size=processes.world_size
            )
            result = {"items": prepared.num_items, "with_vector": int(vectors.present_N.sum())}
            if processes.is_main:
                _write(config, vectors)
            progress.advance(0, f"{result['with_vector']:,} of {result['items']:,} items have one")
        dist.barrier()
        return run.finish(result)


def _write(config: CollaborativeVectorsConfig, vectors: CollaborativeVectors) -> None:
    """The items, a row group at a time, with the new column; whole or not at all."""
    dim = vectors.values_ND.shape[1]
    first = 0
    with (
        pq.ParquetFile(config.data / ITEMS_FILE, page_checksum_verification=True) as file,
        atomic_path(config.out / ITEMS_FILE) as path,
    ):
        schema = file.schema_arrow.append(pa.field(config.column, pa.list_(pa.float32(), dim)))
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                rows = slice(first, first + len(table))
                first += len(table)
                values = pa.array(np.ascontiguousarray(vectors.values_ND[rows]).reshape(-1))
                column = pa.FixedSizeListArray.from_arrays(values, dim, mask=pa.array(~vectors.present_N[rows]))
                writer.write_table(table.append_column(config.column, column).cast(schema))
