"""Which implementation of an operator runs: C++ on CPU, Triton on CUDA, or the reference in plain PyTorch.

``SIDREC_OPS=reference`` in the environment keeps to the reference everywhere. So do deterministic algorithms on CUDA
(``torch.use_deterministic_algorithms``), since the Triton kernels add atomically.
"""

from types import ModuleType

import torch
from torch import Tensor

from sidrec_torchrec.native import build
from sidrec_torchrec.ops import cpu, cuda

_KERNEL_DTYPES = {
    "side_decode": (torch.float32, torch.bfloat16, torch.float16),
    "code_attention": (torch.float32,),
}


def kernels(operator: str, values: Tensor) -> ModuleType | None:
    """The module whose functions compute this operator on the device and dtype of ``values``; None for the reference."""
    if values.dtype not in _KERNEL_DTYPES[operator] or build.reference_is_asked_for():
        return None
    if values.device.type == "cpu":
        return cpu if build.is_available() else None
    if values.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return cuda if cuda.is_available() else None
    return None
