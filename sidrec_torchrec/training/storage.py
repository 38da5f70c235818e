"""How checkpoints lie on the disk: a file of tensors per process, and one of JSON that says where each is, with its digest.

The JSON is the checkpoint: the tensors' files are written first, under names that those of the checkpoint before have not, and
when the JSON is replaced, all at once, the new checkpoint is there instead of the old one.

Torch's own storage keeps pickles, and whoever reads a pickle runs its author's code. Here tensors lie in the safetensors
format (a length, a JSON header, bytes), which other tools can read; all else is JSON. A tensor's bytes are compared with its
digest whenever they are read, the JSON with its own.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import read_object, remove, sync_to_disk, write_json
from sidrec_torchrec.storage.mirror import bring, listed, open_input, publish, size_of

INDEX_FILE = "checkpoint.json"
_FORMAT = 1
_TENSOR_FILE = re.compile(r"process-\d+b?\.safetensors")
_DTYPES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


class JSONSavePlanner(DefaultSavePlanner):
    """Torch's, with JSON where it would pickle."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type != WriteItemType.BYTE_IO:
            return object
        return io.BytesIO(json.dumps(object, allow_nan=False).encode())


class JSONLoadPlanner(DefaultLoadPlanner):
    """Torch's, with JSON where it would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        loaded = json.load(value)
        is_tuple = isinstance(self.state_dict.get(name), tuple)  # which JSON has not
        set_element(self.original_state_dict, self.mappings[name], tuple(loaded) if is_tuple else loaded)


class TensorFileWriter(StorageWriter):
    """Writes a checkpoint into a folder; a process writes its share of the tensors, the first one the index.

    Args:
        folder: made if it is not there; that of the checkpoint that is replaced.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        other = "b" * ("process-0.safetensors" in files_of(self._folder))
        names = [f"process-{i}{other}.safetensors" for i in range(len(plans))]
        return [dataclasses.replace(plan, storage_data=name) for plan, name in zip(plans, names, strict=True)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                value = planner.resolve_data(item)
                assert isinstance(value, io.BytesIO)
                results.append(WriteResult(item.index, len(value.getvalue()), {"value": json.loads(value.getvalue())}))
        if tensors:
            path = self._folder / plan.storage_data
            with path.open("wb") as file:
                results += _write_tensors(file, tensors, planner, plan.storage_data)
            sync_to_disk(path)
            publish(path)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        entries: dict[str, Any] = {}
        for result in (result for of_process in results for result in of_process):
            kept = metadata.state_dict_metadata[result.index.fqn]
            if isinstance(kept, BytesStorageMetadata):
                entries[result.index.fqn] = result.storage_data
                continue
            described = {"dtype": _DTYPES[kept.properties.dtype], "shape": list(kept.size), "chunks": []}
            entries.setdefault(result.index.fqn, described)["chunks"].append(result.storage_data)
        index = {"format": _FORMAT, "entries": dict(sorted(entries.items()))}
        sync_to_disk(self._folder)
        write_json(self._folder / INDEX_FILE, index, sealed=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class TensorFileReader(StorageReader):
    """Reads what ``TensorFileWriter`` wrote, with any number of processes.

    Args:
        folder: the checkpoint's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stored: dict[MetadataIndex, dict[str, Any]] = {}

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self) -> Metadata:  # without torch's arguments: each process has the whole index
        """What is in it.

        Raises:
            DataError: if it is not what was written.
        """
        path = self._folder / INDEX_FILE
        try:
            index = read_object(bring(path))  # the first process wrote it, maybe on another machine
            if index["format"] != _FORMAT:
                raise DataError(f"{path}: of format {index['format']}, which this version cannot read")
            kept, stored = {}, {}
            for name, entry in index["entries"].items():
                kept[name] = _metadata(entry)
                for chunk in entry.get("chunks", ()):
                    stored[MetadataIndex(name, torch.Size(chunk["offsets"]))] = chunk | {"dtype": entry["dtype"]}
                if "value" in entry:
                    stored[MetadataIndex(name)] = entry
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise error if isinstance(error, DataError) else DataError(f"{path}: not what was written") from error
        return Metadata(state_dict_metadata=kept, storage_data=stored)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._stored = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        last: tuple[MetadataIndex, Tensor] | None = None  # several parts of a stored chunk may be asked for, one by one
        for item in plan.items:
            stored = self._stored[item.storage_index]
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(json.dumps(stored["value"]).encode()))
                continue
            if last is None or last[0] != item.storage_index:
                last = item.storage_index, _read_tensor(self._folder, item.storage_index.fqn, stored)
            part = narrow_tensor_by_index(last[1], item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


def files_of(folder: Path) -> set[str]:
    """Names of the files that a checkpoint is in, but for its index; none where there is no checkpoint.

    Raises:
        DataError: if the index is broken.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        return set()
    entries = read_object(path)["entries"].values()
    return {chunk["file"] for entry in entries for chunk in entry.get("chunks", ())}


def remove_others(folder: Path) -> None:
    """Removes what is in a checkpoint's folder and not of it: the checkpoint before, or one that could not be written."""
    known = {INDEX_FILE, *files_of(folder)}
    for path in listed(folder, "*"):
        is_left = path.name not in known and ((folder / INDEX_FILE).exists() or _TENSOR_FILE.fullmatch(path.name))
        if is_left:
            remove(path)
    with suppress(OSError):  # there is a checkpoint in it
        folder.rmdir()


def _write_tensors(
    file: BinaryIO, items: list[WriteItem], planner: SavePlanner, file_name: str
) -> Iterator[WriteResult]:
    """Header and bytes, one tensor at a time in memory."""
    header: dict[str, dict[str, Any]] = {}
    place = 0
    for item in items:
        assert item.tensor_data is not None
        shape, dtype = list(item.tensor_data.chunk.sizes), item.tensor_data.properties.dtype
        size = math.prod(shape) * dtype.itemsize
        described = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [place, place + size]}
        header[_key(item)] = described
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for item in items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, Tensor) and item.tensor_data is not None
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        start, end = header[_key(item)]["data_offsets"]
        if len(content) != end - start:
            raise ValueError(f"{item.index.fqn}: {len(content)} bytes, planned were {end - start}")
        file.write(content)
        stored = {
            "offsets": list(item.tensor_data.chunk.offsets),
            "shape": header[_key(item)]["shape"],
            "file": file_name,
            "start": 8 + len(text) + start,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        yield WriteResult(item.index, len(content), stored)


def _key(item: WriteItem) -> str:
    """A chunk's name in its file."""
    offsets = list(item.index.offset or ())
    return f"{item.index.fqn}{offsets}" if any(offsets) else item.index.fqn


def _read_tensor(folder: Path, name: str, stored: dict[str, Any]) -> Tensor:
    """A stored chunk, [as it was].

    Raises:
        DataError: if its bytes are not those that were written; names the file and the tensor.
    """
    if not _TENSOR_FILE.fullmatch(stored["file"]):
        raise DataError(f"{folder / INDEX_FILE}: '{stored['file']}' is no file of tensors")
    path = folder / stored["file"]
    dtype = _TORCH_DTYPES[stored["dtype"]]
    size = math.prod(stored["shape"]) * dtype.itemsize
    content = bytearray(size if size <= size_of(path) else 0)
    with open_input(path) as file:
        file.seek(stored["start"])
        count = file.readinto(content)  # type: ignore[attr-defined]
    if count != size or hashlib.sha256(content).hexdigest() != stored["sha256"]:
        raise DataError(f"{path}: '{name}' is not what was written")
    if not size:
        return torch.empty(stored["shape"], dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).reshape(stored["shape"])


def _metadata(entry: dict[str, Any]) -> TensorStorageMetadata | BytesStorageMetadata:
    if "value" in entry:
        return BytesStorageMetadata()
    chunks = [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["shape"])) for c in entry["chunks"]]
    return TensorStorageMetadata(TensorProperties(_TORCH_DTYPES[entry["dtype"]]), torch.Size(entry["shape"]), chunks)
