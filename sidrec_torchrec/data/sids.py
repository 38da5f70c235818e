"""The packed SID of every item, marked with the codec that made it: ``sids.parquet``, and a file for each generation after it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.codec.alphabet import format_stages, parse_stages
from sidrec_torchrec.codec.codec import CODEC_FILES, CODEC_FOLDER, Codec
from sidrec_torchrec.codec.packing import SIDSpec, word_names
from sidrec_torchrec.data.fingerprint import files_fingerprint
from sidrec_torchrec.data.ids import as_ids, check_unique, id_type
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.parts import find_files
from sidrec_torchrec.data.sid_manifest import MANIFEST_FILE, SIDS_FILE, Generation, Manifest
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path, sha256_of
from sidrec_torchrec.part_files import is_of_parts
from sidrec_torchrec.storage.mirror import local

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


def sid_files(folders: Iterable[Path]) -> list[Path]:
    """The files of folders that encode-corpus wrote: SIDs, generation by generation, and the codec that decodes them.

    Raises:
        DataError: if a manifest is broken.
    """
    files = []
    for folder in map(Path, folders):
        manifest = Manifest.read(folder)
        names = [generation.file for generation in manifest.generations] if manifest else [SIDS_FILE]
        for path in (folder / name for name in names):
            files += find_files(path) if path.is_dir() else [path]
        files += [folder / CODEC_FOLDER / name for name in CODEC_FILES]
    return files


@dataclass(frozen=True)
class SIDFile:
    """The SIDs of one generation. Opened by ``open_sids``.

    Args:
        table: the Parquet file, or its parts.
        spec: digits and fingerprint, as the file itself tells them.
        generation: what the manifest says of it; None where there is none.
    """

    table: ParquetTable
    spec: SIDSpec
    generation: Generation | None = None

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
            DataError: if the file is not the one that was published; on a null, or a word that is no packed SID of ``spec``:
                names the row.
        """
        self.verify()
        names = word_names("sid", self.spec.num_words)
        for first_row, batch in self.table.batches(["item_id", *names], batch_size):
            words_NW = np.stack([self.table.int64(batch, name, first_row) for name in names], axis=1)
            try:
                self.spec.check_words(words_NW, may_miss=False)
            except ValueError as error:
                raise DataError(f"{self.path}: from row {first_row} on, {error}; encode the corpus again") from None
            yield self.table.ids(batch, "item_id", first_row), words_NW

    def read(self) -> tuple[pa.Array, np.ndarray]:
        """Item ids, canonical [N], and packed SIDs, int64 [N, W], in file order; raises as ``batches``."""
        ids, words = zip(*self.batches(), strict=True)
        return pa.concat_arrays(ids), np.concatenate(words)

    def verify(self) -> None:
        """Raises DataError unless the file is the one that was published, by its checksum."""
        if self.generation is not None and sha256_of(self.path) != self.generation.sha256:
            raise DataError(
                f"{self.path}: not the file that was published, by its checksum in {MANIFEST_FILE}; restore it, or encode the "
                "corpus again into another folder"
            )


@dataclass(frozen=True)
class SIDs:
    """The published SIDs of a corpus, one generation after another. Made by ``open_sids``.

    Args:
        path: what errors call them: the file, if there is one generation, else the folder.
        spec: digits and fingerprint, the same in all generations.
        generations: at least one.
        manifest: None for a file by itself, and for a folder of an earlier version, which wrote none.
    """

    path: Path
    spec: SIDSpec
    generations: tuple[SIDFile, ...]
    manifest: Manifest | None = None

    @property
    def num_items(self) -> int:
        return sum(file.num_items for file in self.generations)

    @property
    def id_type(self) -> pa.DataType:
        """Canonical type of the item ids."""
        return self.generations[0].id_type

    @cached_property
    def identity(self) -> str:
        """16 hex digits that tell these SIDs from others: of other generations, another codec or other items."""
        if self.manifest is not None:
            return self.manifest.identity
        return files_fingerprint([part.path for file in self.generations for part in file.table.parts])

    def batches(self, batch_size: int = 1 << 16) -> Iterator[tuple[pa.Array, np.ndarray]]:
        """Item ids, canonical [N], and packed SIDs, int64 [N, W], in the order they were published; see ``SIDFile.batches``."""
        for file in self.generations:
            yield from file.batches(batch_size)

    def read(self) -> tuple[pa.Array, np.ndarray]:
        """Item ids, canonical [N], and packed SIDs, int64 [N, W], in the order they were published.

        Raises:
            DataError: as ``batches``, and on a repeated item_id; names the rows.
        """
        ids, words = zip(*self.batches(), strict=True)
        every = pa.concat_arrays(ids)
        check_unique(every, lambda row: f"{self.path}: column 'item_id', row {row}", "item_id")
        return every, np.concatenate(words)


def open_sids(path: str | Path) -> SIDs:
    """Opens SIDs, whatever codec made them, all published generations; nothing but manifest and schemas is read yet.

    Args:
        path: the folder that holds them; or the file, or folder of parts, of one generation, for that alone.

    Raises:
        DataError: if a file is missing, broken, empty, no SID file or not as the manifest has it.
    """
    path = local(path)
    if not path.is_dir() or is_of_parts(path):
        return _alone(_open_file(path))
    manifest = Manifest.read(path)
    if manifest is None:
        _check_first_alone(path)
        return _alone(_open_file(path / SIDS_FILE))
    files = tuple(_open_file(path / generation.file, generation) for generation in manifest.generations)
    for file, generation in zip(files, manifest.generations, strict=True):
        if file.spec != manifest.spec or file.num_items != generation.rows or file.id_type != files[0].id_type:
            raise DataError(
                f"{file.path}: holds {file.num_items:,} SIDs of codec {file.spec.fingerprint} by {file.id_type} ids, "
                f"{MANIFEST_FILE} says {generation.rows:,} of codec {manifest.spec.fingerprint} by {files[0].id_type} ids; "
                "restore both, or encode the corpus again into another folder"
            )
    return SIDs(files[0].path if len(files) == 1 else path, manifest.spec, files, manifest)


def published(folder: Path) -> Manifest:
    """The manifest of a folder of SIDs; made up for one of an earlier version, which wrote none.

    Raises:
        DataError: as ``open_sids``.
    """
    sids = open_sids(folder)
    if sids.manifest is not None:
        return sids.manifest
    return Manifest(sids.spec, (Generation.of(sids.path, created=""),))


def _alone(file: SIDFile) -> SIDs:
    return SIDs(file.path, file.spec, (file,))


def _check_first_alone(folder: Path) -> None:
    """A folder without a manifest holds one generation, as earlier versions wrote it, or has lost the manifest."""
    later = sorted(file.name for file in folder.glob("sids-*.parquet"))
    if later:
        raise DataError(
            f"{folder}: holds {later[0]}, but no {MANIFEST_FILE} to say whether it was published; restore it"
        )


def _open_file(path: Path, generation: Generation | None = None) -> SIDFile:
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
    return SIDFile(table, spec, generation)


def read_sids(path: str | Path, codec: Codec) -> tuple[pa.Array, np.ndarray]:
    """Item ids, canonical [N], and packed SIDs, int64 [N, W], in the order they were published.

    Args:
        path: as ``open_sids`` takes it.
        codec: that must have made them.

    Raises:
        DataError: if a file is missing, broken or no SID file, or an item_id is there twice.
        CodecMismatchError: if another codec made them.
    """
    sids = open_sids(path)
    codec.check(sids.spec.fingerprint, str(sids.path))
    return sids.read()
