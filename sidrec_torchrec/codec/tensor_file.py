"""Tensors in one file, as torch keeps them."""

import io
from pathlib import Path
from typing import Any

import torch


def save_tensors(value: Any, path: Path) -> None:
    """Writes what ``torch.load(path, weights_only=True)`` reads: tensors, numbers and text, in dicts, lists and tuples.

    Raises:
        OSError: if it cannot be written, say on a full disk, of which torch itself says ``iostream error``.
    """
    content = io.BytesIO()
    torch.save(value, content)
    path.write_bytes(content.getbuffer())
