"""Writes the index that finds SIDs by item and items by SID."""

from dataclasses import dataclass
from pathlib import Path

from sidrec_torchrec.data.sid_index import SIDLookup, write_index
from sidrec_torchrec.output import show
from sidrec_torchrec.storage.mirror import bring
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.progress import stage


@dataclass(frozen=True, kw_only=True)
class CodecIndexConfig(JobConfig):
    """What to index.

    Args:
        sids: folder encode-corpus wrote; the index goes into it.
    """

    writes = ("sids",)

    sids: Path


def main(config: CodecIndexConfig) -> None:
    """Writes ``sids.index`` of all generations; see ``write_index``.

    Raises:
        DataError: if the SIDs are missing or broken.
    """
    bring(config.sids)
    with stage("index", None, show=True, line=False):
        path = write_index(config.sids)
    lookup = SIDLookup.open(config.sids, verify=True)
    show(f"{path}: {len(lookup):,} items, {path.stat().st_size / max(len(lookup), 1):.0f} bytes each")
