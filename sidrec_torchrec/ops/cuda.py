"""The operators in Triton, which comes with torch's CUDA builds, for CUDA; compiled at first use, per layout of SIDs.

Deterministic algorithms (``torch.use_deterministic_algorithms``) keep to the reference, since the kernels add atomically.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from sidrec_torchrec.ops import code_attention as attention
from sidrec_torchrec.ops import side_decode as decode
from sidrec_torchrec.ops.kernels import register
from sidrec_torchrec.ops.layout import CodeLayout, check_rows


def is_usable() -> bool:
    """Whether Triton is there, and may be used."""
    return not torch.are_deterministic_algorithms_enabled() and problem() is None


@cache
def problem() -> str | None:
    """None, or in one line why Triton cannot be used (and, once, a warning that says so)."""
    try:
        importlib.import_module("triton")
        return None
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}); on CUDA the plain PyTorch operators run instead, many times slower. "
            "Install the triton that belongs to this torch",
            stacklevel=2,
        )
        return str(error)


def kernel(module: str, name: str, prepare: Callable[..., Any] = lambda *inputs: inputs) -> Callable[..., Any]:
    """A function of a module of ``ops.triton``, which imports Triton, so that it is imported late."""

    def run(*inputs: Any) -> Any:
        kernels = importlib.import_module(f"sidrec_torchrec.ops.triton.{module}")
        return getattr(kernels, name)(*prepare(*inputs))

    return run


_on_cuda = partial(register, device_type="cuda", is_usable=is_usable)
_DECODED = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT = (torch.float32,)


def _long_words(words_NW: Tensor, *others: Any) -> tuple[Any, ...]:
    return words_NW.long(), *others


def _checked_rows(words_NW: Tensor, table_RD: Tensor, radices: list[int], chunk_words: list[int]) -> tuple[Any, ...]:
    check_rows(table_RD, CodeLayout(tuple(radices), tuple(chunk_words)), 0)
    return words_NW.long(), table_RD, radices, chunk_words


side_decode = _on_cuda(decode.side_decode, reference=decode.by_definition, values=1, dtypes=_DECODED)(
    kernel("side_decode", "side_decode", _checked_rows)
)
side_decode_backward = _on_cuda(
    decode.side_decode_backward, reference=decode.backward_by_definition, values=1, dtypes=_DECODED
)(kernel("side_decode", "side_decode_backward", _long_words))
code_attention = _on_cuda(attention.code_attention, reference=attention.by_definition, values=3, dtypes=_FLOAT)(
    kernel("code_attention", "code_attention", attention.checked)
)
code_attention_backward = _on_cuda(
    attention.code_attention_backward, reference=attention.backward_by_definition, values=3, dtypes=_FLOAT
)(kernel("code_attention", "code_attention_backward", attention.checked))
