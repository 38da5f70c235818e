"""How the Triton kernels read the chunks of packed SIDs."""

from collections import defaultdict
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidrec_torchrec.ops.layout import CodeLayout

# Per chunk: number of values, word, first row of its values in a table, and the numbers its word holds from it upwards.
Chunks = tuple[tuple[int, int, int, int], ...]


@lru_cache(maxsize=64)
def chunks_of(layout: CodeLayout) -> Chunks:
    """The chunks in the order the kernels take them: word by word, the least significant first.

    They are compile-time constants, so that divisions become multiplications.
    """
    by_word, row = defaultdict(list), 0
    for radix, word in zip(layout.radices, layout.words, strict=True):
        by_word[word].append((radix, row))
        row += radix
    chunks = []
    for word, members in by_word.items():
        limits, limit = [], 1
        for radix, _ in members:
            limit *= radix
            limits.append(limit)
        chunks += [(radix, word, row, limit) for (radix, row), limit in zip(members, limits, strict=True)][::-1]
    return tuple(chunks)


@triton.jit
def next_chunk(rest, words, event, valid, f: tl.constexpr, CHUNKS: tl.constexpr, NUM_WORDS: tl.constexpr):
    """The row that chunk ``f`` of some events chooses, and what is left of their words for the chunks to come.

    A word out of range gives rows of the right chunk, too; but a negative one, as a missing SID's, no row: -1.
    """
    if f == 0 or CHUNKS[f][1] != CHUNKS[f - 1][1]:
        rest = tl.load(words + event * NUM_WORDS + CHUNKS[f][1], mask=valid, other=0)
    is_negative = rest < 0
    if CHUNKS[f][3] <= 2147483648:
        rest = rest.to(tl.int32) & 0x7FFFFFFF  # 32-bit divisions are many times cheaper
    quotient = rest // CHUNKS[f][0]
    row = (rest - quotient * CHUNKS[f][0]).to(tl.int32) + CHUNKS[f][2]
    return tl.where(is_negative, -1, row), tl.where(is_negative, -1, quotient)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; two, say, where kernels are interpreted on the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device_of(tensor)
