"""What code-space attention makes of its parameters alone: made in every call, or held for as long as they do not change."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class MappedRows(NamedTuple):
    """Rows whose sums over an event's digits are what attention reads of it.

    Args:
        key_VHd: of keys, of each value of each digit of SIDs.
        value_XHd: of values, of the same and then of each bucket of side information.
        norm_RK: of vectors that have the norms of events' vectors, of each value of each chunk; None without a LayerNorm.
    """

    key_VHd: Tensor
    value_XHd: Tensor
    norm_RK: Tensor | None


class HeldRows(nn.Module):
    """``MappedRows`` as buffers, which checkpoints do not have: constants of a program that is exported."""

    key_VHd: Tensor
    value_XHd: Tensor
    norm_RK: Tensor | None

    def __init__(self, rows: MappedRows) -> None:
        super().__init__()
        for name, tensor in rows._asdict().items():
            self.register_buffer(name, None if tensor is None else tensor.detach().clone(), persistent=False)

    @property
    def rows(self) -> MappedRows:
        """The tensors."""
        return MappedRows(self.key_VHd, self.value_XHd, self.norm_RK)


class HoldsRows(nn.Module):
    """A module that reads ``MappedRows``, and may hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.held_rows: HeldRows | None = None

    def map_rows(self) -> MappedRows:
        """Makes them of the parameters as they are."""
        raise NotImplementedError

    @property
    def mapped_rows(self) -> MappedRows:
        """Those held, or made now."""
        return self.map_rows() if self.held_rows is None else self.held_rows.rows


@contextmanager
def holding_rows(model: nn.Module) -> Iterator[None]:
    """Within it all of a model's attention in code space holds its rows; no parameter may change meanwhile, or have a gradient."""
    holders = [module for module in model.modules() if isinstance(module, HoldsRows)]
    for holder in holders:
        holder.held_rows = HeldRows(holder.map_rows())
    try:
        yield
    finally:
        for holder in holders:
            holder.held_rows = None
