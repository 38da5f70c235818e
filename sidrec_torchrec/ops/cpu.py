"""The operators in C++ (``native/csrc``), for CPU."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sidrec_torchrec.native import build
from sidrec_torchrec.ops import code_attention as attention
from sidrec_torchrec.ops import greedy as search
from sidrec_torchrec.ops import side_decode as decode
from sidrec_torchrec.ops import side_energy as energy
from sidrec_torchrec.ops import top_events as top
from sidrec_torchrec.ops.kernels import register

_on_cpu = partial(register, device_type="cpu", is_usable=build.is_available)
_DECODED: dict[str, Any] = {"values": 1, "dtypes": (torch.float32, torch.bfloat16, torch.float16)}
_ENERGY: dict[str, Any] = {"values": 1, "dtypes": (torch.float32,)}
_ATTENTION: dict[str, Any] = {"values": 3, "dtypes": (torch.float32,), "check": attention.check}


@_on_cpu(decode.side_decode, reference=decode.reference, check=decode.check, **_DECODED)
def side_decode(words_NW: Tensor, table_RD: Tensor, radices: Sequence[int], chunk_words: Sequence[int]) -> Tensor:
    """See ``ops.side_decode``."""
    return torch.ops.sidrec_cpu.side_decode(words_NW, table_RD.float(), radices, chunk_words, table_RD.dtype)


@_on_cpu(decode.side_decode_backward, reference=decode.reference_backward, **_DECODED)
def side_decode_backward(
    words_NW: Tensor, grad_ND: Tensor, radices: Sequence[int], chunk_words: Sequence[int]
) -> Tensor:
    """See ``ops.side_decode``."""
    grad_RD = torch.ops.sidrec_cpu.side_decode_backward(words_NW, grad_ND.float(), radices, chunk_words)
    return grad_RD.to(grad_ND.dtype)


@_on_cpu(decode.scaled_decode, reference=decode.scaled_reference, values=1, dtypes=(torch.float32,))
def scaled_decode(*inputs) -> Tensor:
    """See ``ops.side_decode``."""
    return torch.ops.sidrec_cpu.scaled_decode(*inputs)


@_on_cpu(energy.side_energy, reference=energy.reference, check=energy.check_table, **_ENERGY)
def side_energy(*inputs) -> Tensor:
    """See ``ops.side_energy``."""
    return torch.ops.sidrec_cpu.side_energy(*inputs)


@_on_cpu(energy.side_energy_backward, reference=energy.reference_backward, **_ENERGY)
def side_energy_backward(*inputs) -> Tensor:
    """See ``ops.side_energy``."""
    return torch.ops.sidrec_cpu.side_energy_backward(*inputs)


@_on_cpu(attention.code_attention, reference=attention.reference, **_ATTENTION)
def code_attention(*inputs) -> tuple[Tensor, Tensor]:
    """See ``ops.code_attention``."""
    return torch.ops.sidrec_cpu.code_attention(*inputs)


@_on_cpu(attention.code_attention_backward, reference=attention.reference_backward, **_ATTENTION)
def code_attention_backward(*inputs) -> tuple[Tensor, Tensor]:
    """See ``ops.code_attention``."""
    return torch.ops.sidrec_cpu.code_attention_backward(*inputs)


@_on_cpu(search.greedy, reference=search.reference, values=0, dtypes=(torch.float32,))
def greedy(*inputs) -> tuple[Tensor, Tensor]:
    """See ``ops.greedy``."""
    return torch.ops.sidrec_cpu.greedy(*inputs)


@_on_cpu(top.top_events, reference=top.reference, check=top.check, values=3, dtypes=(torch.float32,))
def top_events(words, begin, end, scores, event_time, query_time, scale, *layout_and_k) -> tuple[Tensor, Tensor]:
    """See ``ops.top_events``."""
    scale = None if scale is None else scale.float()
    return torch.ops.sidrec_cpu.top_events(words, begin, end, scores, event_time, query_time, scale, *layout_and_k)
