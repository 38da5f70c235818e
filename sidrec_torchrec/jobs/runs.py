"""Output folders: each belongs to one configuration; a finished one is read back, another's is refused."""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sidrec_torchrec.errors import RunMismatchError
from sidrec_torchrec.files import read_json, write_json

CONFIG_FILE = "run.json"
RESULT_FILE = "metrics.json"


@dataclass(frozen=True)
class Run:
    """A job's output folder. Made by ``open_run``.

    Args:
        folder: the folder.
        result: what ``finish`` wrote, if the run is finished.
    """

    folder: Path
    result: dict[str, Any] | None

    def finish(self, result: dict[str, Any]) -> None:
        """Marks the run as finished; call on every process, the main one writes."""
        if dist.get_rank() == 0:
            write_json(self.folder / RESULT_FILE, result)
        dist.barrier()


def open_run(folder: Path, config: Any, ignore: tuple[str, ...] = ("out",)) -> Run:
    """Claims ``folder`` for ``config``; call on every process of the group.

    Args:
        folder: made if it is not there.
        config: the job's config dataclass.
        ignore: fields that may differ: they name places, not results.

    Raises:
        RunMismatchError: if the folder belongs to another configuration; names the fields that differ.
    """
    folder = Path(folder)
    message = [None]
    if dist.get_rank() == 0:
        message = [_claim(folder, {k: v for k, v in config_json(config).items() if k not in ignore})]
    dist.broadcast_object_list(message)
    if message[0]:
        raise RunMismatchError(message[0])
    result_file = folder / RESULT_FILE
    return Run(folder, read_json(result_file) if result_file.exists() else None)


def config_json(config: Any) -> dict[str, Any]:
    """A config dataclass as a JSON value; paths are made absolute."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def config_from_json(kind: type, value: dict[str, Any]) -> Any:
    """The config dataclass ``config_json`` wrote; ``kind`` is its class."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _typed(hints[name], value[name]) for name in value})


def _typed(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if dataclasses.is_dataclass(hint):
        return config_from_json(hint, value)
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if typing.get_origin(hint) is tuple:
        return tuple(_typed(options[0], v) for v in value)
    if options:  # Optional
        return _typed(options[0], value)
    return hint(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_json(value)
    if isinstance(value, Path):
        return str(value.resolve())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _claim(folder: Path, config: dict[str, Any]) -> str | None:
    """Writes the configuration, or says how the one that is there differs."""
    path = folder / CONFIG_FILE
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            return f"{folder}: holds files of something else; give an empty or new folder"
        write_json(path, config)
        return None
    there = read_json(path)
    changed = [name for name in sorted(there.keys() | config) if there.get(name) != config.get(name)]
    if not changed:
        return None
    differences = "; ".join(f"{name} was {there.get(name)!r}, is {config.get(name)!r}" for name in changed)
    return f"{folder}: holds another run ({differences}); give another folder, or remove this one"
