"""A kind of bad input, and the small folders that every kind spoils a copy of. The lists are in ``cases_*.py``."""

import contextlib
import hashlib
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec import cli
from sidrec_torchrec.errors import SidrecError


@dataclass(frozen=True)
class Kind:
    """Something that is wrong, where it is met, and what is said then.

    Args:
        name: in words, as docs/errors.md has it; no two have one.
        command: flags of ``sidrec``, in which ``{}`` is the folder; or a Python call in words, and then ``call`` does it.
        says: what the error says, from its first words or within; the folder's own name is left out.
        spoil: makes it wrong, given a folder in which all is well; None where the command alone is wrong.
        call: what is called in place of the command.
        code: the command's exit code.
        leaves: what may be there afterwards that was not before: whole files, from which the same command goes on; ``a/`` is all in ``a``.
    """

    name: str
    command: str
    says: str
    spoil: Callable[["Folder"], Any] | None = None
    call: Callable[["Folder"], Any] | None = None
    code: int = 2
    leaves: tuple[str, ...] = ()


@dataclass(frozen=True)
class Folder:
    """A kind's own folder: what it asks for is copied into it.

    Args:
        path: the folder.
        whole: of folders in which all is well, made once; ``Whole.folders`` names them.
    """

    path: Path
    whole: "Whole"

    def __truediv__(self, name: str) -> Path:
        """A path in it; the folder of that name is copied first, if there is one that is well."""
        first = Path(name).parts[0]
        if first in Whole.PARTS and not (self.path / first).exists():
            shutil.copytree(getattr(self.whole, first), self.path / first)
        return self.path / name

    def table(self, file: str, change: Callable[[pa.Table], pa.Table], **options: Any) -> None:
        """Writes a Parquet file anew, changed."""
        path = self / file
        pq.write_table(change(pq.read_table(path)), path, **options)

    def column(self, file: str, name: str, values: Any, *, first_only: bool = False) -> None:
        """Gives a column other values: an array, or one value for the first row, or for all."""

        def change(table: pa.Table) -> pa.Table:
            new = values if isinstance(values, pa.Array) else pa.array([values] * len(table))
            if first_only:
                old = table.column(name).to_pylist()
                new = pa.array([values, *old[1:]], table.schema.field(name).type)
            new = (
                new if len(new) == len(table) else pa.concat_arrays([new] * (len(table) // len(new) + 1))[: len(table)]
            )
            place = table.schema.get_field_index(name)
            return table.append_column(name, new) if place < 0 else table.set_column(place, name, new)

        self.table(file, change)


class Whole:
    """Small folders in which all is well, each made when the first kind asks for it.

    Args:
        path: where to make them.
    """

    PARTS = (
        "data",
        "prepared",
        "tokenizer",
        "sids",
        "other_sids",
        "other_tokenizer",
        "ranker",
        "package",
        "collaborative",
    )

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def data(self) -> Path:
        size = "--items 60 --users 40 --median-events 30 --max-events 60 --categories 4 --text-dim 6 --image-dim 4"
        return self._made("data", f"data synthetic {size}")

    @cached_property
    def prepared(self) -> Path:
        return self._made("prepared", f"prepare --data {self.data} --max-history 32 --targets-per-row 32")

    @cached_property
    def collaborative(self) -> Path:
        return self._made("collaborative", f"collaborative-vectors --data {self.data} --prepared {self.prepared}")

    @cached_property
    def tokenizer(self) -> Path:
        return self._tokenizer("tokenizer", "ternary*8")

    @cached_property
    def other_tokenizer(self) -> Path:
        return self._tokenizer("other_tokenizer", "ternary*6")

    @cached_property
    def sids(self) -> Path:
        made = self._made("sids", f"encode-corpus --data {self.data} --tokenizer {self.tokenizer}")
        run(f"codec index --sids {made}")
        return made

    @cached_property
    def other_sids(self) -> Path:
        return self._made("other_sids", f"encode-corpus --data {self.data} --tokenizer {self.other_tokenizer}")

    @cached_property
    def ranker(self) -> Path:
        size = "--dim 16 --num-heads 2 --head-dims 16 --epochs 1"
        return self._made(
            "ranker", f"train-ranker --data {self.data} --prepared {self.prepared} --sids {self.sids} --arm side {size}"
        )

    @cached_property
    def package(self) -> Path:
        (self._path / "package").mkdir()
        run(f"export --ranker {self.ranker} --out {self._path}/package/ranker.pt2 --compiled false")
        return self._path / "package"

    def _tokenizer(self, name: str, stages: str) -> Path:
        size = f"--epochs 1 --latent-dim 8 --hidden-dim 16 --stages {stages}"
        return self._made(name, f"train-tokenizer --data {self.data} {size}")

    def _made(self, name: str, command: str) -> Path:
        run(f"{command} --out {self._path / name}")
        return self._path / name


def run(command: str) -> None:
    """A command that must succeed."""
    code, said = outcome(command.split())
    if code:
        raise AssertionError(f"{command}: {said}")


def outcome(arguments: list[str]) -> tuple[int, str]:
    """Exit code of a command, and its standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            return cli.main(arguments), err.getvalue()
        except SystemExit as exit:  # as argparse ends
            return int(exit.code or 0), err.getvalue()


def try_out(kind: Kind, whole: Whole, path: Path) -> tuple[str, list[str]]:
    """What is said of a kind; and what is not as it should be, in words.

    An error must be one line (of a command, its exit code the kind's), and leave every file as it was.
    """
    path.mkdir()
    folder = Folder(path, whole)
    for part in Whole.PARTS:  # those that the command names
        if f"{{}}/{part}" in kind.command:
            _ = folder / part
    undo = kind.spoil(folder) if kind.spoil else None
    before = _content(path)
    try:
        said, wrong = _command(kind, path) if kind.call is None else _call(kind, folder)
    finally:
        if callable(undo):
            undo()
    said = said.replace(f"{path}/", "").replace(str(path), "")
    after = _content(path)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    below = tuple(name for name in kind.leaves if name.endswith("/"))
    changed = [
        name for name in changed if name in before or name not in kind.leaves and not name.startswith(below or "/")
    ]
    wrong += [f"changed or left {', '.join(changed)}"] if changed else []
    wrong += [f"says {said!r}"] if kind.says not in said else []
    return said, wrong


def _command(kind: Kind, path: Path) -> tuple[str, list[str]]:
    code, said = outcome([word.replace("{}", str(path)) for word in kind.command.split()])
    lines = [line for line in said.strip().splitlines() if "error: " in line]
    wrong = [] if code == kind.code else [f"exit code {code}"]
    if len(lines) != 1 or "Traceback" in said:
        wrong.append(f"{len(lines)} lines of errors")
    return said.partition("error: ")[2].strip(), wrong


def _call(kind: Kind, folder: Folder) -> tuple[str, list[str]]:
    try:
        kind.call(folder)
    except (SidrecError, ValueError, OSError) as error:
        return str(error), []
    return "", ["no error"]


def _content(folder: Path) -> dict[str, str]:
    """Of every file and folder in it."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders:
            found[os.path.relpath(os.path.join(parent, name), folder)] = "a folder"
        for name in files:
            file = Path(parent, name)
            is_plain = file.is_file() and not file.is_symlink()
            digest = hashlib.sha256(file.read_bytes()).hexdigest() if is_plain else "something else"
            found[str(file.relative_to(folder))] = digest
    return found
