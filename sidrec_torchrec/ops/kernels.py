"""Kernels of operators: registered per device with torch's dispatcher, and left to the reference where they cannot run.

An operator is one file: schema, shapes for tracing, gradient, and the reference in plain PyTorch, which runs on any device
without a kernel. A device is one file of registrations (``cpu``, ``cuda``) besides its kernels.

Kernels in C++ register themselves, so that a call from a compiled program needs no Python; what they cannot do they leave to
the reference, which they find as ``sidrec_reference::NAME``.

``SIDREC_OPS=reference`` in the environment keeps to the reference everywhere.
"""

import functools
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.library import CustomOpDef

from sidrec_torchrec.native import build

Operator = CustomOpDef | OpOverload
LIBRARY = torch.library.Library("sidrec", "FRAGMENT")  # of operators that ``custom_op`` does not define
_REFERENCES = torch.library.Library("sidrec_reference", "FRAGMENT")

_CHOICES: dict[tuple[Operator, str], Callable[[torch.dtype], bool]] = {}


def define(name: str, reference: Callable[..., Any]) -> CustomOpDef:
    """The operator ``sidrec::NAME``, whose schema is that of its reference."""
    schema = torch.library.infer_schema(reference, mutates_args=())
    return torch.library.custom_op(f"sidrec::{name}", base(name, reference, schema), mutates_args=())


def base(name: str, reference: Callable[..., Any], schema: str) -> Callable[..., Any]:
    """What an operator runs where a device has no kernel: its reference.

    On CPU the first call loads the kernels in C++, which are registered by that, and leaves itself and all others to them.

    Args:
        name: of the operator.
        reference: same arguments.
        schema: its arguments and results.
    """
    _REFERENCES.define(name + schema)
    _REFERENCES.impl(name, reference, "CompositeExplicitAutograd")

    @functools.wraps(reference)
    def run(*inputs: Any) -> Any:
        on_cpu = all(x.device.type == "cpu" for x in inputs if isinstance(x, Tensor))
        if on_cpu and build.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(f"sidrec::{name}", "CPU"):
            return getattr(torch.ops.sidrec, name)(*inputs)
        return reference(*inputs)

    return run


def kernel_runs(op: Operator, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a kernel would compute this operator now, on that device and of that dtype; else its reference does."""
    choice = _CHOICES.get((op, device_type))
    return choice is not None and choice(dtype)


def note(
    op: Operator, device_type: str, *, dtypes: Container[torch.dtype], is_usable: Callable[[], bool]
) -> Callable[[torch.dtype], bool]:
    """Makes known to ``kernel_runs`` when a kernel runs; returns the function of a dtype that says so."""

    def runs(dtype: torch.dtype) -> bool:
        return dtype in dtypes and not build.reference_is_asked_for() and is_usable()

    _CHOICES[op, device_type] = runs
    return runs


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
        runs = note(op, device_type, dtypes=dtypes, is_usable=is_usable)

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
        return kernel

    return decorate


def _as_kernels_take_it(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (value if value.is_floating_point() else value.long()).contiguous()
