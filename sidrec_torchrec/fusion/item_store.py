"""Items by row, from arrays mapped into memory: for training that meets items as events do."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidrec_torchrec.data.item_arrays import map_rows, row_writer
from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.model import DIGITS, ItemTensors
from sidrec_torchrec.names import escape, unescape

_PARTS = ("sources", "present", "labels", "labelled", "published")


@dataclass(frozen=True)
class ItemStore:
    """All that ``ItemTensors`` hold of every item of a corpus. Made by ``write``, then ``open``.

    Args:
        arrays: by part of ``ItemTensors`` and name, an array [num_items, ...]; several-class labels are uint8.
    """

    arrays: dict[str, dict[str, np.ndarray]]

    @staticmethod
    def write(stream: ItemStream, folder: Path) -> None:
        """Lays out the stream's items under ``folder``, a file each for a part and name, whole or not at all.

        Raises:
            DataError: on bad items; names file, column and row.
        """
        writers: dict[tuple[str, str], Callable[[np.ndarray], object]] = {}
        with atomic_path(folder) as temporary, ExitStack() as files:
            for part in _PARTS:
                (temporary / part).mkdir(parents=True)
            for _, block in stream.blocks():
                for (part, name), values in _plain(block).items():
                    if (part, name) not in writers:
                        shape = (stream.items.num_items, *values.shape[1:])
                        writer = row_writer(temporary / part / f"{escape(name)}.npy", shape, values.dtype)
                        writers[part, name] = files.enter_context(writer)
                    writers[part, name](values)

    @staticmethod
    def open(folder: Path) -> "ItemStore":
        """Maps what ``write`` wrote.

        Raises:
            DataError: if a file is broken or cut short.
        """
        paths = {part: sorted((folder / part).glob("*.npy")) for part in _PARTS}
        return ItemStore({part: {unescape(p.stem): map_rows(p) for p in paths[part]} for part in _PARTS})

    def published_rows(self) -> Tensor:
        """Rows of the items that have a published SID, int64."""
        digits = self.arrays["published"].get(DIGITS)
        return (
            torch.zeros(0, dtype=torch.int64) if digits is None else torch.from_numpy(np.flatnonzero(digits[:, 0] >= 0))
        )

    def select(self, rows_N: Tensor) -> ItemTensors:
        """The items of these rows, int64 [N], on the CPU."""
        rows = rows_N.cpu().numpy()
        parts = {
            part: {name: torch.from_numpy(array[rows]) for name, array in arrays.items()}
            for part, arrays in self.arrays.items()
        }
        several = {n: x.float() if x.dtype == torch.uint8 else x for n, x in parts["labels"].items()}
        return ItemTensors(**parts | {"labels": several})


def _plain(block: ItemTensors) -> dict[tuple[str, str], np.ndarray]:
    """By part and name; several-class labels as bytes."""
    plain = {(part, name): value.numpy() for part in _PARTS for name, value in getattr(block, part).items()}
    return {
        key: values.astype(np.uint8) if key[0] == "labels" and values.dtype.kind == "f" else values
        for key, values in plain.items()
    }
