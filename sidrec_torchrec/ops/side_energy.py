"""``side_energy``: squared norms of what ``side_decode`` gives, without keeping it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sidrec_torchrec.ops.kernels import define
from sidrec_torchrec.ops.side_decode import check, side_decode, side_decode_backward

_BLOCK = 65_536  # events whose vectors are held at a time


def reference(words_NW: Tensor, table_RD: Tensor, radices: Sequence[int], chunk_words: Sequence[int]) -> Tensor:
    """The squared norm of the sum of one table row per chunk, of each SID.

    What divides by it, say a LayerNorm, can then be had of codes: see ``code_attention``'s scale.

    Args:
        words_NW: packed SIDs, integers. Not checked: a word out of range gives the rows of some other SID; a missing
            SID has the norm of no rows, 0.
        table_RD: a row per chunk and value, float32 or float64.
        radices, chunk_words: the chunks, as ``CodeLayout`` has them.

    Returns:
        [N] in the table's dtype.

    Raises:
        ValueError: if the table has another number of rows than the chunks have values, or another dtype.
    """
    check_table(words_NW, table_RD, radices, chunk_words)
    energies = [
        side_decode(words_KW, table_RD, radices, chunk_words).square().sum(1) for words_KW in words_NW.split(_BLOCK)
    ]
    return torch.cat(energies) if energies else table_RD.new_empty(0)


def check_table(words_NW: Tensor, table_RD: Tensor, radices: Sequence[int], chunk_words: Sequence[int]) -> None:
    """Refuses what ``side_energy`` does, before a kernel runs."""
    check(words_NW, table_RD, radices, chunk_words)
    if table_RD.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the table is {table_RD.dtype}; give it in float32, or float64")


side_energy = define("side_energy", reference)


@side_energy.register_fake
def _(words_NW, table_RD, radices, chunk_words):
    return table_RD.new_empty(words_NW.shape[0])


def reference_backward(
    words_NW: Tensor, table_RD: Tensor, grad_N: Tensor, radices: Sequence[int], chunk_words: Sequence[int]
) -> Tensor:
    """The gradient of ``side_energy``'s table, [R, D]: each SID's vector, times twice its gradient, to the rows it sums."""
    grad_RD = torch.zeros_like(table_RD)
    for words_KW, grad_K in _blocks(words_NW, grad_N):
        vectors_KD = side_decode(words_KW, table_RD, radices, chunk_words)
        grad_RD += side_decode_backward(words_KW, 2 * grad_K.unsqueeze(1) * vectors_KD, radices, chunk_words)
    return grad_RD


side_energy_backward = define("side_energy_backward", reference_backward)


@side_energy_backward.register_fake
def _(words_NW, table_RD, grad_N, radices, chunk_words):
    return torch.empty_like(table_RD, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    words_NW, table_RD, ctx.radices, ctx.chunk_words = inputs
    ctx.save_for_backward(words_NW, table_RD)


def _backward(ctx, grad_N: Tensor) -> tuple:
    words_NW, table_RD = ctx.saved_tensors
    return None, side_energy_backward(words_NW, table_RD, grad_N, ctx.radices, ctx.chunk_words), None, None


side_energy.register_autograd(_backward, setup_context=_setup_context)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(_BLOCK) for tensor in tensors), strict=True)
