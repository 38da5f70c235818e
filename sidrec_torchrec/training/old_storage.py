"""Checkpoints of earlier versions, in torch's own storage: read without running what is in them.

Their index is a pickle. Here it may hold the few classes that torch writes there, and nothing that does anything; tensors and
values are read by torch as weights only.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

OLD_INDEX_FILE = ".metadata"
_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_KNOWN = {
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("torch.serialization", "_get_layout"),
    (_FILES, "_StorageInfo"),
    *(
        (_METADATA, name)
        for name in ("Metadata", "MetadataIndex", "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta")
    ),
    *((_METADATA, f"{name}StorageMetadata") for name in ("Bytes", "Chunk", "Tensor")),
}


class OldLoadPlanner(DefaultLoadPlanner):
    """Torch's, but that it unpickles weights only."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        set_element(self.original_state_dict, self.mappings[name], torch.load(value, weights_only=True))


class OldReader(FileSystemReader):
    """Torch's, with an index that may hold what torch writes there, and nothing else."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What is in it.

        Raises:
            pickle.UnpicklingError: if there is what torch does not write.
        """
        with (Path(self.path) / OLD_INDEX_FILE).open("rb") as file:
            return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is nothing that a checkpoint holds")
        return super().find_class(module, name)
