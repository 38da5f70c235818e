"""Ids of items and users: integers, text or bytes, kept as the files have them and found exactly.

Within the package a column of ids is a *canonical* Arrow array: int64, uint64, large_string or large_binary. Its *key* is a
number for each id: an integer's own value, a hash of text. Keys spread and sort ids; they never decide that two are the same.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.errors import DataError

ID_TYPES = "integers, strings or bytes (UUIDs)"
_BYTES_AT_ONCE = 1 << 24
_EMPTY = pa.array([], pa.int64())


def id_type(kind: pa.DataType) -> pa.DataType | None:
    """The canonical type of a column of ids; None if it can hold none."""
    while isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_integer(kind):
        return pa.uint64() if kind == pa.uint64() else pa.int64()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return pa.large_binary() if is_bytes or pa.types.is_fixed_size_binary(kind) else None


def canonical(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Ids of any type in one array of their canonical type, nulls and all.

    Raises:
        TypeError: if the column cannot hold ids.
    """
    if isinstance(column, pa.ChunkedArray):
        chunks = [canonical(chunk) for chunk in column.chunks]
        return pa.concat_arrays(chunks) if chunks else pa.array([], id_type(column.type))
    kind = id_type(column.type)
    if kind is None:
        raise TypeError(f"{column.type} cannot hold ids")
    while isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    return column.cast(kind)


def keys(ids: pa.Array) -> np.ndarray:
    """int64 [N], a number for each id: an integer itself (uint64 by its bits), 64 bits of a hash of text or bytes."""
    if pa.types.is_integer(ids.type):
        return ids.to_numpy(zero_copy_only=False).view(np.int64)
    keys_N = np.empty(len(ids), np.uint64)
    step = max(1, _BYTES_AT_ONCE // max(1, pc.max(pc.binary_length(ids)).as_py() or 1))
    for first in range(0, len(ids), step):
        keys_N[first : first + step] = _hash_bytes(ids.slice(first, step))
    return keys_N.view(np.int64)


def seed_of(id_value: int | str | bytes) -> int:
    """A number in [0, 2^63) to seed random draws with, of one id alone."""
    if isinstance(id_value, int):
        return id_value % (1 << 63)
    data = id_value.encode() if isinstance(id_value, str) else id_value
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def split_mix(seed_N: np.ndarray, count: int) -> np.ndarray:
    """The first ``count`` numbers of SplitMix64 (Steele et al. 2014) from each seed, uint64 [N, count] of integers [N]."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = seed_N.astype(np.uint64)[:, np.newaxis] + steps
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shown(ids: pa.Array, place: int) -> str:
    """One id as messages show it."""
    try:
        value = ids[int(place)].as_py()
    except UnicodeDecodeError:
        value = ids.cast(pa.large_binary())[int(place)].as_py()
    return str(value) if isinstance(value, int) else repr(value)


def same_ids(left: pa.Array, right: pa.Array) -> bool:
    """Whether two canonical arrays hold the same ids in the same order."""
    return left.type == right.type and left.equals(right)


class IdIndex:
    """Places of ids, found exactly; holds 16 bytes an id, and text itself.

    Args:
        ids: canonical, N of them; of repeated ones the first is found.
    """

    def __init__(self, ids: pa.Array = _EMPTY) -> None:
        self.ids = ids
        keys_N = keys(ids)
        self._places = np.argsort(keys_N, kind="stable")
        self._keys = keys_N[self._places]

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: pa.Array) -> np.ndarray:
        """Place of each id, int64 [M]; -1 where it is not here, or null.

        Raises:
            TypeError: if ids of one are numbers and of the other are not.
        """
        places_M = np.full(len(ids), -1, np.int64)
        if not len(self.ids) or not len(ids):
            return places_M
        is_number = pa.types.is_integer(self.ids.type)
        if is_number != pa.types.is_integer(ids.type):
            raise TypeError(f"ids are {ids.type} here and {self.ids.type} there")
        keys_M = keys(ids.fill_null(0) if is_number and ids.null_count else ids)
        at_M = np.searchsorted(self._keys, keys_M)
        alike = np.flatnonzero(self._keys[np.minimum(at_M, len(self._keys) - 1)] == keys_M)
        if is_number:
            if ids.type != self.ids.type:  # of one bit pattern, but not of one number
                alike = alike[keys_M[alike] >= 0]
            places_M[alike] = self._places[at_M[alike]]
            if ids.null_count:
                places_M[ids.is_null().to_numpy(zero_copy_only=False)] = -1
            return places_M
        given, kept = ids.cast(pa.large_binary()), self.ids.cast(pa.large_binary())
        while len(alike):  # once, unless two ids hash alike
            places = self._places[at_M[alike]]
            is_same = pc.fill_null(pc.equal(given.take(pa.array(alike)), kept.take(pa.array(places))), False)
            is_same_A = is_same.to_numpy(zero_copy_only=False)
            places_M[alike[is_same_A]] = places[is_same_A]
            alike = alike[~is_same_A]
            at_M[alike] += 1
            alike = alike[at_M[alike] < len(self._keys)]
            alike = alike[self._keys[at_M[alike]] == keys_M[alike]]
        return places_M

    def add(self, ids: pa.Array) -> np.ndarray:
        """Place of each id, int64 [M]; those that are not here yet are put behind the others."""
        if not len(self.ids):
            self.ids = ids.slice(0, 0)
        codes = ids.dictionary_encode()
        distinct = codes.dictionary
        places_D = self.find(distinct)
        new = np.flatnonzero(places_D < 0)
        if len(new):
            added = distinct.take(pa.array(new))
            places_D[new] = len(self.ids) + np.arange(len(new))
            keys_A = keys(added)
            order = np.argsort(keys_A, kind="stable")
            at = np.searchsorted(self._keys, keys_A[order], side="right")
            self._keys = np.insert(self._keys, at, keys_A[order])
            self._places = np.insert(self._places, at, places_D[new][order])
            self.ids = pa.concat_arrays([self.ids, added])
        return places_D[codes.indices.to_numpy(zero_copy_only=False)]


def check_unique(ids: pa.Array, where: Callable[[int], str], name: str) -> None:
    """Refuses repeated ids.

    Args:
        ids: canonical.
        where: says file, column and row of a place, for the message.
        name: what the ids are called.

    Raises:
        DataError: names both rows of the first repeat.
    """
    codes_N = keys(ids)
    if not pa.types.is_integer(ids.type) and len(np.unique(codes_N)) < len(codes_N):
        codes_N = ids.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes_N, kind="stable")
    repeats = np.flatnonzero(codes_N[order[1:]] == codes_N[order[:-1]])
    if repeats.size:
        first = repeats[np.argmin(order[repeats + 1])]
        raise DataError(
            f"{where(int(order[first + 1]))}: {name} {shown(ids, order[first])} is already in row {order[first]}; ids must "
            f"be unique ({repeats.size} repeats in all)"
        )


def _hash_bytes(ids: pa.Array) -> np.ndarray:
    """uint64 [N]: 8 bytes after another, each mixed in by a multiplication; zero bytes behind an id's end count as length."""
    lengths_N = pc.fill_null(pc.binary_length(ids), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    width = max(1, int(lengths_N.max(initial=0) + 7) // 8)
    padded_NB = np.zeros((len(ids), 8 * width), np.uint8)
    _, offset_buffer, data = ids.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    content = np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]] if data is not None else np.empty(0, np.uint8)
    if (np.diff(offsets) == lengths_N).all():
        padded_NB[np.arange(8 * width) < lengths_N[:, None]] = content
    else:  # nulls over bytes
        for place, value in enumerate(ids.cast(pa.large_binary()).to_pylist()):
            padded_NB[place, : lengths_N[place]] = np.frombuffer(value or b"", np.uint8)
    words_NW = padded_NB.view("<u8")
    hash_N = lengths_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for word in range(width):
        mixed_N = (hash_N ^ words_NW[:, word]) * np.uint64(0xBF58476D1CE4E5B9)
        mixed_N ^= mixed_N >> np.uint64(29)
        # an id's hash does not depend on how long the others are
        hash_N = np.where(8 * word < lengths_N, mixed_N, hash_N) if word else mixed_N
    return hash_N


def mixed_types(where: object, here: pa.DataType, other: object, there: pa.DataType) -> DataError:
    """The error of ids that are numbers in one place and text in another."""
    return DataError(f"{where}: ids are {here}, in {other} they are {there}; write both with one type")


def as_ids(values: Any) -> pa.Array:
    """Ids given as a numpy array, a list or an Arrow array, canonical."""
    return canonical(values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values))
