"""``manifest.json``: which files of a folder hold published SIDs, generation by generation.

A generation is the SIDs of the items that one run encoded: a file or, where they are many, a folder of part files by the same name,
which readers of Parquet take for one. It is written first and the manifest last, so that whoever goes by the manifest sees
whole generations only, and one that no manifest lists was never published.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.parts import find_files
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import read_object, remove, sha256_of, write_json
from sidrec_torchrec.part_files import open_parquet

MANIFEST_FILE = "manifest.json"
SIDS_FILE = "sids.parquet"  # of generation 0
_FORMAT = 1


def generation_file(number: int) -> str:
    """Name of a generation's file."""
    return SIDS_FILE if number == 0 else f"sids-{number:05}.parquet"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one run published.

    Args:
        file: name of its SID file, or of the folder of its parts.
        rows: SIDs in it.
        sha256: of the file, or of all parts, in hex.
        created: when it was published, ISO 8601 in UTC.
        tokenizer: the folder that encoded it; empty where that is not known.
        made_of: sha256 of the generation it was made of, where SIDs were made of other SIDs; else empty.
        report: what the run found out, a JSON value.
    """

    file: str
    rows: int
    sha256: str
    created: str
    tokenizer: str = ""
    made_of: str = ""
    report: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(path: Path, **known: Any) -> "Generation":
        """A generation whose file, or parts, have been written; ``known`` are the other fields."""
        rows = sum(_rows(part) for part in find_files(path))
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Generation(file=path.name, rows=rows, sha256=sha256_of(path), **{"created": now} | known)


def _rows(part: Path) -> int:
    with open_parquet(part) as file:
        return file.metadata.num_rows


@dataclass(frozen=True)
class Manifest:
    """The published generations of a folder, in order.

    Args:
        spec: of all their SIDs.
        generations: at least one.
        capacity: most items of a SID, where more were moved to others; 0 where SIDs are as the tokenizer gave them.
    """

    spec: SIDSpec
    generations: tuple[Generation, ...]
    capacity: int = 0

    @staticmethod
    def read(folder: Path) -> "Manifest | None":
        """The manifest of a folder; None if there is none.

        Raises:
            DataError: if it is broken, or of a newer format than this version reads.
        """
        path = Path(folder) / MANIFEST_FILE
        if not path.is_file():
            return None
        value = read_object(path)
        try:
            number = value["format"]
            if number > _FORMAT:
                raise DataError(
                    f"{path}: of format {number}, but this version of sidrec_torchrec reads formats up to {_FORMAT}; install "
                    "a newer one"
                )
            generations = tuple(Generation(**generation) for generation in value["generations"])
            if not generations or [generation.file for generation in generations] != [
                generation_file(n) for n in range(len(generations))
            ]:
                raise ValueError("generations are missing, or in another order")
            return Manifest(SIDSpec.from_json(value), generations, value["capacity"])
        except DataError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not a manifest of SIDs, or a broken one ({error}); encode the corpus again"
            ) from error

    def write(self, folder: Path) -> None:
        """Publishes the generations, all at once: readers see those before, or these."""
        value = {"format": _FORMAT, **self.spec.to_json(), "capacity": self.capacity}
        write_json(
            Path(folder) / MANIFEST_FILE, value | {"generations": [asdict(g) for g in self.generations]}, sealed=True
        )

    def followed_by(self, generation: Generation) -> "Manifest":
        """With one generation more."""
        return replace(self, generations=(*self.generations, generation))

    @property
    def identity(self) -> str:
        """16 hex digits that tell these generations, their order and their codec from any others."""
        told = [self.spec.to_json(), [generation.sha256 for generation in self.generations]]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def remove_unpublished(folder: Path, manifest: Manifest) -> None:
    """Removes SIDs that a killed run left unlisted; only for the one process that writes into the folder."""
    listed = {generation.file for generation in manifest.generations}
    for path in Path(folder).glob("sids*.parquet"):
        if path.name not in listed:
            remove(path)
