"""Splits event logs into training, validation and test sequences."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.format import DataConfig
from sidrec_torchrec.data.prepare import SEQUENCES, PrepareConfig, prepare
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import open_run


@dataclass(frozen=True, kw_only=True)
class PrepareJobConfig(DataConfig):
    """What to split, and how.

    Args:
        data: folder of ``items.parquet``, ``events.parquet`` and, optionally, ``users.parquet``.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
        out: folder for the sequences.
        protocol: which events train, validate and test.
    """

    out: Path
    protocol: PrepareConfig = field(default_factory=PrepareConfig)

    def files(self) -> list[Path]:
        """The files the sequences are made from."""
        return self.folder.files()


def main(config: PrepareJobConfig) -> dict[str, Any]:
    """Writes the sequences; one process works, the others wait. Returns counts by split.

    Raises:
        DataError: on bad data; names file, column and row.
        RunMismatchError: if ``out`` holds sequences of another protocol or other data.
    """
    with process_group(), open_run(config.out, config, inputs=config.files()) as run:
        return run.result or run.finish(on_first_process(lambda: _prepare(config)))


def _prepare(config: PrepareJobConfig) -> dict[str, Any]:
    with stage("prepare sequences", None, show=True) as progress:
        counts = prepare(config.folder, config.out / SEQUENCES, config.protocol).counts
        progress.advance(0, ", ".join(f"{s} {c['targets']:,} targets" for s, c in counts.items()))
    return dict(counts)
