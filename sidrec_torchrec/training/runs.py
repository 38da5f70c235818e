"""Output folders: each belongs to one configuration; a finished one is read back, another's is refused.

While a job works in a folder it holds a lock there, so that no second one does. The kernel lets go of a killed job's lock.
"""

import dataclasses
import fcntl
import os
import socket
import typing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sidrec_torchrec.errors import FolderBusyError, RunMismatchError, SidrecError
from sidrec_torchrec.files import read_json, remove_temporaries, write_json

CONFIG_FILE = "run.json"
RESULT_FILE = "metrics.json"
LOCK_FILE = "run.lock"


@dataclass(frozen=True)
class Run:
    """A job's output folder. Made by ``open_run``.

    Args:
        folder: the folder.
        result: what ``finish`` wrote, if the run is finished.
    """

    folder: Path
    result: dict[str, Any] | None

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Marks the run as finished, and gives the result as it will be read back; on every process, the main one writes."""
        if dist.get_rank() == 0:
            write_json(self.folder / RESULT_FILE, result)
        dist.barrier()
        return read_json(self.folder / RESULT_FILE)


@contextmanager
def open_run(folder: Path, config: Any, ignore: tuple[str, ...] = ("out",)) -> Iterator[Run]:
    """Claims ``folder`` for ``config``, and for this job alone as long as it runs; call on every process of the group.

    A job that is refused before it wrote anything takes its claim back, so that it can be called again without the mistake.

    Args:
        folder: made if it is not there.
        config: the job's config dataclass.
        ignore: fields that may differ: they name places, not results.

    Raises:
        FolderBusyError: if another process works in the folder.
        RunMismatchError: if the folder belongs to another configuration; names the fields that differ.
    """
    folder = Path(folder)
    with ExitStack() as stack:
        failure: list[Exception | None] = [None]
        if dist.get_rank() == 0:
            try:
                is_locked = stack.enter_context(_locked(folder))
                stack.enter_context(_claimed(folder, {k: v for k, v in config_json(config).items() if k not in ignore}))
                if is_locked:
                    remove_temporaries(folder)
            except (SidrecError, OSError) as error:
                failure = [error]
        dist.broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]
        result_file = folder / RESULT_FILE
        yield Run(folder, read_json(result_file) if result_file.exists() else None)


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


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the folder's lock; False where there can be none."""
    folder.mkdir(parents=True, exist_ok=True)
    is_locked = False
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(folder / LOCK_FILE, "a+"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            is_locked = True
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise FolderBusyError(
                f"{folder}: {owner} is working in it; wait for its end, or give another folder"
            ) from None
        except OSError:
            pass  # read-only, where only finished runs are read back; full, as the job will say; or without locks
        yield is_locked


@contextmanager
def _claimed(folder: Path, config: dict[str, Any]) -> Iterator[None]:
    """Writes the configuration; on an error takes it away again if nothing else was written.

    Raises:
        RunMismatchError: if another one is there; says how it differs.
    """
    path = folder / CONFIG_FILE
    if path.exists():
        there = read_json(path)
        changed = [name for name in sorted(there.keys() | config) if there.get(name) != config.get(name)]
        if changed:
            differences = "; ".join(f"{name} was {there.get(name)!r}, is {config.get(name)!r}" for name in changed)
            raise RunMismatchError(
                f"{folder}: holds another run ({differences}); give another folder, or remove this one"
            )
    elif _files(folder):
        raise RunMismatchError(f"{folder}: holds files of something else; give an empty or new folder")
    else:
        write_json(path, config)
    try:
        yield
    except Exception:
        if _files(folder) == {CONFIG_FILE}:
            path.unlink()
        raise


def _files(folder: Path) -> set[str]:
    """Names of what is in the folder, but for the lock, and what a killed job was writing its claim into."""
    half_written = {path.name for path in folder.glob(f".{CONFIG_FILE}.*.tmp")}
    return {path.name for path in folder.iterdir()} - {LOCK_FILE} - half_written
