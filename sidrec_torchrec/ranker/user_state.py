"""What is kept of users: all that a ranker needs of their events and that does not depend on the candidate. Needs no TorchRec."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidrec_torchrec.errors import CodecMismatchError, DataError

FORMAT = 1
_MAGIC = b"SIDU"
_HEADER = np.dtype([("magic", "S4"), ("format", "<u4"), ("codec", "S16"), ("weights", "S16")])
DTYPES = {
    "mass_BVKH": torch.float32,
    "lse_BKH": torch.float64,
    "count_B": torch.int64,
    "labels_B2T": torch.int64,
    "last_time_B": torch.int64,
}
"""Of the tensors of states."""
STATE_INPUTS: dict[str, tuple[str, ...]] = {
    "mass_BVKH": ("requests", "values", "learned queries", "heads"),
    "lse_BKH": ("requests", "learned queries", "heads"),
    "count_B": ("requests",),
    "labels_B2T": ("requests", "negatives, positives", "tasks"),
    "last_time_B": ("requests",),
}
"""The tensors of states, in the order in which programs take and give them, and the sizes of each."""


@dataclass(frozen=True)
class StateLayout:
    """Whose states they are, and their sizes. ``vars`` of it is a JSON value, and its arguments.

    Args:
        codec: fingerprint of the codec of the events' SIDs, 16 characters at most.
        weights: fingerprint of the weights that masses depend on, 16 characters at most: a ranker that was trained again,
            on the same SIDs, cannot read the states of the one before.
        values: V, of all digits, actions and features.
        queries: K, learned.
        heads: H.
        tasks: T.

    Raises:
        ValueError: on a longer fingerprint, which would not be told from another.
    """

    codec: str
    weights: str
    values: int
    queries: int
    heads: int
    tasks: int

    def __post_init__(self) -> None:
        for name in ("codec", "weights"):
            if len(getattr(self, name).encode()) > 16:
                raise ValueError(f"a fingerprint of the {name} has at most 16 bytes, got '{getattr(self, name)}'")

    @property
    def sizes(self) -> dict[str, int]:
        """By the names that shapes of inputs have; see ``shapes``."""
        return {
            "values": self.values,
            "learned queries": self.queries,
            "heads": self.heads,
            "negatives, positives": 2,
            "tasks": self.tasks,
        }

    @property
    def num_bytes(self) -> int:
        """Of a user's row: 4 per value of a digit, action or feature, learned query and head, and little else."""
        return self._row.itemsize

    @property
    def header(self) -> bytes:
        """How a row begins: what it is, its format, whose it is; 40 bytes."""
        return np.array((_MAGIC, FORMAT, self.codec.encode(), self.weights.encode()), _HEADER).tobytes()

    def check(self, header: bytes, where: str) -> None:
        """Refuses what begins otherwise.

        Args:
            header: 40 bytes.
            where: what begins so, for the message.

        Raises:
            DataError: if that is no state, or one of another format.
            CodecMismatchError: if it is of another codec or other weights.
        """
        if header == self.header:
            return
        if len(header) != _HEADER.itemsize or header[:4] != _MAGIC:
            raise DataError(f"{where}: not a user's state")
        _, number, codec, weights = np.frombuffer(header, _HEADER)[0].tolist()
        if number != FORMAT:
            raise DataError(f"{where}: a state of format {number}, this version reads {FORMAT}; make it again")
        if codec.decode() != self.codec:
            raise CodecMismatchError(
                f"{where}: another codec's state: of {codec.decode()}, but this ranker reads SIDs of {self.codec}; make "
                "it again from the user's events"
            )
        raise CodecMismatchError(
            f"{where}: another ranker's state: of weights {weights.decode()}, but this ranker has {self.weights}; make it "
            "again from the user's events"
        )

    def shapes(self, B: int) -> dict[str, tuple[int, ...]]:
        """Of each tensor, for B users."""
        sizes = {"requests": B, **self.sizes}
        return {name: tuple(sizes[size] for size in shape) for name, shape in STATE_INPUTS.items()}

    @property
    def _row(self) -> np.dtype:
        kinds = {torch.float32: "<f4", torch.float64: "<f8", torch.int64: "<i8"}
        columns = [(name, kinds[DTYPES[name]], shape[1:]) for name, shape in self.shapes(0).items()]
        return np.dtype([("header", f"V{_HEADER.itemsize}"), *columns])


@dataclass(frozen=True)
class UserStates:
    """What is kept of B users.

    Args:
        layout: whose states they are.
        mass_BVKH: float32, how much weight each learned query and head gives to each value of each digit, action and feature.
        lse_BKH: float64, the logarithm of the softmax's denominator, -inf without events. In float32, of ten thousand events
            the next would change little more than the last bits.
        count_B: int64, events.
        labels_B2T: int64, negatives and positives among them, of each of T tasks.
        last_time_B: int64, of the newest event; 0 without events.

    Raises:
        DataError: on a tensor of another dtype or shape; names it.
    """

    layout: StateLayout
    mass_BVKH: Tensor
    lse_BKH: Tensor
    count_B: Tensor
    labels_B2T: Tensor
    last_time_B: Tensor

    def __post_init__(self) -> None:
        shapes = self.layout.shapes(len(self))
        for name, tensor in zip(DTYPES, self.tensors, strict=True):
            if tensor.dtype != DTYPES[name] or tuple(tensor.shape) != shapes[name]:
                raise DataError(
                    f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {DTYPES[name]} of shape "
                    f"{shapes[name]}"
                )

    def __len__(self) -> int:
        """B."""
        return self.count_B.shape[0] if self.count_B.ndim else 0

    @staticmethod
    def new(layout: StateLayout, B: int, device: torch.device | None = None) -> "UserStates":
        """Those of B users without events."""
        tensors = {
            name: torch.zeros(shape, dtype=DTYPES[name], device=device) for name, shape in layout.shapes(B).items()
        }
        tensors["lse_BKH"].fill_(-torch.inf)
        return UserStates(layout, *tensors.values())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of ``STATE_INPUTS``, as programs take them."""
        return self.mass_BVKH, self.lse_BKH, self.count_B, self.labels_B2T, self.last_time_B

    def to_dict(self) -> dict[str, Tensor]:
        """The tensors by name, and what they are: ``header``, uint8 [40]."""
        header = torch.frombuffer(bytearray(self.layout.header), dtype=torch.uint8)
        return {"header": header, **dict(zip(DTYPES, self.tensors, strict=True))}

    @staticmethod
    def from_dict(tensors: Mapping[str, Tensor], layout: StateLayout) -> "UserStates":
        """What ``to_dict`` gave.

        Args:
            tensors: by name.
            layout: of the ranker that is to read them.

        Raises:
            DataError: on missing or unknown tensors, another dtype, shape or format.
            CodecMismatchError: on states of another codec, or a ranker with other weights.
        """
        wrong = sorted(tensors.keys() ^ {"header", *DTYPES})
        if wrong:
            raise DataError(f"missing or unknown tensors: {', '.join(wrong)}; a state has header, {', '.join(DTYPES)}")
        layout.check(tensors["header"].cpu().numpy().tobytes(), "these tensors")
        return UserStates(layout, *(tensors[name] for name in DTYPES))

    def to_rows(self) -> np.ndarray:
        """A row of bytes per user, uint8 [B, layout.num_bytes], of which each can be stored and read alone."""
        records = np.zeros(len(self), self.layout._row)
        records["header"] = np.void(self.layout.header)
        for name, tensor in zip(DTYPES, self.tensors, strict=True):
            records[name] = tensor.detach().cpu().numpy()
        return records.view(np.uint8).reshape(len(self), -1 if len(self) else self.layout.num_bytes)

    @staticmethod
    def from_rows(rows: Iterable[Any], layout: StateLayout) -> "UserStates":
        """The states of users whose rows these are, in this order.

        Args:
            rows: of each user the bytes, or uint8 array, that was one of ``to_rows``.
            layout: of the ranker that is to read them.

        Raises:
            DataError: on a row that is no state, cut short, or of another format; names its place.
            CodecMismatchError: on a state of another codec, or of a ranker with other weights.
        """
        parts = [bytes(row) for row in rows]
        for b, part in enumerate(parts):
            layout.check(part[: _HEADER.itemsize], f"row {b}")
            if len(part) != layout.num_bytes:
                raise DataError(f"row {b} has {len(part)} bytes, expected {layout.num_bytes}")
        records = np.frombuffer(b"".join(parts), layout._row)
        native = (records[name].astype(records[name].dtype.newbyteorder("=")) for name in DTYPES)
        return UserStates(layout, *(torch.from_numpy(column) for column in native))
