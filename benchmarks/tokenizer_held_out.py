"""What a tokenizer keeps of items it has not seen: VQ Fusion against its own closed-form start and against residual VQ.

    python benchmarks/tokenizer_held_out.py --data DATA --source text_emb --source image_emb [--target category]

A quarter of the items is held out of everything. Prints, per tokenizer, the relative squared error of each source (1: as
bad as the mean) and the accuracy of each target on these items, and each error as a share of the peer's.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sidrec_torchrec.data.format import open_items
from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionOptions
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.report import TokenizerReport
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.jobs import train_tokenizer
from sidrec_torchrec.jobs.train_tokenizer import TrainTokenizerConfig

HELD_OUT = 0.25


@dataclass(frozen=True)
class Bench:
    """The data, and where tokenizers are put."""

    data: Path
    folder: Path
    held_out: np.ndarray

    def measure(self, name: str, sources: tuple[str, ...], targets: tuple[str, ...], **changes: Any) -> dict[str, Any]:
        """Trains a tokenizer without the held-out items; its report on these."""
        exclude = self.folder / "held_out.parquet"
        pq.write_table(pa.table({"item_id": self.held_out}), exclude)
        out = self.folder / name
        start = time.monotonic()
        train_tokenizer.main(
            TrainTokenizerConfig(data=self.data, out=out, source=sources, target=targets, exclude=exclude, **changes)
        )
        seconds = time.monotonic() - start
        tokenizer = Tokenizer.load(out / "tokenizer")
        report, words = TokenizerReport(tokenizer), []
        for item_ids_N, block in ItemStream.open(self.data, sources, tokenizer.vocabularies).blocks():
            items = block.select(torch.from_numpy(np.flatnonzero(np.isin(item_ids_N, self.held_out))))
            report.update(items, tokenizer.digits(items))
            words.append(tokenizer.encode(items).numpy())
        return report.result(np.concatenate(words)) | {"seconds": seconds}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--source", action="append", required=True)
    parser.add_argument("--target", action="append", default=[])
    parser.add_argument("--stages", default="ternary*25")
    parser.add_argument("--rq-stages", default="onehot:256*3")
    arguments = parser.parse_args()
    sources, targets = tuple(arguments.source), tuple(arguments.target)
    ids = open_items(arguments.data).ids()
    held_out = np.sort(np.random.default_rng(1).permutation(ids)[: int(len(ids) * HELD_OUT)])
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments.data, Path(folder), held_out)
        model = VQFusionOptions(quantizer=QuantizerConfig(stages=arguments.stages))
        start = bench.measure("start", sources, targets, model=model, epochs=0)
        trained = bench.measure("trained", sources, targets, model=model)
        rq = VQFusionOptions(quantizer=QuantizerConfig(kind="rq", stages=arguments.rq_stages))
        traditional = {source: bench.measure(f"rq-{source}", (source,), (), model=rq) for source in sources}
    print(f"{len(held_out):,} of {len(ids):,} items held out of training\n")
    print("| | bits | " + " | ".join([*sources, *targets, "seconds"]) + " |")
    print("|---|---|" + "---|" * (len(sources) + len(targets) + 1))
    _row("closed-form start: PCA, then DPCA", start, sources, targets)
    _row("VQ Fusion", trained, sources, targets)
    for source, result in traditional.items():
        _row(f"residual VQ of {source} alone", result, sources, targets)
    for source in sources:
        error = _error(trained, source)
        print(
            f"\n{source}: VQ Fusion's error is {error / _error(start, source):.3f} of its start's, "
            f"{error / _error(traditional[source], source):.3f} of residual VQ's",
            end="",
        )
    print()


def _error(result: dict[str, Any], source: str) -> float:
    return result["reconstruction"][source][-1]


def _row(name: str, result: dict[str, Any], sources: tuple[str, ...], targets: tuple[str, ...]) -> None:
    cells = [f"{_error(result, s):.4f}" if s in result["reconstruction"] else "" for s in sources]
    cells += [f"{result['accuracy'][t][-1]:.3f}" if t in result["accuracy"] else "" for t in targets]
    print(f"| {name} | {result['bits']:.1f} | " + " | ".join([*cells, f"{result['seconds']:.0f}"]) + " |")


if __name__ == "__main__":
    main()
