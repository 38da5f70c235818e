"""Sizes of the ranker."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidrec_torchrec.errors import SidrecError, check_at_least, check_share

if TYPE_CHECKING:
    from sidrec_torchrec.ranker.readers import Reader
    from sidrec_torchrec.side.expansion import SIDEConfig

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """Sizes of the ranker; the same for every arm.

    Args:
        dim: width of item vectors, attention and user tables.
        num_heads: attention heads.
        attention: the reader, by its name in ``READERS``: ``codes`` attends to packed SIDs, which are never decoded, of arms
            whose SIDs travel; ``vectors`` to a vector per event, of any arm: the same mathematics at many times the cost;
            ``auto`` is codes where they travel, and vectors elsewhere.
        learned_queries: how many read what each target reads, besides the target itself.
        blocks: HSTU blocks in which the newest events read each other, before targets read them; older events are read as
            ``attention`` says.
        block_events: how many of the events before a row's first target the blocks read, besides those since.
        top_events: how many of the events a target reads, those it gives the highest scores, it also reads one by one, as
            vectors; for a reader of codes.
        histories_by: a category of events each of whose values, in training, is a history that is read apart from the others, with
            pools of its own; none given: one history of all events.
        cross_layers: layers of the low-rank cross network (DCN-v2).
        head_dims: hidden widths of the final perceptron.
        dropout: share of an item vector's components dropped in training.
        task_weights: weight of each task's loss, in the order of the tasks; none given means 1 each.
    """

    dim: int = 64
    num_heads: int = 4
    attention: str = "auto"
    learned_queries: int = 0
    blocks: int = 0
    block_events: int = 256
    top_events: int = 0
    histories_by: str = ""
    cross_layers: int = 1
    head_dims: tuple[int, ...] = (128, 64)
    dropout: float = 0.1
    task_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_at_least(self, 1, "dim", "num_heads", "cross_layers", "block_events")
        check_at_least(self, 0, "learned_queries", "blocks", "top_events")
        check_share(self, "dropout")
        if self.dim % 4 or self.dim % self.num_heads:  # fbgemm wants table rows of whole 16 bytes
            raise ValueError(f"dim must be a multiple of 4 and of num_heads ({self.num_heads}), got {self.dim}")
        if self.attention != AUTO:
            self.reader(None)  # refuses an unknown one
        if not self.head_dims or min(self.head_dims) < 1:
            raise ValueError(f"head_dims must be one or more widths of at least 1, got {self.head_dims}")
        if not all(0 < weight < math.inf for weight in self.task_weights):
            raise ValueError(f"task_weights must be above 0, got {self.task_weights}")

    def reader(self, sid: "SIDEConfig | None") -> "type[Reader]":
        """The class that ``attention`` names.

        Args:
            sid: what travels with each event, if it is one SID.

        Raises:
            SidrecError: on an unknown name, or one that does not find ``top_events``, if there shall be any.
        """
        from sidrec_torchrec.ranker.readers import READERS  # they are built from this config

        if self.attention != AUTO:
            reader = READERS[self.attention]
        else:
            defaults = (READERS[name] for name in READERS if READERS[name].is_default)
            reader = next(reader for reader in defaults if reader.reads_codes == (sid is not None))
        if self.top_events and not reader.finds_top_events:
            raise SidrecError("top_events are found by codes alone: they need attention to codes, and an arm for it")
        return reader

    def weights(self, num_tasks: int) -> tuple[float, ...]:
        """Weight of each task's loss.

        Raises:
            SidrecError: if ``task_weights`` are of another number of tasks.
        """
        if self.task_weights and len(self.task_weights) != num_tasks:
            raise SidrecError(f"task_weights must name {num_tasks}, one per task, or none; got {self.task_weights}")
        return self.task_weights or (1.0,) * num_tasks
