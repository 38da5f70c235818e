"""Kernels of operators: registered per device with torch's dispatcher, and left to the reference where they cannot run.

An operator is one file: schema, shapes for tracing, gradient, and the reference in plain PyTorch, which runs on any device
without a kernel. A device is one file of registrations (``cpu``, ``cuda``) besides its kernels.

``SIDREC_OPS=reference`` in the environment keeps to the reference everywhere.
"""

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.library import CustomOpDef

from sidrec_torchrec.native import build

Operator = CustomOpDef | OpOverload
LIBRARY = torch.library.Library("sidrec", "FRAGMENT")  # of operators that ``custom_op`` does not define

_CHOICES: dict[tuple[Operator, str], Callable[[torch.dtype], bool]] = {}
_KERNELS: dict[tuple[Operator, str], Callable[..., Any]] = {}


def call(op: Operator, *inputs: Any) -> Any:
    """What the operator computes, without gradients: inside of other operators, where a tenth of a millisecond counts."""
    device = next(x.device.type for x in inputs if isinstance(x, Tensor))
    return _KERNELS.get((op, device), op)(*inputs)


def kernel_runs(op: Operator, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a kernel would compute this operator now, on that device and of that dtype; else its reference does."""
    choice = _CHOICES.get((op, device_type))
    return choice is not None and choice(dtype)


def register(
    op: Operator,
    device_type: str,
    *,
    reference: Callable[..., Any],
    values: int,
    dtypes: Container[torch.dtype],
    is_usable: Callable[[], bool],
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: registers a kernel of an operator for a device.

    The kernel gets contiguous tensors, and integers of any width as int64.

    Args:
        op: the operator.
        device_type: such as ``cuda``.
        reference: what runs in the kernel's place where it cannot; same arguments.
        values: place of the argument whose dtype the kernel must know.
        dtypes: those it knows.
        is_usable: whether it can run now, asked at each call.
        check: refuses arguments as the reference would; same arguments.
    """

    def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def runs(dtype: torch.dtype) -> bool:
            return dtype in dtypes and not build.reference_is_asked_for() and is_usable()

        def choose(*inputs: Any) -> Any:
            if not runs(inputs[values].dtype):
                return reference(*inputs)
            if check is not None:
                check(*inputs)
            return kernel(*map(_as_kernels_take_it, inputs))

        if isinstance(op, CustomOpDef):
            op.register_kernel(device_type, choose)
        else:
            LIBRARY.impl(op.name().partition("::")[2], choose, device_type.upper())
        _CHOICES[op, device_type] = runs
        _KERNELS[op, device_type] = choose
        return kernel

    return decorate


def _as_kernels_take_it(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (value if value.is_floating_point() else value.long()).contiguous()
