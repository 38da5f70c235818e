"""The K best of T events by codes against the same search over vectors: candidates of one request, T = 10,000, K = 64.

    python benchmarks/top_events.py [--threads 1] [--json FILE]

Ours: ``top_events`` from packed SIDs (25 trits) and a table of 75 scores per candidate, which a product of each candidate
with the 75 rows of the digits gives, and which is timed too. The peer, on as many events: rows of 64 floats looked up in a
table of a million items, their products with the candidates, and torch.topk. Its parts are timed as well. What ours chooses is
checked in the same run, against float64 scores of decoded vectors.
"""

import argparse
from pathlib import Path

import torch
from comparison import Comparisons, seconds
from side_decode import SPEC, _kernels
from torch import Tensor
from torch.nn.functional import embedding

from sidrec_torchrec.ops.side_decode import side_decode
from sidrec_torchrec.ops.top_events import top_events

ROWS, DIM = 1_000_000, 64
RADICES, WORDS = list(SPEC.layout.radices), list(SPEC.layout.words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 100])
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    title = f"top_events, T = {arguments.events}, K = {arguments.k}, D = {DIM}; kernels: {_kernels()}"
    comparisons = Comparisons(title)
    table_ID = torch.randn(ROWS, DIM)
    for M in arguments.candidates:
        compare(comparisons, table_ID, M, arguments.events, arguments.k)
    comparisons.finish(arguments.json)


def compare(comparisons: Comparisons, table_ID: Tensor, M: int, T: int, k: int) -> None:
    """Adds the time of M candidates of one request, and whether the choice is right."""
    query_MD, rows_VD = torch.randn(M, DIM), torch.randn(sum(RADICES), DIM) / 5
    words_N1 = torch.randint(3**25, (T, 1))
    begin_M, end_M = torch.zeros(M, dtype=torch.int64), torch.full((M,), T)
    histories = torch.randint(ROWS, (64, T))  # each call reads other rows, as requests do
    vectors_TD = embedding(histories[0], table_ID)
    score_MT = query_MD @ vectors_TD.T
    calls = iter(range(1 << 40))

    def ours() -> tuple[Tensor, Tensor]:
        scores_MVH = (query_MD @ rows_VD.T).unsqueeze(2)
        return top_events(words_N1, begin_M, end_M, scores_MVH, None, None, None, RADICES, WORDS, 0, k)

    def look_up() -> Tensor:
        return embedding(histories[next(calls) % len(histories)], table_ID)

    taken, *peers = seconds(
        ours,
        lambda: (query_MD @ look_up().T).topk(k),
        lambda: (query_MD @ vectors_TD.T).topk(k),
        look_up,
        lambda: score_MT.topk(k),
    )
    names = ("look up, product, topk", "product, topk, rows at hand", "look-up alone", "topk alone")
    for name, peer in zip(names, peers, strict=True):
        comparisons.add(f"M={M}", "ms a request", taken * 1e3, name, peer * 1e3, lower_is_better=True)
    exact_MT = query_MD.double() @ decode(words_N1, rows_VD.double()).T
    right = exact_MT.topk(k).indices
    found = (ours()[0].squeeze(2), (query_MD @ decode(words_N1, rows_VD).T).topk(k).indices)
    share, peer_share = (float((right.unsqueeze(2) == x.unsqueeze(1)).any(2).double().mean()) for x in found)
    comparisons.add(f"M={M}", "share of float64's choice", share, "decode, product, topk", peer_share)


def decode(words_N1: Tensor, rows_VD: Tensor) -> Tensor:
    """The vectors of events, [T, D]."""
    chunks = SPEC.layout.join()
    return side_decode(words_N1, chunks.expand(rows_VD), list(chunks.chunks.radices), list(chunks.chunks.words))


if __name__ == "__main__":
    main()
