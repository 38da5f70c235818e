"""``side_decode`` in Triton: bound by the memory its output takes, as long as the rows it sums come from L1."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidrec_torchrec.ops.layout import CodeLayout
from sidrec_torchrec.ops.triton.chunks import chunks_of, next_chunk, on_device_of

_L1_BYTES = 160 << 10  # of the 256 KiB an H100's multiprocessor has, for the table's columns in use
_TILE = 4096  # numbers summed by a program, 32 a thread
_COPIES_BYTES = 16 << 20  # of partial sums in the backward pass; they stay in L2


def side_decode(words_NW: Tensor, table_RD: Tensor, radices: Sequence[int], chunk_words: Sequence[int]) -> Tensor:
    """See ``ops.side_decode``."""
    (N, W), (R, D) = words_NW.shape, table_RD.shape
    _check_size(R, D)
    out_ND = table_RD.new_empty(N, D)
    if not out_ND.numel():
        return out_ND
    block_D = _columns(R, D, table_RD.element_size())
    block_N = _TILE // block_D
    chunks = chunks_of(CodeLayout(tuple(radices), tuple(chunk_words)))
    with on_device_of(words_NW):
        # the events vary fastest: at any time all programs use the same columns of the table, and keep them in L1
        grid = (triton.cdiv(N, block_N), triton.cdiv(D, block_D))
        _decode[grid](words_NW, table_RD, out_ND, N, D, chunks, W, block_N, block_D)
    return out_ND


def side_decode_backward(
    words_NW: Tensor, grad_ND: Tensor, radices: Sequence[int], chunk_words: Sequence[int]
) -> Tensor:
    """See ``ops.side_decode``. Sums by atomic additions: the last bits differ from run to run."""
    (N, W), D, R = words_NW.shape, grad_ND.shape[1], sum(radices)
    _check_size(R, D)
    copies = max(1, min(8, _COPIES_BYTES // max(1, R * D * 4)))  # fewer additions wait for one another
    sums_CRD = torch.zeros(copies, R, D, dtype=torch.float32, device=grad_ND.device)
    if grad_ND.numel():
        block_D = _columns(R, D, 4)
        block_N = _TILE // block_D
        chunks = chunks_of(CodeLayout(tuple(radices), tuple(chunk_words)))
        with on_device_of(words_NW):
            grid = (triton.cdiv(N, block_N), triton.cdiv(D, block_D))
            _decode_backward[grid](words_NW, grad_ND, sums_CRD, N, D, R, copies, chunks, W, block_N, block_D)
    return sums_CRD.sum(0).to(grad_ND.dtype)


def _check_size(rows: int, dim: int) -> None:
    if rows * dim >= 1 << 31:
        raise ValueError(f"a table of {rows} x {dim} numbers; the CUDA kernels take fewer than 2^31")


def _columns(rows: int, dim: int, itemsize: int) -> int:
    """Columns a program sums: as many as leave the table's in L1, and 64 to 512 bytes of them."""
    fitting = max(64, min(512, _L1_BYTES // rows)) // itemsize
    return min(1 << (fitting.bit_length() - 1), triton.next_power_of_2(dim))


@triton.jit
def _decode(
    words, table, out, N, D,
    CHUNKS: tl.constexpr, NUM_WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    event = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = (column < D)[None, :]
    sum_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    rest = event
    for f in tl.static_range(len(CHUNKS)):
        row, rest = next_chunk(rest, words, event, event < N, f, CHUNKS, NUM_WORDS)
        place = row[:, None] * D + column[None, :]
        there = in_row & (row >= 0)[:, None]
        sum_ND += tl.load(table + place, mask=there, other=0, eviction_policy="evict_last").to(tl.float32)
    place = event[:, None] * D + column[None, :]
    tl.store(out + place, sum_ND.to(out.dtype.element_ty), mask=(event < N)[:, None] & in_row, cache_modifier=".cs")


@triton.jit
def _decode_backward(
    words, grad, sums, N, D, R, copies,
    CHUNKS: tl.constexpr, NUM_WORDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    event = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    valid = (event < N)[:, None] & (column < D)[None, :]
    grad_ND = tl.load(grad + event[:, None] * D + column[None, :], mask=valid, other=0).to(tl.float32)
    sums += (tl.program_id(0) % copies).to(tl.int64) * R * D
    rest = event
    for f in tl.static_range(len(CHUNKS)):
        row, rest = next_chunk(rest, words, event, event < N, f, CHUNKS, NUM_WORDS)
        place = row[:, None] * D + column[None, :]
        tl.atomic_add(sums + place, grad_ND, mask=valid & (row >= 0)[:, None], sem="relaxed")
