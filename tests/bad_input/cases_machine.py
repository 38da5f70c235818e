"""Disks, caches, locks, names: what the machine does, or another process."""

import errno
import fcntl
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from sidrec_torchrec import files
from tests.bad_input.kinds import Folder, Kind

PREPARE = "prepare --data {}/data --out {}/out"
ENCODE = "encode-corpus --data {}/data --tokenizer {}/tokenizer --out {}/out"
TRAIN = "train-tokenizer --data {}/data --out {}/out --epochs 1"
# whole files from which the same command goes on; no checkpoint that is not whole
GOES_ON = (
    "out",
    "out/run.json",
    "out/parts",
    "out/parts/",
    "out/sids.parquet",
    "out/tensorboard",
    "out/tensorboard/",
    "out/checkpoints",
)
TRAIN_SIDE = "train-ranker --data {}/data --prepared {}/prepared --sids {}/sids --out {}/out --arm side"
COLLISIONS = "codec collisions --sids {}/sids"
DISAMBIGUATE = "codec disambiguate --sids {}/sids --out {}/out"
PREDICT = "predict --ranker {}/ranker --newest 1 --out {}/out.parquet"


def limited(size: int) -> Callable[[Folder], Callable[[], None]]:
    """No file may grow beyond ``size`` bytes, as on a disk that is full then; undone afterwards."""

    def spoil(folder: Folder) -> Callable[[], None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return spoil


def full_at(number: int) -> Callable[[Folder], Callable[[], None]]:
    """The disk is full when a job gives its ``number``-th file or folder its name."""

    def spoil(folder: Folder) -> Callable[[], None]:
        replace, left = files.replace_path, [number]

        def replaced(new: Path, path: Path) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            replace(new, path)

        patch = mock.patch.object(files, "replace_path", replaced)
        patch.start()
        return patch.stop

    return spoil


def locked(name: str) -> Callable[[Folder], Callable[[], None]]:
    """Another process holds the folder's lock."""

    def spoil(folder: Folder) -> Callable[[], None]:
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "run.lock", "w")  # noqa: SIM115 - held until it is undone
        lock.write("process 7 on worker\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock.close

    return spoil


def environment(**values: str) -> Callable[[Folder], Callable[[], None]]:
    def spoil(folder: Folder) -> Callable[[], None]:
        patch = mock.patch.dict(os.environ, values)
        patch.start()
        return patch.stop

    return spoil


def port_in_use(folder: Folder) -> Callable[[], None]:
    """A process group is to meet at a port that somebody else listens on."""
    server = socket.create_server(("127.0.0.1", 0))
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    undo = environment(**values, MASTER_PORT=str(server.getsockname()[1]))(folder)

    def both() -> None:
        undo()
        server.close()

    return both


def file_at(name: str) -> Callable[[Folder], object]:
    return lambda folder: (folder / name).write_text("a file")


def fifo_at(name: str) -> Callable[[Folder], object]:
    return lambda folder: os.mkfifo(folder / name)


def loop_at(name: str) -> Callable[[Folder], object]:
    return lambda folder: (folder / name).symlink_to(name)


def folder_at(name: str) -> Callable[[Folder], object]:
    return lambda folder: (folder / name).mkdir()


NOTHING_THERE = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    "SIDREC_STORAGE_MINUTES": "0",
}


CASES = [
    Kind(
        "a URL that no library reads",
        "data validate --data gopher://host/data",
        "nothing here reads URLs of gopher://",
    ),
    Kind(
        "a URL with credentials",
        "data validate --data s3://key:secret@bucket/data",
        "a URL of s3:// with credentials, which would end in logs",
    ),
    Kind("a URL where nothing is", "data validate --data file:///no/such/folder", "no/such/folder: no such folder"),
    Kind(
        "a store that does not answer",
        PREPARE.replace("{}/out", "s3://bucket/out"),
        "s3://bucket/out: tried 1 times",
        environment(**NOTHING_THERE),
    ),
    Kind(
        "minutes to try a store again that are none",
        PREPARE.replace("{}/out", "s3://bucket/out"),
        "SIDREC_STORAGE_MINUTES is 'soon'; give a number of minutes",
        environment(**NOTHING_THERE | {"SIDREC_STORAGE_MINUTES": "soon"}),
    ),
    Kind("a file where the output folder should be", PREPARE, "File exists", file_at("out")),
    Kind(
        "a file above the output folder", "prepare --data {}/data --out {}/file/out", "Not a directory", file_at("file")
    ),
    Kind("an output folder where nothing can be written", "prepare --data {}/data --out /proc/sidrec", "/proc/sidrec"),
    Kind("an output folder in /dev/null", "prepare --data {}/data --out /dev/null/out", "Not a directory"),
    Kind("a symlink to itself as output", PREPARE, "out", loop_at("out")),
    Kind("a FIFO as output folder", PREPARE, "File exists", fifo_at("out")),
    Kind("a name too long for the disk", "prepare --data {}/data --out {}/" + 300 * "x", "File name too long"),
    Kind(
        "a folder where the output file should be",
        "decode-sids --sids {}/sids --tokenizer {}/tokenizer --out {}/here",
        "here: is a folder, where a file is to be written",
        folder_at("here"),
    ),
    *(
        Kind(
            f"a disk that is full after {size} bytes of a file, in {command.split()[0]}",
            command,
            "File too large",
            limited(size),
            leaves=GOES_ON,
        )
        for command, sizes in (
            (PREPARE, (0, 200, 2000)),
            (TRAIN, (0, 4000)),
            (ENCODE, (0, 300)),
            (DISAMBIGUATE, (2000,)),  # of codec.pt
            (PREDICT, (200,)),
            (COLLISIONS + " --json {}/out.json", (200,)),
        )
        for size in sizes
    ),
    *(
        Kind(
            f"a disk that is full at result {n} of {command.split()[0]}",
            command,
            "No space left on device",
            full_at(n),
            leaves=GOES_ON,
        )
        for command, count in ((PREPARE, 6), (ENCODE, 4), (TRAIN, 1))
        for n in range(1, count + 1)
    ),
    Kind(
        "another process at work in the output folder",
        "prepare --data {}/data --out {}/prepared",
        "process 7 on worker is working in it",
        locked("prepared"),
    ),
    Kind(
        "another process at work in a new output folder", TRAIN, "process 7 on worker is working in it", locked("out")
    ),
    Kind("a port that is in use", PREPARE, "the processes cannot meet at 127.0.0.1", port_in_use),
    Kind("a timeout of text", PREPARE, "SIDREC_TIMEOUT_MINUTES", environment(SIDREC_TIMEOUT_MINUTES="soon")),
    Kind(
        "a folder in place of run.json",
        PREPARE,
        "run.json: not a file",
        lambda f: (f / "out/run.json").mkdir(parents=True),
    ),
    Kind(
        "a FIFO in place of run.json",
        PREPARE,
        "run.json: not a file",
        lambda f: ((f / "out").mkdir(), os.mkfifo(f / "out/run.json")),
    ),
    Kind(
        "run.json of NUL",
        PREPARE,
        "run.json: not JSON",
        lambda f: ((f / "out").mkdir(), (f / "out/run.json").write_bytes(bytes(20))),
    ),
    Kind(
        "run.json of a number",
        PREPARE,
        "run.json: holds no JSON object",
        lambda f: ((f / "out").mkdir(), (f / "out/run.json").write_text("3")),
    ),
    Kind(
        "a FIFO in place of a tokenizer's weights",
        ENCODE,
        "tokenizer.pt",
        lambda f: (
            (f / "tokenizer/tokenizer/tokenizer.pt").unlink(),
            os.mkfifo(f / "tokenizer/tokenizer/tokenizer.pt"),
        ),
    ),
    Kind(
        "a FIFO in place of an array",
        "train-ranker --data {}/data --prepared {}/prepared --out {}/out --arm none",
        "seen.npy",
        lambda f: ((f / "prepared/sequences/seen.npy").unlink(), os.mkfifo(f / "prepared/sequences/seen.npy")),
    ),
    Kind(
        "a FIFO in place of SIDs",
        COLLISIONS,
        "sids.parquet",
        lambda f: ((f / "sids/sids.parquet").unlink(), os.mkfifo(f / "sids/sids.parquet")),
    ),
    Kind(
        "a FIFO in place of a codec",
        TRAIN_SIDE,
        "codec.json: not a file",
        lambda f: ((f / "sids/codec/codec.json").unlink(), os.mkfifo(f / "sids/codec/codec.json")),
    ),
    Kind(
        "a FIFO in place of a checkpoint's index",
        "evaluate --ranker {}/ranker",
        "checkpoint.json",
        lambda f: (
            (f / "ranker/checkpoints/best/checkpoint.json").unlink(),
            os.mkfifo(f / "ranker/checkpoints/best/checkpoint.json"),
        ),
    ),
]
