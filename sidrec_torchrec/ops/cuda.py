"""The CUDA operators in Triton, which comes with torch's CUDA builds; compiled at first use, per layout of SIDs."""

import importlib
import warnings
from collections.abc import Sequence
from functools import cache

from torch import Tensor


def is_available() -> bool:
    """Whether Triton is there."""
    return problem() is None


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


# The kernels import Triton, so they are imported late.


def side_decode(words_NW: Tensor, table_RD: Tensor, radices: Sequence[int], chunk_words: Sequence[int]) -> Tensor:
    """See ``ops.side_decode``."""
    from sidrec_torchrec.ops.triton import side_decode as kernels

    return kernels.side_decode(words_NW, table_RD, radices, chunk_words)


def side_decode_backward(
    words_NW: Tensor, grad_ND: Tensor, radices: Sequence[int], chunk_words: Sequence[int]
) -> Tensor:
    """See ``ops.side_decode``."""
    from sidrec_torchrec.ops.triton import side_decode as kernels

    return kernels.side_decode_backward(words_NW, grad_ND, radices, chunk_words)


def code_attention(*inputs) -> tuple[Tensor, Tensor]:
    """See ``ops.code_attention``."""
    from sidrec_torchrec.ops.triton import code_attention as kernels

    return kernels.code_attention(*inputs)


def code_attention_backward(*inputs) -> Tensor:
    """See ``ops.code_attention``."""
    from sidrec_torchrec.ops.triton import code_attention as kernels

    return kernels.code_attention_backward(*inputs)
