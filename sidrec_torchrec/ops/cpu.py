"""The operators in C++ (``native/csrc``), for CPU."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sidrec_torchrec.native import build
from sidrec_torchrec.ops import code_attention as attention
from sidrec_torchrec.ops import greedy as search
from sidrec_torchrec.ops import side_decode as decode
from sidrec_torchrec.ops.kernels import register
from sidrec_torchrec.ops.layout import CodeLayout, check_rows

_on_cpu = partial(register, device_type="cpu", is_usable=build.is_available)
_DECODED = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT = (torch.float32,)


@_on_cpu(decode.side_decode, reference=decode.by_definition, values=1, dtypes=_DECODED)
def side_decode(words_NW: Tensor, table_RD: Tensor, radices: Sequence[int], chunk_words: Sequence[int]) -> Tensor:
    """See ``ops.side_decode``."""
    check_rows(table_RD, CodeLayout(tuple(radices), tuple(chunk_words)), 0)
    return torch.ops.sidrec_cpu.side_decode(words_NW.long(), table_RD.float(), radices, chunk_words, table_RD.dtype)


@_on_cpu(decode.side_decode_backward, reference=decode.backward_by_definition, values=1, dtypes=_DECODED)
def side_decode_backward(
    words_NW: Tensor, grad_ND: Tensor, radices: Sequence[int], chunk_words: Sequence[int]
) -> Tensor:
    """See ``ops.side_decode``."""
    grad_RD = torch.ops.sidrec_cpu.side_decode_backward(words_NW.long(), grad_ND.float(), radices, chunk_words)
    return grad_RD.to(grad_ND.dtype)


@_on_cpu(attention.code_attention, reference=attention.by_definition, values=3, dtypes=_FLOAT)
def code_attention(*inputs) -> tuple[Tensor, Tensor]:
    """See ``ops.code_attention``."""
    return torch.ops.sidrec_cpu.code_attention(*attention.checked(*inputs))


@_on_cpu(attention.code_attention_backward, reference=attention.backward_by_definition, values=3, dtypes=_FLOAT)
def code_attention_backward(*inputs) -> Tensor:
    """See ``ops.code_attention``."""
    return torch.ops.sidrec_cpu.code_attention_backward(*attention.checked(*inputs))


@_on_cpu(search.greedy, reference=search.by_definition, values=0, dtypes=_FLOAT)
def greedy(*inputs) -> tuple[Tensor, Tensor]:
    """See ``ops.greedy``."""
    return torch.ops.sidrec_cpu.greedy(*inputs)
