"""Sums of rows by a constant plan: from digits to chunks, and from chunks back to digits, in one launch each."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidrec_torchrec.ops.layout import Joined

_AT_ONCE = 8  # rows added at a time: their loads are in flight together
Plan = tuple[Tensor, Tensor]  # sum i is of the rows row[first[i]] .. row[first[i + 1] - 1], both int32


@lru_cache(maxsize=64)
def plans(joined: Joined, kept_rows: int, device: torch.device) -> tuple[Plan, Plan]:
    """``Joined.expand`` and ``Joined.sum_out`` as plans, each with ``kept_rows`` more rows, which stay as they are."""
    chunks, digits, row, digit_row, first_digit = [], [], 0, 0, 0
    for radix, count in zip(joined.chunks.radices, joined.counts, strict=True):
        value, divisor = torch.arange(radix), radix
        for own in joined.digits.radices[first_digit : first_digit + count]:
            divisor //= own
            chunks.append(row + value)
            digits.append(digit_row + value // divisor % own)
            digit_row += own
        row, first_digit = row + radix, first_digit + count
    chunks.append(row + torch.arange(kept_rows))
    digits.append(digit_row + torch.arange(kept_rows))
    chunk_P, digit_P = torch.cat(chunks), torch.cat(digits)
    return _plan(chunk_P, digit_P, device), _plan(digit_P, chunk_P, device)


def _plan(sum_P: Tensor, row_P: Tensor, device: torch.device) -> Plan:
    """The plan in which ``row_P`` goes into ``sum_P``; every sum has a row."""
    first = torch.bincount(sum_P).cumsum(0)
    rows = row_P[sum_P.argsort(stable=True)]
    return torch.cat([first.new_zeros(1), first]).int().to(device), rows.int().to(device)


def sum_rows(values_MAH: Tensor, plan: Plan, heads: int) -> Tensor:
    """Each query's sums of its rows, float32 [M, sums, heads]: heads beyond those of the values are zero, or cut off."""
    first, row = plan
    M, A, H = values_MAH.shape
    sums_MBH = values_MAH.new_empty(M, len(first) - 1, heads)
    if sums_MBH.numel():
        B, block_H = sums_MBH.shape[1], triton.next_power_of_2(heads)
        block_B = max(4, min(128, 512 // block_H))
        grid = (M, triton.cdiv(B, block_B))
        _sum_rows[grid](values_MAH, sums_MBH, first, row, A, H, B, heads, block_H, block_B, _AT_ONCE)
    return sums_MBH


@triton.jit
def _sum_rows(
    values, sums, first, row, A, H, B, HEADS,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    own = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    head = tl.arange(0, BLOCK_H)
    begin = tl.load(first + own, mask=own < B, other=0)
    end = tl.load(first + own + 1, mask=own < B, other=0)
    sum_BH = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for i in range(0, tl.max(end - begin, 0), AT_ONCE):
        place_BP = (begin + i)[:, None] + tl.arange(0, AT_ONCE)[None, :]
        there_BP = place_BP < end[:, None]
        row_BP = tl.load(row + place_BP, mask=there_BP, other=0)
        place_BPH = (query * A + row_BP)[:, :, None] * H + head[None, None, :]
        there_BPH = there_BP[:, :, None] & (head < H)[None, None, :]
        sum_BH += tl.sum(tl.load(values + place_BPH, mask=there_BPH, other=0), 1)
    place_BH = (query * B + own)[:, None] * HEADS + head[None, :]
    tl.store(sums + place_BH, sum_BH, mask=(own < B)[:, None] & (head < HEADS)[None, :])
