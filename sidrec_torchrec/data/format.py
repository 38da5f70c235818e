"""The input format: ``items.parquet``, ``events.parquet`` and, optionally, ``users.parquet`` in one folder.

docs/data.md describes the columns; each file has a reader that checks what it reads and holds one batch in memory.
"""

from sidrec_torchrec.data.events import EventBatch, Events, UserBatch, Users, open_events, open_users
from sidrec_torchrec.data.folder import EVENTS_FILE, ITEMS_FILE, USERS_FILE, DataConfig, DataFolder, DataSchema
from sidrec_torchrec.data.items import ItemBatch, Items, open_items
from sidrec_torchrec.data.validate import validate
from sidrec_torchrec.data.vocabulary import MAX_CLASSES, Vocabulary, scan_vocabularies

__all__ = [
    "EVENTS_FILE",
    "ITEMS_FILE",
    "MAX_CLASSES",
    "USERS_FILE",
    "DataConfig",
    "DataFolder",
    "DataSchema",
    "EventBatch",
    "Events",
    "ItemBatch",
    "Items",
    "UserBatch",
    "Users",
    "Vocabulary",
    "open_events",
    "open_items",
    "open_users",
    "scan_vocabularies",
    "validate",
]
