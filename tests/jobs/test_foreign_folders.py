"""Folders of others: whatever their files hold, reading them runs none of it."""

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.jobs import encode_corpus, evaluate, train_ranker
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.training.progress import quiet


class Payload:
    """Its pickle touches a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def payloads(touched: Path) -> list[bytes]:
    """As a pickle, as torch saves one, old and new, and as numpy does."""
    contents = [pickle.dumps(Payload(touched))]
    for is_new in (True, False):
        file = io.BytesIO()
        torch.save({"offset": Payload(touched)}, file, _use_new_zipfile_serialization=is_new)
        contents.append(file.getvalue())
    file = io.BytesIO()
    np.save(file, np.array([Payload(touched)], dtype=object), allow_pickle=True)
    return [*contents, file.getvalue()]


def test_no_payload_runs(corpus, prepared, sids, tmp_path):
    touched = tmp_path / "touched"
    for load in (pickle.loads, lambda content: torch.load(io.BytesIO(content), weights_only=False)):
        load(payloads(touched)[0 if load is pickle.loads else 1])
        touched.unlink()  # they would

    for name, folder in {"data": corpus, "prepared": prepared, "sids": sids["side"].parent}.items():
        shutil.copytree(folder, tmp_path / name)
    ranker = train_ranker.TrainRankerConfig(
        data=tmp_path / "data",
        prepared=tmp_path / "prepared",
        out=tmp_path / "ranker",
        arm="side",
        sids=(tmp_path / "sids" / "side",),
        epochs=1,
        batch_events=2048,
        model=RankerConfig(dim=16, num_heads=2, head_dims=(16, 8)),
    )
    train_ranker.main(ranker)
    tokenizer = tmp_path / "sids" / "tokenizers" / "side"
    encode = encode_corpus.EncodeCorpusConfig(data=ranker.data, tokenizer=tokenizer, out=tmp_path / "encoded")
    readers: dict[Path, Callable[[], object]] = {
        ranker.out: lambda: evaluate.main(evaluate.EvaluateConfig(ranker=ranker.out)),
        ranker.out / "checkpoints" / "last": lambda: _resume(ranker),
        ranker.prepared: lambda: evaluate.main(evaluate.EvaluateConfig(ranker=ranker.out)),
        ranker.sids[0]: lambda: (Codec.load(ranker.sids[0]), evaluate.main(evaluate.EvaluateConfig(ranker=ranker.out))),
        tokenizer: lambda: (Tokenizer.load(tokenizer), encode_corpus.main(encode)),
    }
    tried = 0
    with quiet():
        for folder, read in readers.items():
            files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
            for file in files:
                content = file.read_bytes()
                for payload in payloads(touched):
                    file.write_bytes(payload)
                    _try(read)
                    tried += 1
                    assert not touched.exists(), f"{file}: ran"
                    shutil.rmtree(encode.out, ignore_errors=True)
                file.write_bytes(content)
    assert tried > 100


def _try(read: Callable[[], object]) -> None:
    try:
        read()
    except (SidrecError, OSError, UnicodeDecodeError):
        return


def _resume(config: train_ranker.TrainRankerConfig) -> None:
    result = config.out / "metrics.json"
    result.rename(result.with_suffix(".kept"))
    try:
        train_ranker.main(config)
    finally:
        result.with_suffix(".kept").rename(result)
