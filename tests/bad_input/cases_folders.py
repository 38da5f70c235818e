"""Folders that jobs wrote, and requests: edited, cut short, missing, of other jobs."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_input.kinds import Folder, Kind
from tests.bad_input.spoils import Spoil, cut, written

EVALUATE = "evaluate --ranker {}/ranker"
ON_PREPARED = EVALUATE + " --prepared {}/prepared"
TRAIN = "train-ranker --data {}/data --prepared {}/prepared --out {}/out --arm none --epochs 1"
TRAIN_SIDE = "train-ranker --data {}/data --prepared {}/prepared --sids {}/sids --out {}/out --arm side --epochs 1"
ENCODE = "encode-corpus --data {}/data --tokenizer {}/tokenizer --out {}/out"
APPEND = "encode-corpus --data {}/data --tokenizer {}/tokenizer --out {}/sids --append true"
COLLISIONS = "codec collisions --sids {}/sids"
DECODE = "decode-sids --sids {}/sids --tokenizer {}/tokenizer --out {}/decoded.parquet"
PREDICT = "predict --ranker {}/ranker --requests {}/requests.parquet --out {}/p.parquet"


# of training that began, and goes on once the sequences are what they were
BEGUN = (
    "out",
    "out/run.json",
    "out/trained_on",
    "out/trained_on/",
    "out/tensorboard",
    "out/tensorboard/",
    "out/checkpoints",
    "out/checkpoints/",
)


def byte(file: str, place: float = 0.5) -> Spoil:
    """Another byte at this share of the file."""

    def spoil(folder: Folder) -> None:
        content = bytearray((folder / file).read_bytes())
        content[int(place * len(content))] ^= 4
        (folder / file).write_bytes(content)

    return spoil


def footer(file: str) -> Spoil:
    """Another letter in a Parquet file's footer, which has no checksum: whoever reads it is none the wiser."""

    def spoil(folder: Folder) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content.replace(b"parquet-cpp-arrow", b"parquet-cpp-arroW"))

    return spoil


def edited(file: str, **fields: object) -> Spoil:
    def spoil(folder: Folder) -> None:
        value = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(fields | value | fields))

    return spoil


def gone(file: str) -> Spoil:
    def spoil(folder: Folder) -> None:
        path = folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def foreign(file: str, other: str) -> Spoil:
    """The file of the folder's namesake in another folder."""
    return lambda folder: shutil.copyfile(folder / other, folder / file)


def requests(**columns: object) -> Spoil:
    """Requests of a user that is there; a column that is None is left out."""

    def spoil(folder: Folder) -> None:
        events = pq.read_table(folder / "data/events.parquet").slice(0, 2).select(["user_id", "item_id", "timestamp"])
        values = {name: events.column(name) for name in events.column_names} | columns
        pq.write_table(pa.table({k: v for k, v in values.items() if v is not None}), folder / "requests.parquet")

    return spoil


PREPARED = [
    Kind("no prepared folder", "evaluate --ranker {}/ranker --prepared {}/nowhere", "prepared.json: not found"),
    Kind(
        "a data folder named as a prepared one",
        "evaluate --ranker {}/ranker --prepared {}/data",
        "prepared.json: not found",
    ),
    *(
        Kind(f"a byte changed in {file}", TRAIN, says, byte(f"prepared/sequences/{file}"), leaves=BEGUN)
        for file, says in (
            ("train/part-00000.parquet", "part-00000.parquet: not what was written"),
            ("test/_index.arrow", "_index.arrow: not what was written"),
        )
    ),
    *(
        Kind(f"a byte changed in {file}", TRAIN, says, byte(f"prepared/sequences/{file}"))
        for file, says in (
            ("prepared.json", "prepared.json: not"),
            ("files.json", "files.json: not"),
            ("seen.npy", "seen.npy: not what was written"),
            ("item_ids.parquet", "item_ids.parquet: not what was written"),
        )
    ),
    Kind(
        "an edited prepared.json",
        TRAIN,
        "prepared.json: not what was written",
        edited("prepared/sequences/prepared.json", num_items=3),
    ),
    Kind(
        "a prepared.json that is a list",
        TRAIN,
        "prepared.json: holds no JSON object",
        written("prepared/sequences/prepared.json", b"[]"),
    ),
    Kind(
        "a prepared.json of another version",
        TRAIN,
        "prepared.json: of another version",
        written("prepared/sequences/prepared.json", b'{"a": 1}'),
    ),
    Kind(
        "a prepared folder without a part of its sequences",
        TRAIN,
        "part-00000.parquet: is not there any more",
        gone("prepared/sequences/train/part-00000.parquet"),
        leaves=BEGUN,
    ),
    Kind(
        "a folder where an array should be",
        TRAIN,
        "seen.npy: is not there any more",
        lambda f: ((f / "prepared/sequences/seen.npy").unlink(), (f / "prepared/sequences/seen.npy").mkdir()),
    ),
    Kind(
        "data that is not there any more",
        TRAIN,
        "data/items.parquet: not found; name the data that",
        lambda f: (f / "data").rename(f / "elsewhere"),
    ),
    Kind(
        "items that changed since prepare",
        TRAIN,
        "not the items that",
        lambda f: f.table("data/items.parquet", lambda t: t.slice(1)),
    ),
]

TOKENIZERS = [
    Kind("no tokenizer", "encode-corpus --data {}/data --tokenizer {}/nowhere --out {}/out", "not found"),
    Kind(
        "a ranker named as a tokenizer", "encode-corpus --data {}/data --tokenizer {}/ranker --out {}/out", "not found"
    ),
    Kind("a tokenizer without weights", ENCODE, "tokenizer.pt: not found", gone("tokenizer/tokenizer/tokenizer.pt")),
    Kind(
        "a tokenizer without a description",
        ENCODE,
        "tokenizer.json: not found",
        gone("tokenizer/tokenizer/tokenizer.json"),
    ),
    Kind("a byte changed in tokenizer.pt", ENCODE, "tokenizer", byte("tokenizer/tokenizer/tokenizer.pt")),
    Kind(
        "a byte changed in tokenizer.json",
        ENCODE,
        "not what was written",
        byte("tokenizer/tokenizer/tokenizer.json", 0.6),
    ),
    Kind(
        "half of tokenizer.pt", ENCODE, "not a tokenizer, or a broken one", cut("tokenizer/tokenizer/tokenizer.pt", 0.5)
    ),
    Kind(
        "an empty tokenizer.json",
        ENCODE,
        "not a tokenizer, or a broken one",
        written("tokenizer/tokenizer/tokenizer.json", b""),
    ),
    Kind(
        "weights of another tokenizer",
        ENCODE,
        "tokenizer",
        lambda f: foreign("tokenizer/tokenizer/tokenizer.pt", "other_tokenizer/tokenizer/tokenizer.pt")(f),
    ),
    Kind(
        "items without a source of the tokenizer",
        ENCODE,
        "text_emb",
        lambda f: f.table("data/items.parquet", lambda t: t.drop_columns(["text_emb"])),
    ),
    Kind(
        "vectors of another width than the tokenizer's",
        ENCODE,
        "text_emb",
        lambda f: f.column("data/items.parquet", "text_emb", [1.0] * 9),
    ),
    Kind(
        "SIDs of another tokenizer to add to",
        "encode-corpus --data {}/data --tokenizer {}/other_tokenizer --out {}/sids --append true",
        "sids",
    ),
    Kind(
        "items that changed, and an old --out",
        "encode-corpus --data {}/data --tokenizer {}/tokenizer --out {}/sids",
        "was made from other inputs",
        lambda f: f.table("data/items.parquet", lambda t: t.slice(1)),
    ),
]

SIDS = [
    Kind("no SIDs", "codec collisions --sids {}/nowhere", "nowhere"),
    Kind("a tokenizer named as SIDs", "codec collisions --sids {}/tokenizer", "tokenizer"),
    Kind("a byte changed in sids.parquet", COLLISIONS, "sids.parquet", byte("sids/sids.parquet")),
    Kind("a byte changed in a manifest of SIDs", COLLISIONS, "manifest.json: not", byte("sids/manifest.json")),
    Kind(
        "an edited manifest of SIDs",
        COLLISIONS,
        "manifest.json: not what was written",
        edited("sids/manifest.json", capacity=3),
    ),
    Kind("half of sids.parquet", COLLISIONS, "sids.parquet", cut("sids/sids.parquet", 0.5)),
    Kind(
        "a SID file of another codec",
        COLLISIONS,
        "sids.parquet",
        foreign("sids/sids.parquet", "other_sids/sids.parquet"),
    ),
    Kind("a manifest of another codec", COLLISIONS, "", foreign("sids/manifest.json", "other_sids/manifest.json")),
    Kind(
        "a codec folder of another codec",
        TRAIN_SIDE,
        "",
        lambda f: (shutil.rmtree(f / "sids/codec"), shutil.copytree(f / "other_sids/codec", f / "sids/codec")),
    ),
    Kind("a codec without its tables", TRAIN_SIDE, "codec.pt: not found", gone("sids/codec/codec.pt")),
    Kind("a codec without its description", TRAIN_SIDE, "codec", gone("sids/codec/codec.json")),
    Kind(
        "a byte changed in codec.pt",
        TRAIN_SIDE,
        "codec: not a codec, or a broken one",
        byte("sids/codec/codec.pt", 0.4),
    ),
    Kind("a byte changed in codec.json", TRAIN_SIDE, "codec", byte("sids/codec/codec.json")),
    Kind(
        "SIDs of another tokenizer to decode",
        "decode-sids --sids {}/sids --tokenizer {}/other_tokenizer --out {}/decoded.parquet",
        "made with codec",
    ),
    Kind(
        "SIDs of fewer items than the data's",
        TRAIN_SIDE,
        "sids",
        lambda f: f.table("sids/sids.parquet", lambda t: t.slice(1)),
    ),
]

RANKERS = [
    Kind("no ranker", "evaluate --ranker {}/nowhere", "run.json: not found"),
    Kind("a tokenizer named as a ranker", "evaluate --ranker {}/tokenizer", "not of a ranker this version can read"),
    Kind("a ranker without checkpoints", EVALUATE, "no trained epoch yet", gone("ranker/checkpoints")),
    Kind("a byte changed in run.json", EVALUATE, "run.json: not", byte("ranker/run.json")),
    Kind("an edited run.json", EVALUATE, "run.json: not what was written", edited("ranker/run.json", arm="none")),
    Kind(
        "a byte changed in a checkpoint",
        EVALUATE,
        "process-0.safetensors",
        byte("ranker/checkpoints/best/process-0.safetensors"),
    ),
    Kind(
        "a byte changed in a checkpoint's index",
        EVALUATE,
        "checkpoint.json",
        byte("ranker/checkpoints/best/checkpoint.json"),
    ),
    Kind(
        "a checkpoint without tensors",
        EVALUATE,
        "process-0.safetensors",
        gone("ranker/checkpoints/best/process-0.safetensors"),
    ),
    Kind(
        "a checkpoint cut short",
        EVALUATE,
        "process-0.safetensors",
        cut("ranker/checkpoints/best/process-0.safetensors", 0.3),
    ),
    Kind("a byte changed in arm.json", EVALUATE, "arm.json: not", byte("ranker/trained_on/arm.json")),
    Kind("SIDs of another codec to evaluate with", EVALUATE + " --sids {}/other_sids", "SIDs of codec"),
    Kind("a package that is no package", "export --ranker {}/nowhere --out {}/r.pt2", "run.json: not found"),
    Kind("another job's folder as --out", "prepare --data {}/data --out {}/tokenizer", "holds another run"),
    Kind(
        "a folder of something else as --out", "prepare --data {}/data --out {}/data", "holds files of something else"
    ),
    Kind(
        "another protocol into an old --out",
        "prepare --data {}/data --out {}/prepared --max-history 7",
        "holds another run",
    ),
]

REQUESTS = [
    Kind("no requests file", PREDICT, "requests.parquet: no such file", lambda f: None),
    Kind("an empty requests file", PREDICT, "requests.parquet: not a Parquet file", written("requests.parquet", b"")),
    Kind("requests without a user", PREDICT, "no required column 'user_id'", requests(user_id=None)),
    Kind("requests without a time", PREDICT, "no required column 'timestamp'", requests(timestamp=None)),
    Kind("requests without an item", PREDICT, "no required column 'item_id'", requests(item_id=None)),
    Kind("requests of an item that is not there", PREDICT, "is not in", requests(item_id=[10**9, 1])),
    Kind("requests of items called by text", PREDICT, "item_id", requests(item_id=["a", "b"])),
    Kind("requests of users called by text", PREDICT, "user_id", requests(user_id=["a", "b"])),
    Kind(
        "requests of null", PREDICT, "null; every row needs a value", requests(user_id=pa.array([None, 1], pa.int64()))
    ),
    Kind("requests before 1970", PREDICT, "is below 0", requests(timestamp=[-5, -4])),
    Kind("requests at NaN", PREDICT, "a time is not finite", requests(timestamp=[float("nan"), 1.0])),
    Kind("requests at milliseconds", PREDICT, "--time-unit ms", requests(timestamp=[1_700_000_000_000] * 2)),
    Kind("requests with a column that predictions have", PREDICT, "probability", requests(probability=[0.5, 0.5])),
]
CASES = [*PREPARED, *TOKENIZERS, *SIDS, *RANKERS, *REQUESTS]
