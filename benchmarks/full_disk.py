"""Runs every job on a disk that is full, again and again with a little more room, until it ends.

    python benchmarks/full_disk.py                       # as root
    unshare -rm python benchmarks/full_disk.py           # as anybody, where the kernel lets users mount

The disk is a tmpfs whose size grows by ``--step`` pages from one attempt to the next, so that each write of a job meets its end once. An
attempt that fails must say so in one line, with a documented exit code, and leave nothing that is half written; the same command, run
again with room, must end with what a run that nobody hindered has left.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidrec_torchrec import cli
from sidrec_torchrec.jobs import JOBS

PAGE = 4096
ROOM = 1 << 30
SMALL = "--dim 16 --num-heads 2 --head-dims 16 --epochs 1"
TOKENIZER = "--epochs 1 --latent-dim 8 --hidden-dim 16 --stages ternary*8"
STUDY = "--data {}/data --protocol.validation-fraction 0.2 --tokenizer.epochs 1 --tune false --collaborative false"
# what differs from run to run, and from folder to folder: keys, and names of files
TIMES = {
    "steps.json",
    "created",
    "seconds",
    "train_seconds",
    "train_events_per_s",
    "steps",
    "sha256",
    "inputs",
    "place",
    "command",
    "tokenizer",
}


@dataclass(frozen=True)
class Case:
    """A command, and where it writes.

    Args:
        name: of the case.
        command: ``{}`` is the folder of inputs, and DISK the one whose size is bounded.
        writes: inputs that the command writes into; they are copied to the disk first.
    """

    name: str
    command: str
    writes: tuple[str, ...] = ()


INPUTS = [
    "data synthetic --out {}/data --items 60 --users 40 --median-events 30 --max-events 60 --categories 4 --text-dim 6 --image-dim 4",
    "prepare --data {}/data --out {}/prepared --max-history 32 --targets-per-row 32 --validation-fraction 0.2",
    f"train-tokenizer --data {{}}/data --out {{}}/tokenizer {TOKENIZER}",
    "encode-corpus --data {}/data --tokenizer {}/tokenizer --out {}/sids",
    f"train-ranker --data {{}}/data --prepared {{}}/prepared --sids {{}}/sids --arm side --out {{}}/ranker {SMALL}",
    "encode-corpus --data {}/old --tokenizer {}/tokenizer --out {}/old-sids",
]
CASES = [
    Case("data synthetic", "data synthetic --out DISK/out --items 64 --users 20 --median-events 20 --max-events 40"),
    Case("data fractal", "data fractal --data {}/data --out DISK/out --users-times 2 --items-times 2"),
    Case("data schema", "data schema --data {}/data --out DISK/out.json"),
    Case("prepare", "prepare --data {}/data --out DISK/out --max-history 32 --targets-per-row 32"),
    Case("collaborative-vectors", "collaborative-vectors --data {}/data --prepared {}/prepared --out DISK/out"),
    Case("train-tokenizer", f"train-tokenizer --data {{}}/data --out DISK/out {TOKENIZER}"),
    Case("encode-corpus", "encode-corpus --data {}/data --tokenizer {}/tokenizer --out DISK/out"),
    Case(
        "encode-corpus --append",
        "encode-corpus --data {}/data --tokenizer {}/tokenizer --out DISK/old-sids --append",
        ("old-sids",),
    ),
    Case("decode-sids", "decode-sids --sids {}/sids --tokenizer {}/tokenizer --out DISK/out.parquet"),
    Case("codec index", "codec index --sids DISK/sids", ("sids",)),
    Case("codec disambiguate", "codec disambiguate --sids {}/sids --out DISK/out"),
    Case("codec collisions", "codec collisions --sids {}/sids --json DISK/out.json"),
    Case("codec drift", "codec drift --new {}/sids --old {}/sids --json DISK/out.json"),
    Case(
        "train-ranker",
        f"train-ranker --data {{}}/data --prepared DISK/prepared --sids {{}}/sids --arm side --out DISK/out {SMALL}",
        ("prepared",),
    ),
    Case(
        "tune-tokenizer",
        f"tune-tokenizer --data {{}}/data --prepared DISK/prepared --tokenizer {{}}/tokenizer --out DISK/out {SMALL}",
        ("prepared",),
    ),
    Case("evaluate", "evaluate --ranker {}/ranker --out DISK/out.json"),
    Case("evaluate --data", "evaluate --ranker {}/ranker --data {}/data --test-from 2020-01-01 --out DISK/out"),
    Case("predict", "predict --ranker {}/ranker --newest 2 --out DISK/out.parquet"),
    Case("export", "export --ranker {}/ranker --out DISK/out.pt2 --compiled false"),
    Case("codec digits", f"codec digits {STUDY} --out DISK/out --stages ternary*4 --ranker.epochs 1"),
    Case("pipeline", f"pipeline {STUDY} --out DISK/out --arms none,side --ranker.epochs 1 --fused.stages ternary*8"),
]


@dataclass
class Count:
    """Of one case.

    Args:
        attempts: with too little room.
        wrong: what was not as it should be, by the disk's pages.
    """

    attempts: int = 0
    wrong: dict[int, str] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--step", type=int, default=1, help="pages by which the disk grows; 0 draws about 20 steps a job"
    )
    parser.add_argument("--case", action="append", help="names of commands; none given: all")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for case in CASES:
            if arguments.case and case.name not in arguments.case:
                continue
            with disk(folder / "disk"):
                count = fill(case, folder, arguments.step)
            wrong += len(count.wrong)
            print(
                f"{case.name:<24}{count.attempts:>4} full disks, {len(count.wrong)} not as they should be", flush=True
            )
            for pages, what in count.wrong.items():
                print(f"    {pages} pages: {what}", flush=True)
    sys.exit(bool(wrong))


def write_inputs(folder: Path) -> None:
    """What the cases read."""
    for command in INPUTS:
        if "{}/old " in command:
            (folder / "old").mkdir()
            halve(folder / "data" / "items.parquet", folder / "old" / "items.parquet")
        code, said = run(command, folder)
        if code:
            raise SystemExit(f"{command}: {said}")
    for name in JOBS:
        _ = JOBS[name]  # imported once, before processes fork


def halve(path: Path, to: Path) -> None:
    """The first half of a Parquet file's rows."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) // 2), to)


@contextmanager
def disk(path: Path) -> Iterator[None]:
    path.mkdir()
    system("mount", "-t", "tmpfs", "-o", f"size={ROOM}", "sidrec", str(path))
    try:
        yield
    finally:
        system("umount", str(path))
        path.rmdir()


def resize(path: Path, size: int) -> None:
    system("mount", "-o", f"remount,size={size}", str(path))


def system(command: str, *arguments: str) -> None:
    subprocess.run([shutil.which(command) or command, *arguments], check=True)


def fill(case: Case, folder: Path, step: int) -> Count:
    """Attempts with more and more room, until one ends."""
    path, count = folder / "disk", Count()
    expected, needed = whole(case, folder)
    pages = used(path) // PAGE
    step = step or max(1, (needed - pages) // 20)
    while True:
        begin(case, folder)
        pages += step
        resize(path, pages * PAGE)
        code, said = run(case.command, folder)
        if code == 0:
            return count
        count.attempts += 1
        wrong = [] if code == 2 else [f"exit code {code}"]
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        if len(lines) != 1 or "Traceback" in said:
            wrong.append(f"says {said[-2000:]!r}")
        wrong += [f"left {left.relative_to(path)}" for left in leftovers(path)]
        resize(path, ROOM)
        code, said = run(case.command, folder)
        if code:
            wrong.append(f"run again: exit code {code}, {said[-2000:]!r}")
        elif different := differing(expected, contents(path)):
            wrong.append(f"run again: other {', '.join(different)}")
        if wrong:
            count.wrong[pages] = "; ".join(wrong)


def whole(case: Case, folder: Path) -> tuple[dict[str, Any], int]:
    """What a run that nobody hinders leaves; and the pages that takes."""
    path = folder / "disk"
    begin(case, folder)
    code, said = run(case.command, folder)
    if code:
        raise SystemExit(f"{case.name}: {said}")
    found, needed = contents(path), used(path) // PAGE
    begin(case, folder)
    return found, needed


def begin(case: Case, folder: Path) -> None:
    """Empties the disk, but for the inputs that the command writes into."""
    path = folder / "disk"
    resize(path, ROOM)
    for child in path.iterdir():
        shutil.rmtree(child) if child.is_dir() else child.unlink()
    for name in case.writes:
        shutil.copytree(folder / name, path / name, ignore=shutil.ignore_patterns("arrays"))


def used(path: Path) -> int:
    stat = os.statvfs(path)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


def run(command: str, folder: Path) -> tuple[int, str]:
    """Exit code and standard error of a command, in a process of its own: of a disk that is full it may die."""
    words = [word.replace("{}", str(folder)).replace("DISK", str(folder / "disk")) for word in command.split()]
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            code = 70
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(said.fileno(), 2)
                code = cli.main(words)
            except BaseException:  # noqa: BLE001 - all that Python would show at the process' end
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read()


def leftovers(path: Path) -> list[Path]:
    """Files that only a job at work should have."""
    return [file for file in path.rglob("*") if file.suffix in (".tmp", ".lock", ".new", ".old")]


def contents(path: Path) -> dict[str, Any]:
    """Of every file that does not tell of times."""
    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        name = str(file.relative_to(path))
        if not file.is_file() or "tensorboard" in name or file.suffix in (".html", ".png") or file.name in TIMES:
            continue
        content = file.read_bytes()
        found[name] = (
            without_times(json.loads(content)) if file.suffix == ".json" else hashlib.sha256(content).hexdigest()
        )
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(own) for key, own in value.items() if key not in TIMES}
    return [without_times(own) for own in value] if isinstance(value, list) else value


def differing(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


if __name__ == "__main__":
    main()
