"""``top_events`` in Triton: a number per event that orders them, of which torch.topk takes the highest.

The number holds an event's score and place, so no two are alike, and torch.topk, which promises no order of equal ones, has
none to choose from. Scores are summed in the reference's order and rounding: chunks from the first, nothing fused.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidrec_torchrec.ops.code_attention import check_ranges, expand
from sidrec_torchrec.ops.layout import CodeLayout
from sidrec_torchrec.ops.triton.chunks import on_device_of
from sidrec_torchrec.ops.triton.code_attention import _gap_row

_BYTES = 256 << 20  # of numbers and tables of the queries worked on at a time
_TILE = 1024  # scores held by a program
_WARPS = 8
_PLACES = tl.constexpr(0xFFFFFFFF)  # of a query's events: places have 32 bits
_NONE = tl.constexpr(-(1 << 63))  # below all events


def top_events(
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
    k: int,
) -> tuple[Tensor, Tensor]:
    """See ``ops.top_events``. Waits for the GPU: the longest history says how much memory is needed."""
    check_ranges(words_NW, begin_M, end_M)
    M, _, H = scores_MVH.shape
    event_MKH = begin_M.new_empty(M, k, H)
    score_MKH = scores_MVH.new_empty(M, k, H)
    if not event_MKH.numel():
        return event_MKH, score_MKH
    joined = CodeLayout(tuple(radices), tuple(digit_words)).join()
    chunks = joined.chunks
    first = torch.tensor([0, *chunks.radices]).cumsum(0).tolist()
    T = max(k, int((end_M - begin_M).max()))
    R = first[-1] + 1 + scores_MVH.shape[1] - sum(radices)
    table_heads = triton.next_power_of_2(H)
    block = max(16, _TILE // table_heads)
    at_once = max(1, _BYTES // (8 * H * T + 4 * H * R))
    with on_device_of(scores_MVH):
        for m in range(0, M, at_once):
            own = slice(m, m + at_once)
            table_MRH = expand(scores_MVH[own], joined).contiguous()
            key_MHT = begin_M.new_empty(len(table_MRH), H, T)
            _keys[len(table_MRH), triton.cdiv(T, block)](
                words_NW, begin_M[own], end_M[own], event_time_N, None if query_time_M is None else query_time_M[own],
                None if scale_N is None else scale_N.to(scores_MVH.dtype), table_MRH, key_MHT, T, R, H,
                CHUNKS=tuple(zip(chunks.radices, chunks.words, first, chunks.divisors, strict=False)),
                SCALED=0 if scale_N is None else joined.chunks_of_first(scaled_digits), NUM_WORDS=words_NW.shape[1], NO_ROW=first[-1],
                HAS_TIMES=event_time_N is not None, HEADS=table_heads, BLOCK=block,
                num_warps=_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            best_MKH = key_MHT.topk(k).values.transpose(1, 2)
            event_MKH[own], score_MKH[own] = _read(best_MKH, begin_M[own])
    return event_MKH, score_MKH


def _read(key_MKH: Tensor, begin_M: Tensor) -> tuple[Tensor, Tensor]:
    """Events and scores out of numbers that hold them."""
    bits_MKH = (key_MKH >> 32).int()
    # a score's bits order negative ones the wrong way round; the least of all becomes a NaN
    score_MKH = torch.where(bits_MKH < 0, bits_MKH ^ 0x7FFFFFFF, bits_MKH).view(torch.float32)
    event_MKH = begin_M.view(-1, 1, 1) + (~key_MKH & _PLACES.value)
    is_none_MKH = key_MKH == _NONE.value
    return event_MKH.masked_fill(is_none_MKH, -1), score_MKH.masked_fill(is_none_MKH, -torch.inf)


@triton.jit
def _keys(
    words, begins, ends, event_time, query_time, scale, tables, keys, T, R, heads,
    CHUNKS: tl.constexpr, SCALED: tl.constexpr, NUM_WORDS: tl.constexpr, NO_ROW: tl.constexpr, HAS_TIMES: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    event = tl.load(begins + query) + place
    valid = event < tl.load(ends + query)
    table = tables + query * R * heads
    head = tl.arange(0, HEADS)[None, :]
    is_head = head < heads
    score_TH = tl.zeros([BLOCK, HEADS], tl.float32)
    rest = event
    for f in tl.static_range(len(CHUNKS)):
        if f == 0 or CHUNKS[f][1] != CHUNKS[f - 1][1]:
            word = tl.load(words + event * NUM_WORDS + CHUNKS[f][1], mask=valid, other=0)
            rest = word & 0x7FFFFFFFFFFFFFFF
        elif CHUNKS[f - 1][3] <= 2147483648:
            rest = rest.to(tl.int32)  # 32-bit divisions are many times cheaper
        quotient = rest // CHUNKS[f][3]
        rest -= quotient * CHUNKS[f][3]
        # only a word out of range has a quotient beyond the chunk's values
        row = tl.where(word < 0, NO_ROW, (quotient % CHUNKS[f][0]).to(tl.int32) + CHUNKS[f][2])
        score_TH += tl.load(table + row[:, None] * heads + head, mask=is_head, other=0)
        if f + 1 == SCALED:
            score_TH *= tl.load(scale + event, mask=valid, other=0)[:, None]
    if HAS_TIMES:
        row = _gap_row(event_time, query_time, query, event, valid, R)
        score_TH += tl.load(table + row[:, None] * heads + head, mask=is_head, other=0)
    score_TH = tl.where(score_TH == 0, 0.0, score_TH)  # no -0.0
    bits_TH = score_TH.to(tl.int32, bitcast=True)
    is_nan_TH = (bits_TH & 0x7FFFFFFF) > 0x7F800000
    bits_TH = tl.where(bits_TH < 0, bits_TH ^ 0x7FFFFFFF, bits_TH)
    bits_TH = tl.where(is_nan_TH, -2147483648, bits_TH)
    key_TH = (bits_TH.to(tl.int64) << 32) | (place.to(tl.int64) ^ _PLACES)[:, None]
    key_TH = tl.where(valid[:, None], key_TH, _NONE)
    out = keys + (query * heads + head) * T + place[:, None]
    tl.store(out, key_TH, mask=is_head & (place < T)[:, None])
