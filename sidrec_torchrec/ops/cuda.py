"""The operators in Triton, which comes with torch's CUDA builds, for CUDA; compiled at first use, per layout of SIDs.

Deterministic algorithms (``torch.use_deterministic_algorithms``) keep to the reference where kernels add atomically: in all
but ``top_events``.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from sidrec_torchrec.ops import code_attention as attention
from sidrec_torchrec.ops import side_decode as decode
from sidrec_torchrec.ops import top_events as top
from sidrec_torchrec.ops.kernels import register


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


def kernel(name: str) -> Callable[..., Any]:
    """A function ``module.name`` of ``ops.triton``, which imports Triton, so that it is imported late."""
    module, _, function = name.partition(".")

    def run(*inputs: Any) -> Any:
        return getattr(importlib.import_module(f"sidrec_torchrec.ops.triton.{module}"), function)(*inputs)

    return run


_on_cuda = partial(register, device_type="cuda", is_usable=is_usable)
_DECODED: dict[str, Any] = {"values": 1, "dtypes": (torch.float32, torch.bfloat16, torch.float16)}
_ATTENTION: dict[str, Any] = {"values": 3, "dtypes": (torch.float32,), "check": attention.check}

side_decode = _on_cuda(decode.side_decode, reference=decode.reference, check=decode.check, **_DECODED)(
    kernel("side_decode.side_decode")
)
side_decode_backward = _on_cuda(decode.side_decode_backward, reference=decode.reference_backward, **_DECODED)(
    kernel("side_decode.side_decode_backward")
)
code_attention = _on_cuda(attention.code_attention, reference=attention.reference, **_ATTENTION)(
    kernel("code_attention.code_attention")
)
code_attention_backward = _on_cuda(
    attention.code_attention_backward, reference=attention.reference_backward, **_ATTENTION
)(kernel("code_attention.code_attention_backward"))
top_events = register(
    top.top_events,
    "cuda",
    reference=top.reference,
    values=3,
    dtypes=(torch.float32,),
    is_usable=lambda: problem() is None,
    check=top.check,
)(kernel("top_events.top_events"))
