"""A ranker under DistributedModelParallel: tables sharded with a fused optimizer, the rest replicated."""

from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from sidrec_torchrec.errors import check_at_least, check_share
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.training.group import fixed_buckets
from sidrec_torchrec.training.schedule import rate_factor
from sidrec_torchrec.training.trainee import NotFiniteError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a ranker is optimized; the same for every arm.

    Args:
        learning_rate: peak rate of AdamW, for all but the tables.
        weight_decay: of AdamW.
        table_learning_rate: peak rate of row-wise Adagrad, for the tables.
        warmup: share of training in which the rates rise linearly; afterwards they fall to 0 along a cosine.
        max_gradient_norm: gradients of all but the tables are clipped to this norm.
    """

    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    table_learning_rate: float = 0.05
    warmup: float = 0.1
    max_gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self, 0, "learning_rate", "weight_decay", "table_learning_rate")
        check_share(self, "warmup")
        if not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be above 0, got {self.max_gradient_norm}")

    def factor(self, progress: float) -> float:
        """Share of the peak rate at ``progress`` in [0, 1] of training."""
        return rate_factor(progress, warmup=self.warmup, decay_from=self.warmup, cosine=_cosine)


def _cosine(angle: float) -> float:
    """In float32, as when the figures in docs were measured: after some hundred steps, the last bits of a rate show in NE."""
    return float(torch.cos(torch.tensor(angle)))


def shard(model: Ranker, config: OptimizerConfig, device: torch.device) -> DistributedModelParallel:
    """The model with its tables sharded over all processes and row-wise Adagrad fused into their backward."""
    fused = {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": config.table_learning_rate,
        "eps": 1e-8,
    }
    sharders = [EmbeddingBagCollectionSharder(fused_params=fused), EmbeddingCollectionSharder(fused_params=fused)]
    world_size = torch.distributed.get_world_size()
    topology = Topology(world_size=world_size, compute_device=device.type, local_world_size=world_size)
    plan = EmbeddingShardingPlanner(topology=topology, debug=False).collective_plan(
        model, sharders, torch.distributed.GroupMember.WORLD
    )
    replicated = DefaultDataParallelWrapper(**fixed_buckets())
    return DistributedModelParallel(
        module=model, device=device, plan=plan, sharders=sharders, data_parallel_wrapper=replicated
    )


class RankerOptimizer:
    """AdamW for the replicated part beside the tables' fused optimizer, on one schedule.

    Args:
        model: the sharded ranker.
        config: rates and schedule.
    """

    def __init__(self, model: DistributedModelParallel, config: OptimizerConfig) -> None:
        self.config = config
        dense = dict(in_backward_optimizer_filter(model.named_parameters()))
        self._dense = KeyedOptimizerWrapper(
            dense, lambda params: torch.optim.AdamW(params, lr=config.learning_rate, weight_decay=config.weight_decay)
        )
        self._dense_parameters = list(dense.values())
        self._tables = model.fused_optimizer
        self._combined = CombinedOptimizer([self._tables, self._dense])
        self._norm = torch.zeros(())

    def set_progress(self, progress: float) -> None:
        """Sets both rates for ``progress`` in [0, 1] of training."""
        factor = self.config.factor(progress)
        for group in self._dense.param_groups:
            group["lr"] = self.config.learning_rate * factor
        for group in self._tables.param_groups:
            group["lr"] = self.config.table_learning_rate * factor

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self._combined.state_dict()

    def state_to_load(self) -> dict[str, Any]:
        """A state of the right shape, for a checkpoint to fill in place; disturbs the dense weights, load them too."""
        self._dense.init_state()
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what a checkpoint kept."""
        self._combined.load_state_dict(state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Called by the train pipeline before each backward."""
        self._combined.zero_grad(set_to_none)

    def step(self) -> None:
        """Called by the train pipeline after each backward.

        Raises:
            NotFiniteError: on every process, if a gradient is not finite.
        """
        norm = nn.utils.clip_grad_norm_(self._dense_parameters, self.config.max_gradient_norm)
        if not norm.isfinite():
            raise NotFiniteError(f"the norm of the gradients is {float(norm)}")
        self._norm = norm
        self._combined.step()

    def measures(self) -> dict[str, float]:
        """Of the last step: the norm of all gradients but the tables', before it is clipped, and both rates."""
        rates = {"learning_rate": self._dense, "table_learning_rate": self._tables}
        return {"gradient_norm": float(self._norm)} | {
            name: optimizer.param_groups[0]["lr"] for name, optimizer in rates.items() if optimizer.param_groups
        }
