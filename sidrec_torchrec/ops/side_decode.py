"""``side_decode``: packed SIDs to any linear map of their digits, without unpacking them.

The map of a chunk of digits (5 trits have 243 values) is a table small enough for cache, so the map of a SID is a sum of
one row per chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sidrec_torchrec.codec.packing import SIDSpec


@dataclass(frozen=True, eq=False)
class ChunkTables:
    """A linear map of digits, tabulated by chunk. Made by ``chunk_tables``.

    Args:
        table_RD: rows of all chunks one after another, float.
        word_C: int64, word of each chunk.
        divisor_C: int64; a chunk's value is ``word // divisor % size``.
        size_C: int64.
        first_row_C: int64, where each chunk's rows begin.
    """

    table_RD: Tensor
    word_C: Tensor
    divisor_C: Tensor
    size_C: Tensor
    first_row_C: Tensor


def chunk_tables(spec: SIDSpec, digit_tables: tuple[Tensor, ...] | list[Tensor]) -> ChunkTables:
    """Tabulates ``sum_j digit_tables[j][digit_j]`` by chunk.

    Args:
        spec: of the SIDs.
        digit_tables: per digit, float [radix_j, D].

    Raises:
        ValueError: if there is not one table per digit, of its radix.
    """
    shapes = [table.shape[0] for table in digit_tables]
    if shapes != list(spec.radices):
        raise ValueError(f"digit tables have {shapes} rows, expected {list(spec.radices)}")
    chunks = spec.chunks()
    tables = []
    for chunk in chunks:
        rows_RD = digit_tables[chunk.first]
        for j in range(chunk.first + 1, chunk.first + chunk.count):
            # a later digit is less significant: every earlier combination with each of its values
            rows_RD = (rows_RD.unsqueeze(1) + digit_tables[j].unsqueeze(0)).flatten(0, 1)
        tables.append(rows_RD)
    device = digit_tables[0].device
    sizes = [chunk.size for chunk in chunks]
    return ChunkTables(
        table_RD=torch.cat(tables),
        word_C=torch.tensor([chunk.word for chunk in chunks], device=device),
        divisor_C=torch.tensor([chunk.divisor for chunk in chunks], device=device),
        size_C=torch.tensor(sizes, device=device),
        first_row_C=torch.tensor([sum(sizes[:c]) for c in range(len(sizes))], device=device),
    )


@torch.library.custom_op("sidrec::side_decode", mutates_args=())
def side_decode(
    words_NW: Tensor, table_RD: Tensor, word_C: Tensor, divisor_C: Tensor, size_C: Tensor, first_row_C: Tensor
) -> Tensor:
    """Sum of one table row per chunk of each SID.

    Args:
        words_NW: packed SIDs, int64. Not checked: a word out of range gives the rows of some other SID.
        table_RD, word_C, divisor_C, size_C, first_row_C: see ``ChunkTables``.

    Returns:
        [N, D] in the table's dtype.
    """
    rows_NC = _chunk_rows(words_NW, word_C, divisor_C, size_C, first_row_C)
    return torch.nn.functional.embedding_bag(rows_NC, table_RD, mode="sum")


@side_decode.register_fake
def _(words_NW, table_RD, word_C, divisor_C, size_C, first_row_C):
    return table_RD.new_empty(words_NW.shape[0], table_RD.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    words_NW, table_RD, *chunks = inputs
    ctx.save_for_backward(words_NW, *chunks)
    ctx.num_rows = table_RD.shape[0]


def _backward(ctx, grad_ND: Tensor) -> tuple:
    words_NW, *chunks = ctx.saved_tensors
    grad_RD = None
    if ctx.needs_input_grad[1]:
        rows_NC = _chunk_rows(words_NW, *chunks)
        grad_RD = grad_ND.new_zeros(ctx.num_rows, grad_ND.shape[1])
        for rows_N in rows_NC.unbind(1):  # all at once would repeat the gradient per chunk in memory
            grad_RD.index_add_(0, rows_N, grad_ND)
    return None, grad_RD, None, None, None, None


side_decode.register_autograd(_backward, setup_context=_setup_context)


def _chunk_rows(words_NW: Tensor, word_C: Tensor, divisor_C: Tensor, size_C: Tensor, first_row_C: Tensor) -> Tensor:
    """int64 [N, C]: the table row of each chunk."""
    return words_NW[:, word_C].div(divisor_C, rounding_mode="floor") % size_C + first_row_C
