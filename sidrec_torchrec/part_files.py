"""Parquet that is made part by part: a run that was killed goes on from the parts that are whole."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.files import read_object, remove, remove_temporaries, replace_path, write_json
from sidrec_torchrec.storage.mirror import bring, is_stand_in, listed, open_input

_REMOTE_BUFFER_BYTES = 8 << 20  # a request takes as long as some megabytes
_PART = re.compile(r"part-\d{5}\.parquet")


@dataclass(frozen=True)
class PartFiles:
    """Parts beside what they will become. Made by ``PartFiles.of``.

    A part is whole when what is known of it is there, which is written last.

    Args:
        path: of the file, or of the folder of its parts by that name, that they become.
        folder: of the parts until then; its name says what they are made of.
    """

    path: Path
    folder: Path

    @staticmethod
    def of(path: Path, made_of: Any) -> "PartFiles":
        """Parts of ``path``.

        Args:
            path: what they become.
            made_of: a JSON value that tells these parts from those of other inputs or another config.
        """
        digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        return PartFiles(path, path.with_name(f".{path.name}.parts-{digest}"))

    @property
    def scratch(self) -> Path:
        """A folder of this machine for what the parts are made from; it goes when they are what they were to become."""
        return self.folder.with_name(f"{self.folder.name}.scratch.tmp")

    def begin(self) -> None:
        """Removes parts that are made of something else, and halves of these; for one process, before any writes."""
        for other in listed(self.path.parent, f".{self.path.name}.parts-*"):
            if other not in (self.folder, self.scratch):
                remove(other)
            elif other.is_dir():  # here, and not at its URL alone
                remove_temporaries(other)

    @contextmanager
    def writing(self, part: int) -> Iterator[Path]:
        """Yields where a part is to be written, whole or not at all; where that fails, nothing is left that is of no use."""
        try:
            yield part_path(self.folder, part)
        except BaseException:
            self._drop(part)
            raise

    def known(self, part: int) -> dict[str, Any] | None:
        """What ``finish`` was told of a part; None if it is not whole yet."""
        path = bring(self._known_file(part))
        return read_object(path) if path.exists() else None

    def finish(self, part: int, known: dict[str, Any]) -> None:
        """Notes that a part has been written, and what is known of it."""
        try:
            write_json(self._known_file(part), known, sealed=True)
        except BaseException:
            self._drop(part)
            raise

    def join(self, count: int) -> None:
        """Makes the parts what they were to become: a file of one part, or a folder of several; for one process, when all are whole."""
        for part in range(count):
            bring(part_path(self.folder, part))  # of another process, perhaps of another machine
            remove(self._known_file(part))
        remove_temporaries(self.folder)  # of a killed run's process that lived on for a moment
        if count > 1 and not self.path.is_dir():
            remove(self.path)
        replace_path(part_path(self.folder, 0) if count == 1 else self.folder, self.path)
        remove(self.folder)
        remove(self.scratch)

    def _drop(self, part: int) -> None:
        remove(part_path(self.folder, part))
        with suppress(OSError):  # other parts are there
            self.folder.rmdir()

    def _known_file(self, part: int) -> Path:
        return part_path(self.folder, part).with_suffix(".json")


def open_parquet(path: Path, *, buffer_size: int = 0) -> pq.ParquetFile:
    """A Parquet file whose pages are compared with their checksums; what is at a URL is read by ranges.

    Args:
        path: the file.
        buffer_size: bytes that a column is read by; 0 for a row group's columns whole.
    """
    if not is_stand_in(path):
        return pq.ParquetFile(path, buffer_size=buffer_size, page_checksum_verification=True)
    return pq.ParquetFile(
        pa.PythonFile(open_input(path), mode="r"),
        buffer_size=buffer_size and max(buffer_size, _REMOTE_BUFFER_BYTES),
        pre_buffer=not buffer_size,  # neighbouring columns by one request
        page_checksum_verification=True,
    )


def part_path(folder: Path, part: int) -> Path:
    """The file of a part."""
    return folder / f"part-{part:05}.parquet"


def is_of_parts(path: Path) -> bool:
    """Whether a folder holds parts and nothing else."""
    names = [file.name for file in path.iterdir()] if path.is_dir() else []
    return bool(names) and all(map(_PART.fullmatch, names))
