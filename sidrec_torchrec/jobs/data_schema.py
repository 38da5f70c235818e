"""Proposes what the files and columns of a data folder are called, and writes it where every job finds it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.format import DataConfig, DataFolder
from sidrec_torchrec.data.propose import propose
from sidrec_torchrec.files import write_json


@dataclass(frozen=True, kw_only=True)
class DataSchemaConfig(DataConfig):
    """What to look at.

    Args:
        data: the data folder.
        schema: what is known of its files and columns; the rest is proposed.
        out: JSON file to write; none given: ``schema.json`` in the data folder, which every job reads. Another one is named
            with ``--schema FILE``.
    """

    out: Path | None = None


def main(config: DataSchemaConfig) -> dict[str, Any]:
    """Prints, writes and returns the schema.

    Raises:
        DataError: if a file is missing or broken, or a column that is needed is not found; lists those there are.
    """
    schema = propose(config.folder)
    path = config.out
    if path is None:
        path = DataFolder(config.data, schema).write_schema()
    else:
        write_json(path, schema.to_json())
    print(f"{path}: {json.dumps(schema.to_json(), indent=2)}")
    return schema.to_json()
