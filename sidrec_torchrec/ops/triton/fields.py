"""How the Triton kernels read the fields of packed SIDs."""

from collections import defaultdict
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidrec_torchrec.ops.layout import CodeLayout

# Per field: number of values, word, first row of its values in a table, and the numbers its word holds from it upwards.
Fields = tuple[tuple[int, int, int, int], ...]


@lru_cache(maxsize=64)
def fields_of(layout: CodeLayout) -> Fields:
    """The fields in the order the kernels take them: word by word, the least significant first.

    They are compile-time constants, so that divisions become multiplications.
    """
    by_word, row = defaultdict(list), 0
    for radix, word in zip(layout.radices, layout.words, strict=True):
        by_word[word].append((radix, row))
        row += radix
    fields = []
    for word, members in by_word.items():
        limits, limit = [], 1
        for radix, _ in members:
            limit *= radix
            limits.append(limit)
        fields += [(radix, word, row, limit) for (radix, row), limit in zip(members, limits, strict=True)][::-1]
    return tuple(fields)


@triton.jit
def next_field(rest, words, event, valid, f: tl.constexpr, FIELDS: tl.constexpr, NUM_WORDS: tl.constexpr):
    """The row that field ``f`` of some events chooses, and what is left of their words for the fields to come.

    A word out of range gives rows of the right field, too.
    """
    if f == 0 or FIELDS[f][1] != FIELDS[f - 1][1]:
        rest = tl.load(words + event * NUM_WORDS + FIELDS[f][1], mask=valid, other=0) & 0x7FFFFFFFFFFFFFFF
    if FIELDS[f][3] <= 2147483648:
        rest = rest.to(tl.int32) & 0x7FFFFFFF  # 32-bit divisions are many times cheaper
    quotient = rest // FIELDS[f][0]
    return (rest - quotient * FIELDS[f][0]).to(tl.int32) + FIELDS[f][2], quotient


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; two, say, where kernels are interpreted on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device_of(tensor)
