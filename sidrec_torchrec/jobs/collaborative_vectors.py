"""Adds to the items a vector each of what users do with them, for tokenizers to predict."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from sidrec_torchrec.data.collaborative import CollaborativeConfig, CollaborativeVectors, collaborative_vectors
from sidrec_torchrec.data.columns import vector_lists
from sidrec_torchrec.data.format import ITEMS_FILE, DataConfig, Items, open_items
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path, list_files
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import open_run

_BATCH = 1 << 16  # rows of a row group that is written


@dataclass(frozen=True, kw_only=True)
class CollaborativeVectorsConfig(DataConfig):
    """What to learn from.

    Args:
        data: folder of ``items.parquet``.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
        prepared: folder the prepare job wrote from it; its training targets are all that is read of the events.
        out: folder for ``items.parquet`` with the new column.
        column: its name.
        vectors: how they are made.
    """

    prepared: Path
    out: Path
    column: str = "collaborative"
    vectors: CollaborativeConfig = field(default_factory=CollaborativeConfig)

    def files(self) -> list[Path]:
        """The files the vectors are made from."""
        return [*self.folder.files("items"), *open_prepared(self.prepared).files()]


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
        prepared.check_items(config.folder)
        items = open_items(config.folder, targets=())
        if config.column in (*items.table.schema.names, *items.joined):
            raise DataError(f"{items.path}: there is a column '{config.column}' already; rename it, or name another")
        with stage("collaborative vectors", None, show=processes.is_main) as progress:
            vectors = collaborative_vectors(
                prepared, config.vectors, rank=processes.rank, world_size=processes.world_size
            )
            result = {"items": prepared.num_items, "with_vector": int(vectors.present_N.sum())}
            if processes.is_main:
                _write(config, items, vectors)
                list_files(config.out)
            progress.advance(0, f"{result['with_vector']:,} of {result['items']:,} items have one")
        dist.barrier()
        return run.finish(result)


def _write(config: CollaborativeVectorsConfig, items: Items, vectors: CollaborativeVectors) -> None:
    """The items under our names, a batch at a time, with the new column and those of a second file; whole or not at all."""
    table = items.table
    new = {**items.joined, config.column: vectors.values_ND}
    fields = [pa.field(name, pa.list_(pa.float32())) for name in new]
    schema = pa.schema([*table.schema, *fields])
    with (
        atomic_path(config.out / ITEMS_FILE) as path,
        pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for first, batch in table.batches(table.schema.names, _BATCH):
            rows = slice(first, first + len(batch))
            arrays = [array.cast(field.type) for field, array in zip(table.schema, batch.columns, strict=True)]
            for name, values_ND in new.items():
                x_ND = np.asarray(values_ND[rows])
                is_there_N = vectors.present_N[rows] if name == config.column else np.any(x_ND, axis=1)
                arrays.append(vector_lists(x_ND, is_there_N))
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
