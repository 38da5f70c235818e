"""Code-space attention against dense attention: one candidate per request reads a history of T events.

    python benchmarks/code_attention.py [--threads 2] [--json FILE]

Ours: ``CodeAttention`` from packed SIDs (25 trits) to pooled vectors. Peers, on the same number of events: rows looked up
in a table of a million items, then

- sdpa: keys and values of every event, torch's scaled_dot_product_attention;
- folded: the key map folded into the query and the value map applied after pooling, so that an event costs two products
  of its row with H vectors: the best dense path.

All forward passes end in the pooled vectors [B, D]; forward + backward also gives the gradients of queries and maps (and of
no table). Equality with decode-then-attend is checked in the same run.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from comparison import Comparisons, seconds
from side_decode import SPEC, _kernels
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.side.code_attention import CodeAttention
from sidrec_torchrec.side.expansion import SIDEConfig
from sidrec_torchrec.side.layer_norm_map import LayerNormMap

ROWS = 1_000_000
HEADS = 4
SIZES = {1_000: 128, 4_096: 32, 10_000: 16}  # T: B


class Dense(nn.Module):
    """Target attention over looked-up rows, the maps those of a ``CodeAttention``."""

    def __init__(self, attention: CodeAttention, dim: int) -> None:
        super().__init__()
        self.query, self.output = attention.query, attention.output
        self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.table = torch.randn(ROWS, dim)

    def sdpa(self, query_BD: Tensor, ids_BT: Tensor) -> Tensor:
        rows_BTD = embedding(ids_BT, self.table)
        q_BHTd, k_BHTd, v_BHTd = (
            x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for x in (self.query(query_BD).unsqueeze(1), self.key(rows_BTD), self.value(rows_BTD))
        )
        return self.output(scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd).transpose(1, 2).flatten(1))

    def folded(self, query_BD: Tensor, ids_BT: Tensor) -> Tensor:
        rows_BTD = embedding(ids_BT, self.table)
        D = rows_BTD.shape[2]
        q_BHd = self.query(query_BD).unflatten(1, (HEADS, -1)) * (D // HEADS) ** -0.5
        folded_BHD = torch.einsum("bhd,hde->bhe", q_BHd, self.key.weight.unflatten(0, (HEADS, -1)))
        weight_BHT = (folded_BHD @ rows_BTD.transpose(1, 2)).softmax(-1)
        pooled_BHD = weight_BHT @ rows_BTD
        pooled_BHd = torch.einsum("bhe,hde->bhd", pooled_BHD, self.value.weight.unflatten(0, (HEADS, -1)))
        return self.output(pooled_BHd.flatten(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-memory", type=int, metavar="T", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.peak_memory is not None:
        return _print_peak_memory(arguments.peak_memory)
    comparisons = Comparisons(f"code_attention, D = 128, H = {HEADS}; kernels: {_kernels()}")
    for T, B in SIZES.items():
        compare(comparisons, B, T)
    compare_widths(comparisons)
    compare_memory(comparisons, arguments.threads)
    comparisons.finish(arguments.json)


def make(dim: int = 128, **options) -> CodeAttention:
    """A CodeAttention over 25 trits that decode to ``dim`` floats, read through a LayerNorm."""
    tables = (row * torch.tensor([[-1.0], [0.0], [1.0]]) for row in torch.randn(len(SPEC.stages), 1, dim) / 4)
    codec = Codec(SPEC, torch.zeros(dim), tuple(tables))
    events = SIDEConfig(name="item", feature_names=["history"], codec=codec, mode="decoded")
    return CodeAttention(events, dim, HEADS, vectors=LayerNormMap(dim, dim), **options)


def requests(B: int, T: int, dim: int = 128) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, packed events, and where each query's begin and end."""
    ends_B = torch.arange(1, B + 1) * T
    return torch.randn(B, dim), torch.randint(3**25, (B * T, 1)), ends_B - T, ends_B


def compare(comparisons: Comparisons, B: int, T: int) -> None:
    """Adds forward, forward + backward, and equality at B requests of T events."""
    attention = make()
    dense = Dense(attention, 128)
    query_BD, words_NW, begin_B, end_B = requests(B, T)
    ids_BT = torch.randint(ROWS, (B, T))
    case = f"T={T}"
    with torch.no_grad():
        runs = [
            lambda: attention(query_BD, words_NW, begin_B, end_B),
            lambda: dense.folded(query_BD, ids_BT),
            lambda: dense.sdpa(query_BD, ids_BT),
        ]
        ours, *peers = seconds(*runs)
        for peer, taken in zip(("folded", "sdpa"), peers, strict=True):
            comparisons.add(case, "events/s", B * T / ours, peer, B * T / taken)
        error, dense_error = _errors(attention, query_BD, words_NW, begin_B, end_B)
        # both against float64; at most 1e-5 for ours is the aim
        comparisons.add(case, "relative error", error, "decode, then attend", dense_error, lower_is_better=True)
    query_BD.requires_grad_()
    ours, *peers = seconds(*(_backward(run) for run in runs))
    for peer, taken in zip(("folded", "sdpa"), peers, strict=True):
        comparisons.add(case, "events/s, forward + backward", B * T / ours, peer, B * T / taken)


def _backward(run: Callable[[], Tensor]) -> Callable[[], None]:
    return lambda: run().sum().backward()


def _errors(attention: CodeAttention, query_BD, words_NW, begin_B, end_B) -> tuple[float, float]:
    """Relative errors of code-space attention, and of decode-then-attend in float32, against the latter in float64."""
    attention = copy.deepcopy(attention)
    attention.sink_H.fill_(-torch.inf)  # torch's attention has none
    ours_BD = attention(query_BD, words_NW, begin_B, end_B)
    vectors_ND = attention.event_vectors(words_NW)
    in_float32 = _decode_then_attend(attention, query_BD, vectors_ND, begin_B, end_B)
    for linear in (attention.query, attention.key, attention.value, attention.output):
        linear.double()
    exact = _decode_then_attend(attention, query_BD.double(), vectors_ND.double(), begin_B, end_B)
    return tuple(float((x - exact).norm() / exact.norm()) for x in (ours_BD.double(), in_float32.double()))


def _decode_then_attend(attention: CodeAttention, query_BD, vectors_ND, begin_B, end_B) -> Tensor:
    pooled = []
    for query_1D, begin, end in zip(query_BD.split(1), begin_B.tolist(), end_B.tolist(), strict=True):
        vectors_TD = vectors_ND[begin:end]
        q, k, v = (
            x.unflatten(-1, (HEADS, -1)).transpose(0, 1)
            for x in (attention.query(query_1D), attention.key(vectors_TD), attention.value(vectors_TD))
        )
        pooled.append(scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    return attention.output(torch.cat(pooled))


def compare_widths(comparisons: Comparisons) -> None:
    """Adds throughput at T = 10,000 for widths up to 512 against width 64."""
    T, B = 10_000, SIZES[10_000]
    runs = {}
    for dim in (64, 128, 256, 512):
        attention, inputs = make(dim), requests(B, T, dim)
        runs[dim] = lambda attention=attention, inputs=inputs: attention(*inputs)
    with torch.no_grad():
        narrow, *wide = seconds(*runs.values())
    for dim, taken in zip(list(runs)[1:], wide, strict=True):
        comparisons.add(f"T={T}/D={dim}", "events/s", B * T / taken, "ours, D=64", B * T / narrow)


def compare_memory(comparisons: Comparisons, threads: int) -> None:
    """Adds the memory that ten times as many events take beyond their packed bytes."""
    peaks = {}
    for T in (4_000_000, 40_000_000):
        command = [sys.executable, __file__, "--peak-memory", str(T), "--threads", str(threads)]
        peaks[T] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    few, many = peaks
    growth = (peaks[many] - peaks[few]) / (many - few)
    comparisons.add(
        f"T={many}", "bytes of peak memory an event", growth, "rows of 128 floats", 512, lower_is_better=True
    )


def _print_peak_memory(T: int) -> None:
    attention = make()
    with torch.no_grad():
        attention(*requests(2, T // 2))
    status = Path("/proc/self/status").read_text()  # getrusage would count what this process was forked from
    print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)


if __name__ == "__main__":
    main()
