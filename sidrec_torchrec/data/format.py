"""The input format: ``items.parquet``, ``events.parquet`` and, optionally, ``users.parquet`` in one folder.

docs/data.md describes the columns; each file has a reader that checks what it reads and holds one batch in memory.
"""

from pathlib import Path

from sidrec_torchrec.data.events import (
    EVENTS_FILE,
    USERS_FILE,
    EventBatch,
    Events,
    UserBatch,
    Users,
    open_events,
    open_users,
)
from sidrec_torchrec.data.items import ITEMS_FILE, ItemBatch, Items, open_items
from sidrec_torchrec.data.validate import validate
from sidrec_torchrec.data.vocabulary import MAX_CLASSES, Vocabulary, scan_vocabularies

__all__ = [
    "EVENTS_FILE",
    "ITEMS_FILE",
    "MAX_CLASSES",
    "USERS_FILE",
    "EventBatch",
    "Events",
    "ItemBatch",
    "Items",
    "UserBatch",
    "Users",
    "Vocabulary",
    "data_files",
    "open_events",
    "open_items",
    "open_users",
    "scan_vocabularies",
    "validate",
]


def data_files(folder: Path) -> list[Path]:
    """The files of a data folder, of which users need not be there."""
    return [Path(folder) / name for name in (ITEMS_FILE, EVENTS_FILE, USERS_FILE)]
