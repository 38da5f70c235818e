"""Output folders: each belongs to one configuration and its inputs; a finished one is read back, another's is refused.

A folder knows its inputs by their content, so that it may be moved or copied, with them or without, and so that a result is
not taken for one of inputs that have changed since.

While a job works in a folder it holds a lock there, so that no second one does. The kernel lets go of a killed job's lock.
Of a folder at a URL only jobs of this machine are kept out; those of others are noticed, by their claim.
"""

import fcntl
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist

from sidrec_torchrec.errors import FolderBusyError, RunMismatchError
from sidrec_torchrec.files import check_listed, glance, read_object, remove, remove_temporaries, sha256_of, write_json
from sidrec_torchrec.processes import is_first_process, on_first_process
from sidrec_torchrec.storage.mirror import LOCK, bring, has_changed, is_mirrored, slim
from sidrec_torchrec.training.config import config_json, located, without, without_paths
from sidrec_torchrec.training.launcher import tell_launcher
from sidrec_torchrec.training.progress import say

CONFIG_FILE = "run.json"
RESULT_FILE = "metrics.json"
LOCK_FILE = f"run{LOCK}"
INPUTS = "inputs"  # in CONFIG_FILE, beside the config's fields: what each input file was
_NO_RESULT = (
    "checkpoint_batches",
    "checkpoint_minutes",
    "keep_epochs",
    "profile",
    "engine",
    "tracker",
)  # fields of any config that change no result

_held: set[TextIO] = set()  # lock files of this process
_outermost: ContextVar[Path | None] = ContextVar("outermost", default=None)  # folder of the run whose step this one is


@dataclass(frozen=True)
class Run:
    """A job's output folder. Made by ``open_run``.

    Args:
        folder: the folder.
        result: what ``finish`` wrote, if the run is finished.
        inputs: of a run that grows: what the input files were when it began.
        step: of another run, its folder within that one's; else empty.
    """

    folder: Path
    result: dict[str, Any] | None
    inputs: dict[str, Any] | None = None
    step: str = ""

    def finish(self, result: dict[str, Any]) -> dict[str, Any]:
        """Marks the run as finished, and gives the result as it will be read back; on every process, the main one writes.

        Raises RunMismatchError if a job of another machine has claimed the folder's URL in the meantime.
        """
        if dist.get_rank() == 0:
            _check_is_ours(self.folder)
            if self.inputs is not None:
                there = read_object(self.folder / CONFIG_FILE)
                write_json(self.folder / CONFIG_FILE, there | {INPUTS: self.inputs}, sealed=True)
            write_json(self.folder / RESULT_FILE, result, sealed=True)
        tell_launcher(self.step, result, self.folder / RESULT_FILE)
        dist.barrier()
        share(self.folder / RESULT_FILE)
        return read_object(self.folder / RESULT_FILE)


@contextmanager
def open_run(
    folder: Path,
    config: Any,
    *,
    inputs: Iterable[Path] = (),
    ignore: tuple[str, ...] = ("out",),
    grows: bool = False,
    free: tuple[str, ...] = (),
    remedy: str = "give another folder, or remove this one",
) -> Iterator[Run]:
    """Claims ``folder`` for ``config``, and for this job alone as long as it runs; call on every process of the group.

    A job that is refused before it wrote anything takes its claim back, so that it can be called again without the mistake.

    Args:
        folder: made if it is not there.
        config: the job's config dataclass. Its paths may differ from those of an earlier call: inputs count by content.
        inputs: files the result depends on; one that is not there counts as such.
        ignore: fields that may differ: they do not change results.
        grows: whether this call adds to what an earlier one made of other inputs, and answers for what that leaves in the
            folder; ``finish`` notes what the inputs were this time.
        free: fields that may be others than those of the folder's first call, which are noted there.
        remedy: what to do about inputs that have changed.

    Raises:
        FolderBusyError: if another process works in the folder.
        RunMismatchError: if the folder belongs to another configuration, or an input has changed; says what differs.
    """
    folder, inputs = Path(folder), list(inputs)
    with ExitStack() as stack:

        def lock() -> bool:
            is_locked = stack.enter_context(_locked(folder))
            bring(folder, clean=True)
            return is_locked

        def claim() -> dict[str, Any] | None:
            fields = without({k: v for k, v in config_json(config, folder).items() if k not in ignore}, _NO_RESULT)
            stack.enter_context(_claimed(folder, fields, inputs, grows=grows, free=free, remedy=remedy))
            _check_is_ours(folder)
            if is_locked:
                remove_temporaries(folder)
            return _described(inputs) if grows else None

        is_locked = on_first_process(lock)
        if is_mirrored(folder):  # before anything is written there
            if not is_first_process():
                bring(folder, clean=True)
            dist.barrier()
        described = on_first_process(claim)
        share(folder / CONFIG_FILE)
        result_file = folder / RESULT_FILE
        result = read_object(result_file) if result_file.exists() else None
        outermost = _outermost.get()
        if result is not None and not grows and dist.get_rank() == 0 and outermost is None:
            say(f"{folder}: finished before; its result is read back. To run again, remove it or give another folder")
        step = "" if outermost is None else os.path.relpath(folder, outermost)
        token = _outermost.set(outermost or folder)
        try:
            yield Run(folder, result, described, step)
        finally:
            _outermost.reset(token)
        share(folder)
        if outermost is None:
            slim(folder)


def share(path: Path) -> None:
    """What the first process has written at a URL is then there for those of other machines, too; call on every process."""
    if is_mirrored(path):
        dist.barrier()
        if not is_first_process():
            bring(path)
        dist.barrier()


def look(folder: Path, config: Any, inputs: Iterable[Path] = (), *, ignore: tuple[str, ...] = ("out", "append")) -> str:
    """What ``open_run`` would find, in words; nothing is changed.

    Args:
        folder: of the run.
        config: as ``open_run`` has it, and so are
        inputs: and
        ignore: fields.
    """
    if _is_locked(folder / LOCK_FILE):
        return "another process is working in it"
    bring(folder, clean=True)
    if not folder.is_dir() or not _files(folder):
        return "new"
    path = folder / CONFIG_FILE
    if not path.exists():
        return "refused: it holds files of something else"
    there = {k: v for k, v in read_object(path).items() if k not in ignore}
    known = there.pop(INPUTS, None)
    fields = without({k: v for k, v in config_json(config, folder).items() if k not in ignore}, _NO_RESULT)
    is_grown = getattr(config, "append", False)
    try:
        _check_config(folder, there, fields)
        if known is not None and not is_grown:
            _check_inputs(folder, known, list(inputs), "give another folder, or remove this one")
    except RunMismatchError as error:
        return f"refused: {str(error).removeprefix(f'{folder}: ')}"
    if is_grown:
        return "there is one, to be added to"
    return "finished" if (folder / RESULT_FILE).exists() else "begun, and would go on"


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock."""
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Holds the folder's lock; False where there can be none. Leaves neither the lock nor an empty folder it made."""
    made = _make_folder(folder)
    path, file = folder / LOCK_FILE, None
    try:
        file = _open_locked(path)
        if file is not None:
            _held.add(file)
            with suppress(OSError):  # a full disk, as the job will say
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        yield file is not None
    finally:
        if file is not None and not file.closed:
            path.unlink(missing_ok=True)  # while it is held: whoever has opened it by now sees that it is gone
            _held.discard(file)
            with suppress(OSError):  # a full disk, again
                file.close()
        with suppress(OSError):  # something is in it, as it should be
            for parent in made:
                parent.rmdir()


def _leave_locks() -> None:
    """In a forked process, say a loader's worker, which would otherwise keep its killed parent's locks until it ends too."""
    for file in _held:
        file.close()  # and not unlocked, which would take the lock from the parent
    _held.clear()


os.register_at_fork(after_in_child=_leave_locks)


def _make_folder(folder: Path) -> list[Path]:
    """Makes the folder; returns the folders that were not there, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _open_locked(path: Path) -> TextIO | None:
    """The lock file, locked; None where there can be no lock: a read-only disk, or a file system without locks.

    Raises:
        FolderBusyError: if another process holds it; names the process.
    """
    while True:
        try:
            file = open(path, "a+")  # noqa: SIM115 - it stays open as long as the lock is held
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise FolderBusyError(
                f"{path.parent}: {owner} is working in it; wait for its end, or give another folder"
            ) from None
        except OSError:
            file.close()
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its last holder has removed it since: lock the one that is there now


@contextmanager
def _claimed(
    folder: Path, config: dict[str, Any], inputs: list[Path], *, grows: bool, free: tuple[str, ...], remedy: str
) -> Iterator[None]:
    """Writes configuration and inputs; on an error takes them away again if nothing else was written.

    Raises:
        RunMismatchError: if others are there; says how they differ.
    """
    path = folder / CONFIG_FILE
    if path.exists():
        there = read_object(path)
        known = there.pop(INPUTS, None)
        _check_config(folder, *({k: v for k, v in fields.items() if k not in free} for fields in (there, config)))
        if known is not None and not grows:  # a run of an earlier version did not say
            _check_inputs(folder, known, inputs, remedy)
    elif _files(folder):
        raise RunMismatchError(f"{folder}: holds files of something else; give an empty or new folder")
    else:
        write_json(path, config | {INPUTS: _described(inputs)}, sealed=True)
    try:
        yield
    except Exception:
        if _files(folder) == {CONFIG_FILE} and not has_changed(path):
            remove(path)
        raise


def _check_is_ours(folder: Path) -> None:
    """Refuses a folder at a URL, which no lock guards from other machines, if the claim there is not the one that is here."""
    if has_changed(folder / CONFIG_FILE):
        raise RunMismatchError(
            f"{folder}: another job has claimed or removed it meanwhile, and files of both may be in it; remove it, and run one at a time"
        )


def _check_config(folder: Path, there: dict[str, Any], config: dict[str, Any]) -> None:
    there, config = without(without_paths(there), _NO_RESULT), without_paths(config)
    if differences := _differences(there, config):
        words = "; ".join(differences)
        raise RunMismatchError(f"{folder}: holds another run ({words}); give another folder, or remove this one")


def _differences(there: dict[str, Any], config: dict[str, Any], prefix: str = "") -> list[str]:
    """In words, the fields that differ; of configs within, theirs."""
    found = []
    for name in sorted(there.keys() | config):
        was, now = there.get(name), config.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            found += _differences(was, now, f"{prefix}{name}.")
        elif was != now:
            found.append(f"{prefix}{name} was {was!r}, is {now!r}")
    return found


def run_config(folder: Path) -> dict[str, Any]:
    """What the run in ``folder`` was given, as JSON; nothing if there is no run."""
    path = folder / CONFIG_FILE
    return {k: v for k, v in read_object(path).items() if k != INPUTS} if path.exists() else {}


def run_path(folder: Path, field: str) -> Path | None:
    """A path that the run in ``folder`` was given; None if there is no run, or it has no such field."""
    value = run_config(folder).get(field)
    return None if value is None else located(value, folder)


def changed_inputs(folder: Path, inputs: list[Path]) -> dict[Path, str]:
    """Of the inputs a run was made from, those that have changed since, and how: ``is gone``, say.

    Args:
        folder: the run's.
        inputs: as ``open_run`` was given them, wherever they are now.
    """
    known = read_object(folder / CONFIG_FILE).get(INPUTS, {})
    labels = {_label(file, inputs): file for file in inputs}
    changes = {labels[label]: _change(labels[label], known[label]) for label in labels.keys() & known}
    return {file: change for file, change in changes.items() if change is not None}


def _change(file: Path, was: dict[str, Any] | None) -> str | None:
    if was is not None and file.exists() and glance(file) == was["glance"]:
        return None  # neither touched nor moved
    now = _describe(file)
    if (was and was["sha256"]) == (now and now["sha256"]):
        return None
    return "is gone" if now is None else "is there now" if was is None else "has changed"


def _check_inputs(folder: Path, known: dict[str, Any], inputs: list[Path], remedy: str) -> None:
    """Refuses inputs that are not what they were."""
    labels = {_label(file, inputs) for file in inputs}
    changed = [f"{label} was not read" for label in labels - known.keys()]
    changed += [f"{label} is not read any more" for label in known.keys() - labels]
    changed += [f"{file} {change}" for file, change in changed_inputs(folder, inputs).items()]
    if changed:
        raise RunMismatchError(f"{folder}: was made from other inputs ({'; '.join(sorted(changed))}); {remedy}")


def _label(file: Path, inputs: list[Path]) -> str:
    """The file's name, with as many of the folders above as tell it from the others: it stays if all are moved."""
    for count in range(1, len(file.parts) + 1):
        label = "/".join(file.parts[-count:])
        if sum("/".join(other.parts[-count:]) == label for other in inputs) == 1:
            return label
    return str(file)


def _described(inputs: list[Path]) -> dict[str, Any]:
    return {_label(file, inputs): _describe(file) for file in inputs}


def _describe(file: Path) -> dict[str, Any] | None:
    """What the file is, by its whole content; None if there is none.

    Raises:
        DataError: if it is not what its folder's list says.
    """
    check_listed(file)
    if not file.is_file():
        return None
    now = glance(file)
    return {"sha256": sha256_of(file), "glance": now}


def _files(folder: Path) -> set[str]:
    """Names of what is in the folder, but for the lock, and what a killed job was writing its claim into."""
    half_written = {path.name for path in folder.glob(f".{CONFIG_FILE}.*.tmp")}
    return {path.name for path in folder.iterdir()} - {LOCK_FILE} - half_written
