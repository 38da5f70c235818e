"""Semantic IDs in TorchRec: fuse an item's content into one discrete ID, and rank from it.

Public names load when first used, so that the command line starts at once and ``sidrec doctor`` runs even where torch,
torchrec and fbgemm do not match.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

from sidrec_torchrec.environment import check_environment

_PUBLIC: dict[str, str] = {}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


def _is_command_line() -> bool:
    """Whether this process is ``sidrec ...`` or ``python -m sidrec_torchrec.cli ...``."""
    return Path(sys.argv[0]).name == "sidrec" or "sidrec_torchrec.cli" in sys.orig_argv


if not _is_command_line():  # which says it in its own way, after `doctor` has had its chance
    check_environment()
