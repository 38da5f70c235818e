"""The operators on a GPU: side_decode against memory bandwidth and an embedding table, code_attention against flash attention.

    PYTHONPATH=. python benchmarks/on_gpu.py [--requests 512] [--json FILE]

25 trits in one int64, D = 128, H = 4. In attention the peers look up and attend to bfloat16 rows, half the bytes of ours,
which computes in float32.

- ``Tensor.copy_``: bytes read and written a second, the bandwidth of memory that a program can have;
- nn.EmbeddingBag: the sum of 3 prefix n-grams' rows;
- flash: lookup, key and value maps, torch's scaled_dot_product_attention restricted to its flash backend;
- folded: lookup, the key map folded into the query and the value map applied after pooling: two products per event.

Ours starts from queries and packed words, and all end in pooled vectors: [B, D]. One call includes the launches of its
kernels and whatever the CPU does between them.
"""

import argparse
from pathlib import Path

import torch
from comparison import Comparisons, gpu_seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding, embedding_bag, scaled_dot_product_attention

from sidrec_torchrec.codec.alphabet import Ternary
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.ops import cuda
from sidrec_torchrec.ops.code_attention import code_attention
from sidrec_torchrec.ops.side_decode import side_decode

SPEC = SIDSpec((Ternary(),) * 25, "")
DIGITS = SPEC.layout
LAYOUT = list(DIGITS.radices), list(DIGITS.words)
DIM, HEADS, ROWS, NGRAMS = 128, 4, 1_000_000, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, nargs="+", default=[262_144, 4_194_304], help="for side_decode")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1_000, 4_096, 10_000], help="for code_attention")
    parser.add_argument("--requests", type=int, default=512, help="for code_attention")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU")
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    kernels = "Triton" if cuda.is_usable() else f"reference ({cuda.problem()})"
    comparisons = Comparisons(f"Operators on a GPU, 25 trits, D = {DIM}, H = {HEADS}; kernels: {kernels}")
    for events in arguments.events:
        for dtype in (torch.float32, torch.bfloat16):
            compare_decode(comparisons, events, dtype)
    for length in arguments.lengths:
        Attention(arguments.requests, length).compare(comparisons)
    comparisons.finish(arguments.json)


def compare_decode(comparisons: Comparisons, N: int, dtype: torch.dtype) -> None:
    """Adds ``side_decode`` at N events."""
    joined = DIGITS.join()
    table_RD = joined.expand(torch.randn(DIGITS.num_values, DIM)).to(dtype)
    chunks = list(joined.chunks.radices), list(joined.chunks.words)
    words_NW = torch.randint(3**25, (N, 1))
    source_ND, target_ND = torch.randn(2, N, DIM, dtype=dtype)
    ids_N3, rows = torch.randint(ROWS, (N, NGRAMS)), torch.randn(ROWS, DIM, dtype=dtype)
    ours, copying, by_bag = gpu_seconds(
        lambda: side_decode(words_NW, table_RD, *chunks),
        lambda: target_ND.copy_(source_ND),
        lambda: embedding_bag(ids_N3, rows, mode="sum"),
    )
    case, size = f"side_decode/N={N}/{str(dtype)[6:]}", N * DIM * dtype.itemsize
    comparisons.add(case, "bytes/s that must move", (N * 8 + size) / ours, "Tensor.copy_", 2 * size / copying)
    comparisons.add(case, "events/s", N / ours, f"nn.EmbeddingBag, {NGRAMS} n-grams, {ROWS:,} rows", N / by_bag)


class Attention:
    """B requests of T events each, read by codes and by looked-up rows."""

    def __init__(self, B: int, T: int) -> None:
        self.B, self.T = B, T
        self.query_BHd = torch.randn(B, HEADS, DIM // HEADS) * (DIM // HEADS) ** -0.5
        self.rows_VD = torch.randn(DIGITS.num_values, DIM) / 5
        self.key_DD, self.value_DD = torch.randn(2, DIM, DIM) * DIM**-0.5
        self.words_NW = torch.randint(3**25, (B * T, 1))
        self.end_B = torch.arange(1, B + 1) * T
        self.table = torch.randn(ROWS, DIM, dtype=torch.bfloat16)
        self.ids_BT = torch.randint(ROWS, (B, T))

    def compare(self, comparisons: Comparisons) -> None:
        """Adds forward, forward + backward (gradients of queries and maps), and the error."""
        with torch.no_grad():
            self._add(comparisons, "events/s", *gpu_seconds(self.by_codes, self.flash, self.folded))
            error, in_float32 = self._errors(min(8, self.B))
        case = f"code_attention/T={self.T}"
        comparisons.add(case, "relative error", error, "decode, then attend", in_float32, lower_is_better=True)
        for tensor in (self.query_BHd, self.key_DD, self.value_DD):
            tensor.requires_grad_()
        runs = [lambda run=run: run().float().sum().backward() for run in (self.by_codes, self.flash, self.folded)]
        self._add(comparisons, "events/s, forward + backward", *gpu_seconds(*runs, calls=3))

    def by_codes(self) -> Tensor:
        k_VHd = (self.rows_VD @ self.key_DD).unflatten(1, (HEADS, -1))
        scores_BVH = torch.einsum("bhd,vhd->bvh", self.query_BHd, k_VHd)
        mass_BVH, _ = code_attention(
            self.words_NW, self.end_B - self.T, self.end_B, scores_BVH, None, None, None, *LAYOUT, 0, True
        )
        v_VHd = (self.rows_VD @ self.value_DD).unflatten(1, (HEADS, -1))
        return torch.einsum("bvh,vhd->bhd", mass_BVH, v_VHd).flatten(1)

    def flash(self) -> Tensor:
        rows_BTD = embedding(self.ids_BT, self.table)
        k_BHTd, v_BHTd = (
            (rows_BTD @ weight.bfloat16()).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for weight in (self.key_DD, self.value_DD)
        )
        q_BH1d = self.query_BHd.bfloat16().unsqueeze(2)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q_BH1d, k_BHTd, v_BHTd, scale=1.0).flatten(1)

    def folded(self) -> Tensor:
        rows_BTD = embedding(self.ids_BT, self.table)
        folded_BHD = torch.einsum("bhd,ehd->bhe", self.query_BHd, self.key_DD.unflatten(1, (HEADS, -1)))
        weight_BHT = (folded_BHD.bfloat16() @ rows_BTD.transpose(1, 2)).softmax(-1)
        pooled_BHD = (weight_BHT @ rows_BTD).float()
        return torch.einsum("bhe,ehd->bhd", pooled_BHD, self.value_DD.unflatten(1, (HEADS, -1))).flatten(1)

    def _add(self, comparisons: Comparisons, metric: str, ours: float, *peers: float) -> None:
        for peer, taken in zip(("lookup + flash", "lookup + folded"), peers, strict=True):
            events = self.B * self.T
            comparisons.add(f"code_attention/T={self.T}", metric, events / ours, peer, events / taken)

    def _errors(self, B: int) -> list[float]:
        """Relative errors of ours and of float32 against decode-then-attend in float64, for the first requests."""
        exact_BD, in_float32_BD = (self._decode_then_attend(B, dtype) for dtype in (torch.float64, torch.float32))
        ours_BD = self.by_codes()[:B]
        return [float((x.double() - exact_BD).norm() / exact_BD.norm()) for x in (ours_BD, in_float32_BD)]

    def _decode_then_attend(self, B: int, dtype: torch.dtype) -> Tensor:
        words_NW = self.words_NW[: B * self.T]
        vectors_ND = side_decode(words_NW, self.rows_VD.to(dtype), *LAYOUT)
        k_BTHd, v_BTHd = (
            (vectors_ND @ weight.to(dtype)).view(B, self.T, HEADS, -1) for weight in (self.key_DD, self.value_DD)
        )
        weight_BHT = torch.einsum("bhd,bthd->bht", self.query_BHd[:B].to(dtype), k_BTHd).softmax(-1)
        return torch.einsum("bht,bthd->bhd", weight_BHT, v_BTHd).flatten(1)


if __name__ == "__main__":
    main()
