"""Operators on packed SIDs: a reference in PyTorch each, and kernels per device."""
