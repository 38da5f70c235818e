"""``sids.index``: the SID of an item and the items of a SID, in one file that any number of processes map into memory.

Eight bytes say what it is, eight how long the JSON header is that follows, which names the arrays that follow it:

- ``id_starts``, ``keys``: a directory of the items by a hash of their id; a key is an integer id itself, else 64 bits of its hash.
  ``id_ends`` and ``id_bytes``, if ids are text or bytes: the ids one after another, and where each ends.
- ``words``: the SID of each item, in that order.
- ``sid_starts``, ``sids``: a directory of the SIDs that occur, by a hash of their words; ``item_starts``, ``items``: the items of each.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.codec.directory import Directory, mix
from sidrec_torchrec.codec.packing import NO_SID, SIDSpec
from sidrec_torchrec.codec.report import PrefixGroups
from sidrec_torchrec.data.ids import as_ids, keys
from sidrec_torchrec.data.sids import SIDs, open_sids
from sidrec_torchrec.errors import CodecMismatchError, DataError, first_line
from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.storage.mirror import local

INDEX_FILE = "sids.index"
_MAGIC, _FORMAT, _ALIGNMENT = b"sidindex", 1, 64
_ID_TYPES = {str(kind): kind for kind in (pa.int64(), pa.uint64(), pa.large_string(), pa.large_binary())}
_PROBE = "the hash of this text tells whether keys are hashed as they were"


@dataclass(frozen=True, eq=False)
class SIDLookup:
    """Finds SIDs by item and items by SID. Made by ``SIDLookup.open``; ``write_index`` writes what it opens.

    Nothing is read before it is asked for, and processes that open one file share its pages. It may be sent to another process,
    which then opens it anew.

    Args:
        folder: of the SIDs.
        spec: of the SIDs.
        id_type: Arrow type of the ids: int64, uint64, large_string or large_binary.
        arrays: by name; see the module.

    Example::

        lookup = SIDLookup.open("sids")
        words, found = lookup.lookup([17, 18])  # int64 [2, W], bool [2]
        ids, starts = lookup.items_of(words)  # the items of words[i] are ids[starts[i] : starts[i + 1]]
    """

    folder: Path
    spec: SIDSpec
    id_type: pa.DataType
    arrays: Mapping[str, np.ndarray]

    @staticmethod
    def open(folder: str | Path, *, verify: bool = False) -> "SIDLookup":
        """Maps the index of a folder of SIDs.

        Args:
            folder: that encode-corpus wrote, and ``sidrec codec index`` an index into.
            verify: whether to read the whole file, to see that it is what was written.

        Raises:
            DataError: if there is no index, or it is broken, or not of all the generations there are by now.
            CodecMismatchError: if it is of SIDs of another codec.
        """
        folder = local(folder)
        sids, path = open_sids(folder), folder / INDEX_FILE
        header, arrays = _map(path, verify=verify)
        spec = SIDSpec.from_json(header)
        remedy = f"run `sidrec codec index --sids {folder}`"
        if spec != sids.spec:
            raise CodecMismatchError(
                f"{path}: of SIDs of codec {spec.fingerprint}, but the folder holds SIDs of codec {sids.spec.fingerprint}; {remedy}"
            )
        if header["identity"] != sids.identity:
            raise DataError(
                f"{path}: of {header['items']:,} items, before the folder's SIDs changed ({sids.num_items:,} now); {remedy}"
            )
        if header["probe"] != _probe():
            raise DataError(f"{path}: of a version that hashes ids otherwise; {remedy}")
        return SIDLookup(folder, spec, _ID_TYPES[header["ids"]], arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return SIDLookup.open, (self.folder,)

    def __len__(self) -> int:
        """Items."""
        return len(self.arrays["keys"])

    def lookup(self, item_ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """SIDs of items.

        Args:
            item_ids: N ids, as an Arrow or NumPy array or a list.

        Returns:
            int64 [N, W] packed SIDs, ``NO_SID`` where an id is unknown or null; and bool [N], where it is known.

        Raises:
            DataError: if these are numbers and the items' ids are text, or the other way round.
        """
        place_N = self._places(item_ids)
        found_N = place_N >= 0
        words_NW = (
            self.arrays["words"][np.where(found_N, place_N, 0)] if len(self) else np.zeros((len(place_N), 1), np.int64)
        )
        words_NW[~found_N] = NO_SID
        return words_NW, found_N

    def items_of(self, words_NW: np.ndarray) -> tuple[pa.Array, np.ndarray]:
        """Items of SIDs.

        Args:
            words_NW: int64 [N, W] packed SIDs; those that no item has, and ``NO_SID``, are of no items.

        Returns:
            The ids of all these items, an Arrow array of ``id_type``, and int64 [N + 1]: those of SID i begin at place i and end at
            place i + 1. Items of one SID are in the order in which they were published.

        Raises:
            ValueError: on words of another shape or dtype.
        """
        if words_NW.ndim != 2 or words_NW.shape[1] != self.spec.num_words or words_NW.dtype != np.int64:
            raise ValueError(
                f"words have shape {words_NW.shape} and dtype {words_NW.dtype}, expected int64 [N, {self.spec.num_words}]"
            )
        sids_GW = self.arrays["sids"]
        place_N = Directory(self.arrays["sid_starts"]).find(
            mix(*words_NW.T), lambda places, rows: (sids_GW[places] == words_NW[rows]).all(1)
        )
        known_N, item_starts = place_N >= 0, self.arrays["item_starts"]
        begin_N = np.where(known_N, item_starts[place_N], 0).astype(np.int64)
        end_N = np.where(known_N, item_starts[place_N + 1], 0).astype(np.int64)
        starts = np.zeros(len(words_NW) + 1, np.int64)
        np.cumsum(end_N - begin_N, out=starts[1:])
        at = np.arange(starts[-1]) + np.repeat(begin_N - starts[:-1], end_N - begin_N)
        return self._ids(self.arrays["items"][at]), starts

    def _places(self, item_ids: Any) -> np.ndarray:
        """Place of each id in ``keys``, int64 [N]; -1 where it is not there."""
        ids = as_ids(item_ids)
        if not len(ids):
            return np.empty(0, np.int64)
        is_number = pa.types.is_integer(self.id_type)
        if is_number != pa.types.is_integer(ids.type):
            raise DataError(f"{self.folder / INDEX_FILE}: ids are {self.id_type}, asked for {ids.type}; cast them")
        has_value_N = ids.is_valid().to_numpy(zero_copy_only=False)
        given_N = keys(ids.fill_null(0) if is_number and ids.null_count else ids)
        if is_number and ids.type != self.id_type:  # of one bit pattern, but not of one number
            has_value_N &= given_N >= 0
        keys_N, stored = self.arrays["keys"], self._text
        plain = None if is_number else ids.cast(pa.large_binary())

        def is_same(places: np.ndarray, rows: np.ndarray) -> np.ndarray:
            same = keys_N[places] == given_N[rows]
            if plain is not None and stored is not None:
                alike = np.flatnonzero(same)
                equal = pc.equal(stored.take(pa.array(places[alike])), plain.take(pa.array(rows[alike])))
                same[alike] = pc.fill_null(equal, False).to_numpy(zero_copy_only=False)
            return same

        place_N = Directory(self.arrays["id_starts"]).find(mix(given_N), is_same)
        return np.where(has_value_N, place_N, -1)

    @cached_property
    def _text(self) -> pa.Array | None:
        """The ids as bytes, where they lie; None if they are numbers."""
        if pa.types.is_integer(self.id_type):
            return None
        buffers = [None, pa.py_buffer(self.arrays["id_ends"]), pa.py_buffer(self.arrays["id_bytes"])]
        return pa.Array.from_buffers(pa.large_binary(), len(self), buffers)

    def _ids(self, places: np.ndarray) -> pa.Array:
        if self._text is not None:
            return self._text.take(pa.array(places)).cast(self.id_type)
        return pa.array(self.arrays["keys"][places].view(np.uint64 if self.id_type == pa.uint64() else np.int64))


def write_index(folder: str | Path) -> Path:
    """Writes the index of a folder's published SIDs, all generations; the whole file or none.

    In memory are the ids and SIDs, and the index: about 150 bytes an item with integer ids and SIDs of one word.

    Raises:
        DataError: if the SIDs are missing or broken.
    """
    folder = Path(folder)
    sids = open_sids(folder)
    ids, words_NW = sids.read()
    arrays, header = _arrays(sids, as_ids(ids), words_NW)
    path = folder / INDEX_FILE
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        text = json.dumps(header).encode()
        file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        for name, array in arrays.items():
            file.write(b"\0" * (header["arrays"][name]["at"] + _begin(len(text)) - file.tell()))
            file.write(array.data)
    return path


def _arrays(sids: SIDs, ids: pa.Array, words_NW: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    keys_N = keys(ids)
    id_directory, order_N = Directory.build(mix(keys_N))
    arrays = {
        "id_starts": id_directory.starts,
        "keys": keys_N[order_N],
        "words": words_NW[order_N],
        **_text_arrays(ids, order_N),
        **_sid_arrays(sids.spec, words_NW, order_N),
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    described, at, digest = {}, 0, hashlib.sha256()
    for name, array in arrays.items():
        described[name] = {"dtype": array.dtype.str, "shape": array.shape, "at": at}
        at += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        digest.update(array.data)
    header = {
        "format": _FORMAT,
        **sids.spec.to_json(),
        "identity": sids.identity,
        "items": len(ids),
        "ids": str(ids.type),
        "probe": _probe(),
        "sha256": digest.hexdigest(),
        "arrays": described,
    }
    return arrays, header


def _text_arrays(ids: pa.Array, order_N: np.ndarray) -> dict[str, np.ndarray]:
    if pa.types.is_integer(ids.type):
        return {}
    laid = ids.cast(pa.large_binary()).take(pa.array(order_N))
    _, ends, content = laid.buffers()
    ends = np.frombuffer(ends, np.int64)[laid.offset : laid.offset + len(laid) + 1]
    content = np.frombuffer(content, np.uint8) if content is not None else np.empty(0, np.uint8)
    return {"id_ends": ends - ends[0], "id_bytes": content[ends[0] : ends[-1]]}


def _sid_arrays(spec: SIDSpec, words_NW: np.ndarray, order_N: np.ndarray) -> dict[str, np.ndarray]:
    """The SIDs that occur, in their directory's order, and the places of their items."""
    groups = PrefixGroups.of(spec, words_NW)
    starts_G, sizes_G = groups.starts(spec.num_digits), groups.sizes(spec.num_digits)
    sids_GW = words_NW[groups.order_N[starts_G]]
    directory, order_G = Directory.build(mix(*sids_GW.T))
    place_N = np.empty(len(order_N), np.int64)
    place_N[order_N] = np.arange(len(order_N))
    item_starts = np.zeros(len(order_G) + 1, np.int64)
    np.cumsum(sizes_G[order_G], out=item_starts[1:])
    at_N = np.arange(len(order_N)) + np.repeat(starts_G[order_G] - item_starts[:-1], sizes_G[order_G])
    small = np.uint32 if len(order_N) < 1 << 32 else np.int64
    return {
        "sid_starts": directory.starts,
        "sids": sids_GW[order_G],
        "item_starts": item_starts.astype(small),
        "items": place_N[groups.order_N[at_N]].astype(small),
    }


def _map(path: Path, *, verify: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and arrays of an index.

    Raises:
        DataError: if it is missing, broken, cut short or of a newer format.
    """
    remedy = f"run `sidrec codec index --sids {path.parent}`"
    try:
        content = np.memmap(path, np.uint8, mode="r")
        length = int(content[8:16].view("<u8")[0])
        if content[:8].tobytes() != _MAGIC:
            raise ValueError("it does not begin as one")
        header = json.loads(content[16 : 16 + length].tobytes())
        if header["format"] > _FORMAT:
            raise DataError(f"{path}: of format {header['format']}, this version reads up to {_FORMAT}; {remedy}")
        arrays = {}
        for name, its in header["arrays"].items():
            dtype, at = np.dtype(its["dtype"]), _begin(length) + its["at"]
            size = int(np.prod(its["shape"])) * dtype.itemsize
            if at + size > len(content):
                raise ValueError("it is cut short")
            arrays[name] = np.asarray(content[at : at + size].view(dtype).reshape(its["shape"]))
    except FileNotFoundError:
        raise DataError(f"{path}: not found; {remedy}") from None
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise DataError(f"{path}: not an index of SIDs, or a broken one ({first_line(error)}); {remedy}") from error
    if verify:
        digest = hashlib.sha256()
        for array in arrays.values():
            digest.update(array.data)
        if digest.hexdigest() != header["sha256"]:
            raise DataError(f"{path}: not what was written, by its checksum; {remedy}")
    return header, arrays


def _begin(header_length: int) -> int:
    return -(-(16 + header_length) // _ALIGNMENT) * _ALIGNMENT


def _probe() -> int:
    return int(mix(keys(pa.array([_PROBE], pa.large_string())))[0])
