"""The operators in C++ (``native/csrc``), for CPU: they register themselves once ``kernels.base`` has loaded them.

What is said of them here is for ``kernel_runs``: the C++ chooses for itself, without Python, by the same rules.
"""

import torch

from sidrec_torchrec.native import build
from sidrec_torchrec.ops import code_attention, greedy, shared_attention, side_decode, side_energy, top_events
from sidrec_torchrec.ops.kernels import Operator, note

_DECODED = (torch.float32, torch.bfloat16, torch.float16)
_FLOAT = (torch.float32,)

_KERNELS: dict[Operator, tuple[torch.dtype, ...]] = {
    side_decode.side_decode: _DECODED,
    side_decode.side_decode_backward: _DECODED,
    side_decode.scaled_decode: _FLOAT,
    side_energy.side_energy: _FLOAT,
    side_energy.side_energy_backward: _FLOAT,
    code_attention.code_attention: _FLOAT,
    code_attention.code_attention_backward: _FLOAT,
    shared_attention.shared_attention: _FLOAT,
    shared_attention.shared_code_attention: _FLOAT,
    top_events.top_events: _FLOAT,
    greedy.greedy: _FLOAT,
}
for _op, _dtypes in _KERNELS.items():
    note(_op, "cpu", dtypes=_dtypes, is_usable=build.is_available)
