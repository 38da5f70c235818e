"""``sids.parquet``: the packed SID of every item, marked with the codec that made it."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.codec.alphabet import format_stages, parse_stages
from sidrec_torchrec.codec.codec import CODEC_FILES, CODEC_FOLDER, Codec
from sidrec_torchrec.codec.packing import SIDSpec, word_names
from sidrec_torchrec.data.ids import as_ids, id_type
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path

SIDS_FILE = "sids.parquet"
_INT64 = pa.int64()
_FINGERPRINT, _STAGES = b"sidrec.fingerprint", b"sidrec.stages"


def write_sids(
    path: Path,
    spec: SIDSpec,
    batches: Iterable[tuple[pa.Array | np.ndarray, np.ndarray]],
    id_type: pa.DataType = _INT64,
) -> None:
    """Writes item ids, canonical [N] of ``id_type``, and packed SIDs, int64 [N, W], batch by batch; the whole file or none."""
    names = word_names("sid", spec.num_words)
    metadata = {_FINGERPRINT: spec.fingerprint, _STAGES: format_stages(spec.stages)}
    schema = pa.schema([("item_id", id_type), *((name, pa.int64()) for name in names)], metadata=metadata)
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for item_ids, words_NW in batches:
            writer.write_batch(
                pa.RecordBatch.from_arrays([as_ids(item_ids), *map(pa.array, words_NW.T)], schema=schema)
            )


def join_sids(parts: Iterable[Path], path: Path) -> None:
    """Joins SID files of one codec, in order, row group by row group; the whole file or none."""
    with atomic_path(path) as temporary, ExitStack() as stack:
        writer = None
        for part in parts:
            with pq.ParquetFile(part, page_checksum_verification=True) as file:
                if writer is None:
                    writer = stack.enter_context(
                        pq.ParquetWriter(temporary, file.schema_arrow, compression="zstd", write_page_checksum=True)
                    )
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))


def sid_files(folders: Iterable[Path]) -> list[Path]:
    """The files of folders that encode-corpus wrote: SIDs, and the codec that decodes them."""
    return [Path(f) / name for f in folders for name in (SIDS_FILE, *(f"{CODEC_FOLDER}/{n}" for n in CODEC_FILES))]


@dataclass(frozen=True)
class SIDFile:
    """An opened SID file. Made by ``open_sids``.

    Args:
        table: the Parquet file.
        spec: digits and fingerprint, as the file itself tells them.
    """

    table: ParquetTable
    spec: SIDSpec

    @property
    def path(self) -> Path:
        return self.table.path

    @property
    def num_items(self) -> int:
        return self.table.num_rows

    @property
    def id_type(self) -> pa.DataType:
        """Canonical type of its item ids."""
        kind = id_type(self.table.schema.field("item_id").type)
        assert kind is not None  # it was checked when the file was opened
        return kind

    def batches(self, batch_size: int = 1 << 16) -> Iterator[tuple[pa.Array, np.ndarray]]:
        """Item ids, canonical [N], and packed SIDs, int64 [N, W], in file order, holding one batch in memory.

        Raises:
            DataError: on a null, or a word that is no packed SID of ``spec``; names the row.
        """
        names = word_names("sid", self.spec.num_words)
        for first_row, batch in self.table.batches(["item_id", *names], batch_size):
            words_NW = np.stack([self.table.int64(batch, name, first_row) for name in names], axis=1)
            try:
                self.spec.check_words(words_NW, may_miss=False)
            except ValueError as error:
                raise DataError(f"{self.path}: from row {first_row} on, {error}; encode the corpus again") from None
            yield self.table.ids(batch, "item_id", first_row), words_NW

    def read(self) -> tuple[pa.Array, np.ndarray]:
        """Item ids, canonical [N], and packed SIDs, int64 [N, W], of the whole file, in its order.

        Raises:
            DataError: as ``batches``, and on a repeated item_id; names the rows.
        """
        return self.table.read_unique_ids("item_id"), np.concatenate([words_NW for _, words_NW in self.batches()])


def open_sids(path: str | Path) -> SIDFile:
    """Opens a SID file, whatever codec made it; nothing but the schema is read yet.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        DataError: if the file is missing, broken, empty or no SID file.
    """
    path = Path(path)
    path = path / SIDS_FILE if path.is_dir() else path
    if not path.exists():
        raise DataError(f"{path}: not found; run encode-corpus first")
    table = ParquetTable.open(path)
    metadata = table.schema.metadata or {}
    if _FINGERPRINT not in metadata or _STAGES not in metadata:
        raise DataError(f"{path}: does not say which codec made it; write SIDs with encode-corpus")
    try:
        spec = SIDSpec(parse_stages(metadata[_STAGES].decode()), metadata[_FINGERPRINT].decode())
    except ValueError as error:
        raise DataError(f"{path}: {error}; a newer version of sidrec_torchrec may read it") from None
    for name in ("item_id", *word_names("sid", spec.num_words)):
        if name not in table.schema.names:
            raise DataError(f"{path}: no column '{name}'; encode the corpus again")
        (table.require_ids if name == "item_id" else table.require_int64)(name)
    return SIDFile(table, spec)


def read_sids(path: str | Path, codec: Codec) -> tuple[pa.Array, np.ndarray]:
    """Item ids, canonical [N], and packed SIDs, int64 [N, W], in file order.

    Args:
        path: the file, or the folder that holds it.
        codec: that must have made them.

    Raises:
        DataError: if the file is missing, broken or no SID file.
        CodecMismatchError: if another codec made it.
    """
    file = open_sids(path)
    codec.check(file.spec.fingerprint, str(file.path))
    return file.read()
