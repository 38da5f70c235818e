"""``code_attention`` in Triton: events are read twice, for the softmax's denominator and for the masses.

Scores of digits are first summed into a table per query with a row per chunk, small enough for L1: an event costs one
gather per chunk in either pass, and one vector addition in L2 per chunk in the second. Rows have as many heads as the
next power of two, so that they are read and added to whole.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidrec_torchrec.ops.code_attention import GAP_BUCKETS
from sidrec_torchrec.ops.layout import CodeLayout, Joined
from sidrec_torchrec.ops.triton.chunks import chunks_of, next_chunk, on_device_of, processors
from sidrec_torchrec.ops.triton.row_sums import plans, sum_rows

_CHUNK_LIMITS = (256, 128, 32)  # values of a chunk, the best first
_TABLE_BYTES = 24 << 10  # of a query's table: those of the queries a multiprocessor works on share its L1
_TABLES_BYTES = 256 << 20  # of all of them
_TILE = 1024  # scores held by a program
_PROGRAMS = 16  # per multiprocessor
_WARPS = 8
_GAP_BUCKETS = tl.constexpr(GAP_BUCKETS)


def code_attention(
    words_NW: Tensor,
    begin_M: Tensor,
    end_M: Tensor,
    scores_MVH: Tensor,
    event_time_N: Tensor | None,
    query_time_M: Tensor | None,
    scale_N: Tensor | None,
    radices: Sequence[int],
    digit_words: Sequence[int],
    scaled_digits: int,
    softmax: bool,
) -> tuple[Tensor, Tensor]:
    """See ``ops.code_attention``. Sums by atomic additions: the last bits differ from run to run."""
    there = (begin_M >= 0) & (begin_M <= end_M) & (end_M <= len(words_NW))
    torch._assert_async(there.all(), f"a query reads events that are not there: there are {len(words_NW)}")
    inputs = words_NW, begin_M, end_M, scores_MVH, event_time_N, query_time_M, scale_N
    read = _Read(*inputs, radices, digit_words, scaled_digits)
    M, _, H = scores_MVH.shape
    with on_device_of(scores_MVH):
        table_MRH = read.expand(scores_MVH)
        lse_MH = read.log_sum_exp(table_MRH) if softmax else scores_MVH.new_zeros(M, H)
        return read.spread(table_MRH, lse_MH, softmax), lse_MH


def code_attention_backward(
    words_NW: Tensor,
    begin_M: Tensor,
    end_M: Tensor,
    scores_MVH: Tensor,
    event_time_N: Tensor | None,
    query_time_M: Tensor | None,
    scale_N: Tensor | None,
    grad_mass_MVH: Tensor,
    lse_MH: Tensor,
    shift_MH: Tensor,
    radices: Sequence[int],
    digit_words: Sequence[int],
    scaled_digits: int,
    softmax: bool,
) -> tuple[Tensor, Tensor]:
    """See ``ops.code_attention``. Sums by atomic additions: the last bits differ from run to run."""
    inputs = words_NW, begin_M, end_M, scores_MVH, event_time_N, query_time_M, scale_N
    read = _Read(*inputs, radices, digit_words, scaled_digits)
    grad_scale_N = scores_MVH.new_zeros(0 if scale_N is None else len(words_NW))
    with on_device_of(scores_MVH):
        table_MRH, grad_MRH = read.expand(scores_MVH), read.expand(grad_mass_MVH)
        return read.spread(table_MRH, lse_MH, softmax, grad_MRH, shift_MH, grad_scale_N), grad_scale_N


class _Read:
    """What a call reads, and how its work is cut into programs: some for each query, an equal share of its events each."""

    def __init__(
        self, words_NW, begin_M, end_M, scores_MVH, event_time_N, query_time_M, scale_N, radices, digit_words, scaled_digits
    ) -> None:  # fmt: skip
        self.tensors = words_NW, begin_M, end_M, event_time_N, query_time_M, scale_N
        (N, W), (M, _, self.heads) = words_NW.shape, scores_MVH.shape
        self.table_heads = triton.next_power_of_2(self.heads)
        self.has_times = event_time_N is not None
        digits = CodeLayout(tuple(radices), tuple(digit_words))
        joined = _join(digits, M, self.table_heads)
        self.expansion, self.marginals = plans(joined, GAP_BUCKETS * self.has_times, scores_MVH.device)
        block = max(16, _TILE // self.table_heads)
        programs = _PROGRAMS * processors(scores_MVH.device)
        self.shares = max(1, min(triton.cdiv(programs, max(1, M)), triton.cdiv(N, block)))
        self.grid = (M * self.shares,)
        self.constants = {
            "CHUNKS": chunks_of(joined.chunks),
            "NUM_WORDS": W,
            "SCALED_ROWS": 0 if scale_N is None else _rows_of(joined, scaled_digits),
            "HAS_TIMES": self.has_times,
            "HEADS": self.table_heads,
            "BLOCK": block,
            "num_warps": _WARPS,
        }

    def expand(self, values_MVH: Tensor) -> Tensor:
        """A row per chunk and value of rows per digit and value."""
        return sum_rows(values_MVH, self.expansion, self.table_heads)

    def log_sum_exp(self, table_MRH: Tensor) -> Tensor:
        """The logarithm of the softmax's denominator, [M, H]."""
        M, R, _ = table_MRH.shape
        lse_MSH = table_MRH.new_empty(M, self.shares, self.heads)
        if lse_MSH.numel():
            _log_sum_exp[self.grid](
                *self.tensors, table_MRH, lse_MSH, len(self.tensors[0]), R, self.shares, self.heads, **self.constants
            )
        return lse_MSH.logsumexp(1)

    def spread(
        self,
        table_MRH: Tensor,
        lse_MH: Tensor,
        softmax: bool,
        grad_MRH: Tensor | None = None,
        shift_MH: Tensor | None = None,
        grad_scale_N: Tensor | None = None,
    ) -> Tensor:
        """Sums of weights, or with gradients of the weights those of the scores, by digit and value, [M, V, H].

        With gradients, those of the scale are added to ``grad_scale_N``.
        """
        R = table_MRH.shape[1]
        sums_MRH = torch.zeros_like(table_MRH)
        if sums_MRH.numel():
            _spread[self.grid](
                *self.tensors, table_MRH, lse_MH, grad_MRH, shift_MH, grad_scale_N, sums_MRH,
                len(self.tensors[0]), R, self.shares, self.heads, SOFTMAX=softmax, **self.constants,
            )  # fmt: skip
        return sum_rows(sums_MRH, self.marginals, self.heads)


def _join(digits: CodeLayout, queries: int, heads: int) -> Joined:
    """Chunks as large as the tables' memory allows."""
    for limit in _CHUNK_LIMITS:
        joined = digits.join(limit)
        size = joined.chunks.num_values * heads * 4
        if size <= _TABLE_BYTES and queries * size <= _TABLES_BYTES:
            break
    return joined


def _rows_of(joined: Joined, digits: int) -> int:
    """How many rows the chunks of the first so many digits have."""
    return sum(joined.chunks.radices[: joined.chunks_of_first(digits)])


@triton.jit
def _share(begins, ends, N, shares, BLOCK: tl.constexpr):
    """This program's query, and which of its events to read: whole blocks, and never events that are not there."""
    query = (tl.program_id(0) // shares).to(tl.int64)
    begin = tl.maximum(tl.load(begins + query), 0)
    end = tl.minimum(tl.load(ends + query), N)
    size = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK), shares) * BLOCK
    first = begin + tl.program_id(0) % shares * size
    return query, first, tl.minimum(first + size, end)


@triton.jit
def _gap_row(event_time, query_time, query, event, valid, R):
    """The row of the time gap's bucket, floor(log2(gap + 1)), which is the exponent of a double."""
    gap = tl.load(query_time + query) - tl.load(event_time + event, mask=valid, other=0)
    gap = tl.minimum(tl.maximum(gap, 0), 0xFFFFFFFF) + 1
    exponent = (gap.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1023
    return tl.minimum(exponent, _GAP_BUCKETS - 1).to(tl.int32) + R - _GAP_BUCKETS


@triton.jit
def _sums_of_rows(
    table, words, event, valid, gap_row,
    CHUNKS: tl.constexpr, NUM_WORDS: tl.constexpr, SCALED_ROWS: tl.constexpr, HAS_TIMES: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the rows the events choose, what the scale multiplies, and the others."""
    head = tl.arange(0, HEADS)[None, :]
    scaled_TH = tl.zeros([BLOCK, HEADS], tl.float32)
    others_TH = tl.zeros([BLOCK, HEADS], tl.float32)
    rest = event
    for f in tl.static_range(len(CHUNKS)):
        row, rest = next_chunk(rest, words, event, valid, f, CHUNKS, NUM_WORDS)
        there = (row >= 0)[:, None]
        if CHUNKS[f][2] < SCALED_ROWS:
            scaled_TH += tl.load(table + row[:, None] * HEADS + head, mask=there, other=0)
        else:
            others_TH += tl.load(table + row[:, None] * HEADS + head, mask=there, other=0)
    if HAS_TIMES:
        others_TH += tl.load(table + gap_row[:, None] * HEADS + head)
    return scaled_TH, others_TH


@triton.jit
def _log_sum_exp(
    words, begins, ends, event_time, query_time, scales, tables, lse, N, R, shares, heads,
    CHUNKS: tl.constexpr, NUM_WORDS: tl.constexpr, SCALED_ROWS: tl.constexpr, HAS_TIMES: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    query, first, last = _share(begins, ends, N, shares, BLOCK)
    table = tables + query * R * HEADS
    most_TH = tl.full([BLOCK, HEADS], -3.4e38, tl.float32)  # finite: infinities have no difference
    sum_TH = tl.zeros([BLOCK, HEADS], tl.float32)
    for t in range(first, last, BLOCK):
        event = t + tl.arange(0, BLOCK)
        valid = event < last
        gap_row = event
        if HAS_TIMES:
            gap_row = _gap_row(event_time, query_time, query, event, valid, R)
        scaled_TH, score_TH = _sums_of_rows(
            table, words, event, valid, gap_row, CHUNKS, NUM_WORDS, SCALED_ROWS, HAS_TIMES, HEADS, BLOCK
        )
        if SCALED_ROWS:
            score_TH += scaled_TH * tl.load(scales + event, mask=valid, other=0)[:, None]
        score_TH = tl.where(valid[:, None], score_TH, float("-inf"))
        larger_TH = tl.maximum(most_TH, score_TH)
        sum_TH = sum_TH * tl.exp(most_TH - larger_TH) + tl.exp(score_TH - larger_TH)
        most_TH = larger_TH
    most_H = tl.max(most_TH, 0)
    sum_H = tl.sum(sum_TH * tl.exp(most_TH - most_H[None, :]), 0)
    head = tl.arange(0, HEADS)
    tl.store(lse + tl.program_id(0).to(tl.int64) * heads + head, most_H + tl.log(sum_H), mask=head < heads)


@triton.jit
def _spread(
    words, begins, ends, event_time, query_time, scales, tables, lse, grads, shift, grad_scales, sums,
    N, R, shares, heads,
    SOFTMAX: tl.constexpr,
    CHUNKS: tl.constexpr, NUM_WORDS: tl.constexpr, SCALED_ROWS: tl.constexpr, HAS_TIMES: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    query, first, last = _share(begins, ends, N, shares, BLOCK)
    table = tables + query * R * HEADS
    sums += query * R * HEADS
    head = tl.arange(0, HEADS)[None, :]
    lse_1H = tl.load(lse + query * heads + head, mask=head < heads, other=0)
    if grads is not None:
        shift_1H = tl.load(shift + query * heads + head, mask=(head < heads) & SOFTMAX, other=0)
    for t in range(first, last, BLOCK):
        event = t + tl.arange(0, BLOCK)
        valid = event < last
        gap_row = event
        if HAS_TIMES:
            gap_row = _gap_row(event_time, query_time, query, event, valid, R)
        unscaled_TH, score_TH = _sums_of_rows(
            table, words, event, valid, gap_row, CHUNKS, NUM_WORDS, SCALED_ROWS, HAS_TIMES, HEADS, BLOCK
        )
        scale_T1 = tl.full([BLOCK, 1], 1, tl.float32)
        if SCALED_ROWS:
            scale_T1 = tl.load(scales + event, mask=valid, other=0)[:, None]
            score_TH += unscaled_TH * scale_T1
        if SOFTMAX:
            weight_TH = tl.exp(score_TH - lse_1H)
            slope_TH = weight_TH
        else:
            sigmoid_TH = 1 / (1 + tl.exp(-score_TH))
            weight_TH = score_TH * sigmoid_TH
            slope_TH = sigmoid_TH * (1 + score_TH * (1 - sigmoid_TH))
        out_TH = weight_TH
        if grads is not None:
            grad = grads + query * R * HEADS
            unscaled_grad_TH, grad_TH = _sums_of_rows(
                grad, words, event, valid, gap_row, CHUNKS, NUM_WORDS, SCALED_ROWS, HAS_TIMES, HEADS, BLOCK
            )
            if SCALED_ROWS:
                grad_TH += unscaled_grad_TH * scale_T1
            out_TH = slope_TH * (grad_TH + shift_1H)
            if SCALED_ROWS:
                of_scale_TH = tl.where(head < heads, out_TH * unscaled_TH + weight_TH * unscaled_grad_TH, 0)
                tl.atomic_add(grad_scales + event, tl.sum(of_scale_TH, 1), mask=valid, sem="relaxed")
        scaled_out_TH = out_TH * scale_T1
        rest = event
        for f in tl.static_range(len(CHUNKS)):
            row, rest = next_chunk(rest, words, event, valid, f, CHUNKS, NUM_WORDS)
            there = (valid & (row >= 0))[:, None]
            if CHUNKS[f][2] < SCALED_ROWS:
                tl.atomic_add(sums + row[:, None] * HEADS + head, scaled_out_TH, mask=there, sem="relaxed")
            else:
                tl.atomic_add(sums + row[:, None] * HEADS + head, out_TH, mask=there, sem="relaxed")
        if HAS_TIMES:
            tl.atomic_add(sums + gap_row[:, None] * HEADS + head, out_TH, mask=valid[:, None], sem="relaxed")
