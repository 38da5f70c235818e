"""SIDE's decoding against embedding tables: events per second, and the share of memory bandwidth.

    python benchmarks/side_decode.py [--threads 2] [--json FILE]

Ours: 25 trits packed in one int64 -> float32 vectors of width 128. Peers: the sum of 3 prefix n-grams' rows in a table of
a million rows, by nn.EmbeddingBag and by fbgemm's table-batched embedding on CPU; and writing as many vectors of ones.
"""

import argparse
from pathlib import Path

import torch
from comparison import Comparisons, seconds
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from sidrec_torchrec.codec.alphabet import Ternary
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.native import build
from sidrec_torchrec.ops.side_decode import side_decode

SPEC = SIDSpec((Ternary(),) * 25, "")
DIM, ROWS, NGRAMS = 128, 1_000_000, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--events", type=int, nargs="+", default=[32_768, 262_144])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    comparisons = Comparisons(f"side_decode, 25 trits to {DIM} floats; kernels: {_kernels()}")
    with torch.no_grad():
        for events in arguments.events:
            compare(comparisons, events)
    comparisons.finish(arguments.json)


def compare(comparisons: Comparisons, N: int) -> None:
    """Adds the comparisons at N events a call."""
    joined = SPEC.layout.join()
    table_RD = joined.expand(torch.randn(joined.digits.num_values, DIM))
    chunks = list(joined.chunks.radices), list(joined.chunks.words)
    words_NW = torch.randint(3**25, (N, 1))
    ids_N3 = torch.randint(ROWS, (N, NGRAMS))
    bag = torch.nn.EmbeddingBag(ROWS, DIM, mode="sum")
    fbgemm = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_SGD
    )
    offsets_N1 = torch.arange(N + 1) * NGRAMS
    ours, by_torch, by_fbgemm, writing = seconds(
        lambda: side_decode(words_NW, table_RD, *chunks),
        lambda: bag(ids_N3),
        lambda: fbgemm(ids_N3.reshape(-1), offsets_N1),
        lambda: torch.ones(N, DIM),
    )
    case = f"N={N}"
    comparisons.add(case, "events/s", N / ours, f"nn.EmbeddingBag, {NGRAMS} n-grams, {ROWS:,} rows", N / by_torch)
    comparisons.add(case, "events/s", N / ours, f"fbgemm TBE, {NGRAMS} n-grams, {ROWS:,} rows", N / by_fbgemm)
    comparisons.add(case, "bytes/s written", N * DIM * 4 / ours, "torch.ones, a new tensor", N * DIM * 4 / writing)


def _kernels() -> str:
    return f"C++, {' '.join(build.FLAGS)}" if build.is_available() else f"reference ({build.problem() or 'asked for'})"


if __name__ == "__main__":
    main()
