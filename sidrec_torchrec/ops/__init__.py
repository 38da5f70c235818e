"""Operators on packed SIDs, and the search for digits: a reference in PyTorch each, and kernels per device."""

from sidrec_torchrec.ops import cpu, cuda  # noqa: F401  both register their kernels
