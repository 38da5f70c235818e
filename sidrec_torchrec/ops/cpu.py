"""The operators in C++ (``native/csrc``), for CPU; ``native.build.is_available`` must have said yes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def side_decode(words_NW: Tensor, table_RD: Tensor, radices: Sequence[int], chunk_words: Sequence[int]) -> Tensor:
    """See ``ops.side_decode``."""
    return torch.ops.sidrec_cpu.side_decode(words_NW, table_RD.float(), radices, chunk_words, table_RD.dtype)


def side_decode_backward(
    words_NW: Tensor, grad_ND: Tensor, radices: Sequence[int], chunk_words: Sequence[int]
) -> Tensor:
    """See ``ops.side_decode``."""
    grad_RD = torch.ops.sidrec_cpu.side_decode_backward(words_NW, grad_ND.float(), radices, chunk_words)
    return grad_RD.to(grad_ND.dtype)


def code_attention(*inputs) -> tuple[Tensor, Tensor]:
    """See ``ops.code_attention``."""
    return torch.ops.sidrec_cpu.code_attention(*inputs)


def code_attention_backward(*inputs) -> Tensor:
    """See ``ops.code_attention``."""
    return torch.ops.sidrec_cpu.code_attention_backward(*inputs)
