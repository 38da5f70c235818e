"""Flips bits in files of every kind that the jobs write and read, one at a time, and counts what is noticed.

    python benchmarks/flip_bits.py --flips 100

Each flip is followed by reading: an error is one that is noticed; equal data are harmless (padding, say); other data, in
silence, are what nobody wants. The table counts all three.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.data.format import ITEMS_FILE, open_events, open_items, open_users
from sidrec_torchrec.data.item_arrays import map_rows
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.data.sequence_files import open_sequences
from sidrec_torchrec.data.sid_index import SIDLookup, write_index
from sidrec_torchrec.data.sids import open_sids
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.files import read_object, sha256_of
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.jobs import (
    collaborative_vectors,
    decode_sids,
    encode_corpus,
    evaluate,
    export,
    predict,
    train_ranker,
    train_tokenizer,
)
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.training.checkpoints import LAST, Checkpoints
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import quiet


@dataclass(frozen=True)
class Kind:
    """A file, and what reading it gives, as something that can be compared."""

    file: Path
    read: Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=100, help="bits to flip in each file")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--json", type=Path, help="file for the counts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, quiet(), process_group():
        with contextlib.redirect_stdout(io.StringIO()):  # of jobs that print what they found
            kinds = write_kinds(Path(folder))
        counts = {name: flip(kind, arguments.flips, arguments.seed) for name, kind in kinds.items()}
    print(f"{'file':<28}{'noticed':>9}{'harmless':>10}{'silent':>8}")
    for name, count in counts.items():
        print(f"{name:<28}{count['noticed']:>9}{count['harmless']:>10}{count['silent']:>8}")
    if arguments.json:
        arguments.json.write_text(json.dumps(counts, indent=2))


def flip(kind: Kind, flips: int, seed: int) -> dict[str, int]:
    """How many of the flips are noticed, harmless, and silent."""
    content, whole = kind.file.read_bytes(), frozen(kind.read())
    counts = {"noticed": 0, "harmless": 0, "silent": 0}
    for place in np.random.default_rng(seed).integers(0, 8 * len(content), flips).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        kind.file.write_bytes(flipped)
        try:
            counts["harmless" if frozen(kind.read()) == whole else "silent"] += 1
        except (SidrecError, OSError, ValueError, pa.ArrowException):
            counts["noticed"] += 1
    kind.file.write_bytes(content)
    return counts


def write_kinds(folder: Path) -> dict[str, Kind]:
    """A small corpus and all that is made of it."""
    data, sequences = folder / "data", folder / "prepared"
    write_synthetic(SyntheticConfig(items=300, users=80, median_events=40), data)
    prepare(data, sequences, PrepareConfig(cold_fraction=0.2, validation_fraction=0.2))
    tokenizer = train_tokenizer.TrainTokenizerConfig(data=data, out=folder / "tokenizer", epochs=1)
    train_tokenizer.main(tokenizer)
    encode_corpus.main(encode_corpus.EncodeCorpusConfig(data=data, tokenizer=tokenizer.out, out=folder / "sids"))
    ranker = train_ranker.TrainRankerConfig(
        data=data, prepared=sequences, sids=(folder / "sids",), out=folder / "ranker", epochs=1
    )
    train_ranker.main(ranker)
    trained = TrainedRanker.open(ranker.out)
    parts = trained.recipe.open()

    def best() -> dict[str, Any]:
        model = parts.whole(torch.device("cpu"))
        trained.load(model)
        return dict(model.state_dict())

    def last() -> str:
        state = {"place": ""}
        Checkpoints(ranker.out / "checkpoints").load(LAST, state)
        return state["place"]

    checkpoints = ranker.out / "checkpoints"
    (array,) = (sequences / "arrays").glob("sid-*.npy")
    kinds = {
        "items.parquet": Kind(data / "items.parquet", lambda: _items(data)),
        "events.parquet": Kind(data / "events.parquet", lambda: _batches(open_events(data))),
        "users.parquet": Kind(data / "users.parquet", lambda: _batches(open_users(data))),
        "sequences": Kind(sequences / "train" / "part-00000.parquet", lambda: _sequences(sequences)),
        "sequences: index": Kind(sequences / "train" / "_index.arrow", lambda: _sequences(sequences)),
        "seen.npy": Kind(sequences / "seen.npy", lambda: np.array(open_prepared(sequences).seen())),
        "SIDs by row (.npy)": Kind(array, lambda: np.array(map_rows(array))),
        "sids.parquet": Kind(folder / "sids" / "sids.parquet", lambda: open_sids(folder / "sids").read()),
        "checkpoint, best": Kind(next((checkpoints / "best").glob("process-0*.safetensors")), best),
        "checkpoint, best: index": Kind(checkpoints / "best" / "checkpoint.json", best),
        "checkpoint, last: index": Kind(checkpoints / "last" / "checkpoint.json", last),
    }
    jsons = {
        "prepared.json": sequences / "prepared.json",
        "files.json": sequences / "files.json",
        "run.json": ranker.out / "run.json",
        "metrics.json": ranker.out / "metrics.json",
        "manifest.json": folder / "sids" / "manifest.json",
        "arm.json": ranker.out / "trained_on" / "arm.json",
    }
    kinds |= {name: Kind(path, partial(read_object, path)) for name, path in jsons.items()}
    kinds["item_ids.parquet"] = Kind(sequences / "item_ids.parquet", lambda: open_prepared(sequences).item_ids())
    kinds |= results(folder, data, sequences, ranker.out)
    for name in ("tokenizer.pt", "tokenizer.json"):
        file = tokenizer.out / "tokenizer" / name
        kinds[name] = Kind(file, lambda: _tokenizer(tokenizer.out))
    for name in ("codec.pt", "codec.json"):
        kinds[name] = Kind(folder / "sids" / "codec" / name, lambda: _codec(folder / "sids"))
    return kinds


def results(folder: Path, data: Path, sequences: Path, ranker: Path) -> dict[str, Kind]:
    """What is made for others than jobs to read, or joined to the items."""
    collaborative_vectors.main(
        collaborative_vectors.CollaborativeVectorsConfig(data=data, prepared=sequences, out=folder / "collaborative")
    )
    predict.main(predict.PredictConfig(ranker=ranker, newest=2, out=folder / "predicted.parquet"))
    decode_sids.main(
        decode_sids.DecodeSIDsConfig(
            sids=folder / "sids", tokenizer=folder / "tokenizer", out=folder / "decoded.parquet"
        )
    )
    evaluate.main(evaluate.EvaluateConfig(ranker=ranker, out=folder / "evaluated.json"))
    write_index(folder / "sids")
    export.main(export.ExportConfig(ranker=ranker, out=folder / "ranker.pt2", compiled=False))
    digest = sha256_of(folder / "ranker.pt2")

    def fitted() -> torch.Tensor:
        x_ND = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        dpca = DPCA(DPCAConfig(dim=8, stages=parse_stages("ternary*3")))
        dpca.fit(x_ND, checkpoint=folder / "fit.pt")
        return dpca.basis_RD

    fitted()
    return {
        "items with a new column": Kind(
            folder / "collaborative" / ITEMS_FILE, lambda: _items(folder / "collaborative")
        ),
        "predicted.parquet": Kind(folder / "predicted.parquet", lambda: _table(folder / "predicted.parquet")),
        "decoded.parquet": Kind(folder / "decoded.parquet", lambda: _table(folder / "decoded.parquet")),
        "evaluated.json": Kind(folder / "evaluated.json", lambda: read_object(folder / "evaluated.json")),
        "sids.index": Kind(folder / "sids" / "sids.index", lambda: _index(folder / "sids")),
        "checkpoint of DPCA.fit": Kind(folder / "fit.pt", fitted),
        "ranker.pt2, by its sha256": Kind(folder / "ranker.pt2", lambda: _package(folder / "ranker.pt2", digest)),
        "trained_on/item_ids.parquet": Kind(
            ranker / "trained_on" / "item_ids.parquet", lambda: open_prepared(ranker / "trained_on").item_ids()
        ),
    }


def _table(file: Path) -> Any:
    table = pq.read_table(file, page_checksum_verification=True)
    return {"schema": str(table.schema)} | {name: table.column(name) for name in table.column_names}


def _package(file: Path, sha256: str) -> str:
    return str(Scorer(file, sha256=sha256).metadata)


def _index(folder: Path) -> Any:
    lookup = SIDLookup.open(folder, verify=True)
    return vars(lookup)


def _items(data: Path) -> list[Any]:
    items = open_items(data)
    return [(batch.item_ids, batch.sources, batch.targets) for batch in items.batches()]


def _batches(table: Any) -> list[Any]:
    return [vars(batch) if hasattr(batch, "__dict__") else batch for batch in table.batches()]


def _sequences(folder: Path) -> list[Any]:
    with open_sequences(folder / "train") as files:
        return [vars(row) for group in range(files.num_groups) for row in files.rows(group)]


def _tokenizer(folder: Path) -> Any:
    tokenizer = Tokenizer.load(folder)
    vocabularies = {name: vocabulary.to_json() for name, vocabulary in tokenizer.vocabularies.items()}
    return dict(tokenizer.model.state_dict()), vocabularies, str(tokenizer.model.config)


def _codec(folder: Path) -> Any:
    codec = Codec.load(folder)
    return codec.offset_D, codec.digit_tables, codec.spec.fingerprint, str(codec.spec.stages)


def frozen(value: Any) -> bytes:
    """Equal for what is equal, bit for bit."""
    out = io.BytesIO()
    _freeze(value, out)
    return out.getvalue()


def _freeze(value: Any, out: io.BytesIO) -> None:
    if isinstance(value, torch.Tensor):
        value = value.detach().numpy()
    if isinstance(value, pa.Array | pa.ChunkedArray):
        value = value.to_pylist()
    if isinstance(value, np.ndarray) and value.dtype != object:
        out.write(f"{value.dtype}{value.shape}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            out.write(str(key).encode())
            _freeze(value[key], out)
    elif isinstance(value, list | tuple):
        for part in value:
            _freeze(part, out)
    else:
        out.write(repr(value).encode())


if __name__ == "__main__":
    main()
