"""``side_decode``: packed SIDs to any linear map of their digits, without unpacking them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sidrec_torchrec.ops.kernels import define
from sidrec_torchrec.ops.layout import CodeLayout, with_no_row


def reference(words_NW: Tensor, table_RD: Tensor, radices: Sequence[int], chunk_words: Sequence[int]) -> Tensor:
    """Sum of one table row per chunk of each SID.

    Args:
        words_NW: packed SIDs, integers. Not checked: a word out of range gives the rows of some other SID; but a negative
            word, as a missing SID's, gives no rows.
        table_RD: a row per chunk and value, float; sums are in float32 at least.
        radices, chunk_words: the chunks, as ``CodeLayout`` has them.

    Returns:
        [N, D] in the table's dtype.

    Raises:
        ValueError: if the table has another number of rows than the chunks have values.
    """
    check(words_NW, table_RD, radices, chunk_words)
    layout = CodeLayout(tuple(radices), tuple(chunk_words))
    rows_XD = with_no_row(table_RD, layout.num_values)
    sum_ND = words_NW.new_zeros(len(words_NW), table_RD.shape[1], dtype=_sum_dtype(table_RD))
    for row_N in layout.rows(words_NW).T:
        sum_ND += rows_XD[row_N]
    return sum_ND.to(table_RD.dtype)


def check(words_NW: Tensor, table_RD: Tensor, radices: Sequence[int], chunk_words: Sequence[int]) -> None:
    """Refuses what ``side_decode`` does, before a kernel runs."""
    if table_RD.shape[0] != sum(radices):
        raise ValueError(f"a table of {table_RD.shape[0]} rows, expected {sum(radices)}, one per chunk and value")


side_decode = define("side_decode", reference)


@side_decode.register_fake
def _(words_NW, table_RD, radices, chunk_words):
    return table_RD.new_empty(words_NW.shape[0], table_RD.shape[1])


def reference_backward(words_NW: Tensor, grad_ND: Tensor, radices: Sequence[int], chunk_words: Sequence[int]) -> Tensor:
    """The gradient of ``side_decode``'s table, [R, D] in the dtype of ``grad_ND``; sums are in float32 at least."""
    layout = CodeLayout(tuple(radices), tuple(chunk_words))
    sum_XD = grad_ND.new_zeros(layout.num_values + 1, grad_ND.shape[1], dtype=_sum_dtype(grad_ND))
    for row_N in layout.rows(words_NW).T:
        sum_XD.index_add_(0, row_N, grad_ND.to(sum_XD.dtype))
    return sum_XD[:-1].to(grad_ND.dtype, copy=True)


side_decode_backward = define("side_decode_backward", reference_backward)


@side_decode_backward.register_fake
def _(words_NW, grad_ND, radices, chunk_words):
    return grad_ND.new_empty(sum(radices), grad_ND.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    words_NW, _, ctx.radices, ctx.chunk_words = inputs
    ctx.save_for_backward(words_NW)


def _backward(ctx, grad_ND: Tensor) -> tuple:
    (words_NW,) = ctx.saved_tensors
    return None, side_decode_backward(words_NW, grad_ND, ctx.radices, ctx.chunk_words), None, None


side_decode.register_autograd(_backward, setup_context=_setup_context)


def scaled_reference(
    words_NW: Tensor,
    table_RD: Tensor,
    scale_N: Tensor,
    radices: Sequence[int],
    chunk_words: Sequence[int],
    scaled_chunks: int,
) -> Tensor:
    """As ``side_decode``, where an event's scale multiplies what its first ``scaled_chunks`` chunks add; no gradient."""
    layout = CodeLayout(tuple(radices), tuple(chunk_words))
    rows_XD = with_no_row(table_RD, layout.num_values)
    scaled_ND = others_ND = words_NW.new_zeros(len(words_NW), table_RD.shape[1], dtype=table_RD.dtype)
    for chunk, row_N in enumerate(layout.rows(words_NW).T):
        if chunk < scaled_chunks:
            scaled_ND = scaled_ND + rows_XD[row_N]
        else:
            others_ND = others_ND + rows_XD[row_N]
    return scaled_ND * scale_N.unsqueeze(1) + others_ND


scaled_decode = define("scaled_decode", scaled_reference)


@scaled_decode.register_fake
def _(words_NW, table_RD, scale_N, radices, chunk_words, scaled_chunks):
    return table_RD.new_empty(words_NW.shape[0], table_RD.shape[1])


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
