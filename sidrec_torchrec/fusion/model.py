"""VQ Fusion: several sources of an item -> one latent -> quantizer -> every source and target back."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.quantizer import QuantizerOutput
from sidrec_torchrec.fusion.config import VQFusionConfig
from sidrec_torchrec.fusion.losses import TaskWeights, global_means, reconstruction_loss, target_loss


@dataclass(frozen=True)
class ItemTensors:
    """N items.

    Args:
        sources: float32 [N, d] by source; any value where missing.
        present: bool [N] by source.
        labels: by target, int64 [N] or float32 [N, C]; see ``target_loss``.
        labelled: bool [N] by target.
    """

    sources: dict[str, Tensor]
    present: dict[str, Tensor]
    labels: dict[str, Tensor]
    labelled: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    def select(self, rows: Tensor | slice) -> "ItemTensors":
        """Some of the items."""
        parts = (self.sources, self.present, self.labels, self.labelled)
        return ItemTensors(*({name: value[rows] for name, value in part.items()} for part in parts))

    def to(self, device: torch.device) -> "ItemTensors":
        """The same items on ``device``."""
        parts = (self.sources, self.present, self.labels, self.labelled)
        return ItemTensors(*({name: value.to(device) for name, value in part.items()} for part in parts))


class VQFusion(nn.Module):
    """The tokenizer's model, a multi-task VQ-VAE.

    Linear maps started at the principal components of all sources side by side, with perceptrons beside them that start
    at zero: training begins at linear PCA with a closed-form quantizer, and improves on it.

    Args:
        config: sources, targets, sizes.
    """

    def __init__(self, config: VQFusionConfig) -> None:
        super().__init__()
        self.config = config
        d = config.latent_dim
        self.standardize = nn.ModuleDict({name: Standardize(width) for name, width in config.sources.items()})
        self.encoders = nn.ModuleDict({n: _Residual(w, d, config) for n, w in config.sources.items()})
        self.absent = nn.ParameterDict({n: nn.Parameter(torch.zeros(d)) for n in config.sources})
        self.fuse = _Perceptron(d, d, config) if config.hidden_dim else None
        self.quantizer = config.quantizer.build(d)
        self.decoders = nn.ModuleDict({n: _Residual(d, w, config) for n, w in config.sources.items()})
        self.heads = nn.ModuleDict({n: _Residual(d, t.num_classes, config) for n, t in config.targets.items()})
        self.weights = TaskWeights(
            {task: config.weights.get(task, 1.0) for task in config.tasks},
            {task: task in config.sources for task in config.tasks},
            learned=config.weighting == "uncertainty",
        )

    def latent(self, items: ItemTensors) -> Tensor:
        """The fused latent before quantization, float32 [N, latent_dim]; missing sources count as learned vectors."""
        total_ND = 0
        for name in self.config.sources:
            x_ND = self.standardize[name](items.sources[name])
            present_N1 = items.present[name].unsqueeze(1)
            total_ND = total_ND + torch.where(present_N1, self.encoders[name](x_ND), self.absent[name])
        return total_ND if self.fuse is None else total_ND + self.fuse(total_ND)

    def forward(self, items: ItemTensors) -> tuple[Tensor, Tensor, QuantizerOutput]:
        """Losses of a batch.

        Returns:
            The total loss, scalar; the losses of ``config.tasks``, float [K], detached; the quantizer's output. Losses
            are means over all processes' rows that have the source or label, as this process's share (see
            ``global_means``).
        """
        quantized = self.quantizer(self.latent(items))
        rows = self.task_losses(quantized.z_q_ND, items)
        sums_K = torch.stack([loss_N.sum() for loss_N, _ in rows])
        counts_K = torch.stack([has_N.sum().float() for _, has_N in rows])
        losses_K = global_means(sums_K, counts_K)
        return self.weights(losses_K) + quantized.loss, losses_K.detach(), quantized

    def task_losses(self, z_ND: Tensor, items: ItemTensors) -> list[tuple[Tensor, Tensor]]:
        """Per task, the loss by row (float [N], 0 where missing) and whether the row has the source or label."""
        rows = []
        for name in self.config.sources:
            x_ND = self.standardize[name](items.sources[name])
            loss_N = reconstruction_loss(self.decoders[name](z_ND), x_ND)
            rows.append((torch.where(items.present[name], loss_N, 0.0), items.present[name]))
        for name in self.config.targets:
            loss_N = target_loss(self.heads[name](z_ND), items.labels[name])
            rows.append((torch.where(items.labelled[name], loss_N, 0.0), items.labelled[name]))
        return rows

    @torch.no_grad()
    def start(self, items: ItemTensors) -> None:
        """Starts from a sample: linear maps at the principal components of all sources, then the quantizer.

        ``standardize`` must be set before. Give every process the same sample.
        """
        parts = [
            self.standardize[name](items.sources[name]) * items.present[name].unsqueeze(1)
            for name in self.config.sources
        ]
        x_NE = torch.cat(parts, dim=1).double()  # a missing source counts as its mean
        directions_ED = torch.linalg.eigh(x_NE.T @ x_NE).eigenvectors.flip(1)[:, : self.config.latent_dim]
        for name, part_ED in zip(
            self.config.sources, directions_ED.float().split([p.shape[1] for p in parts]), strict=True
        ):
            for linear, weight in ((self.encoders[name].linear, part_ED.T), (self.decoders[name].linear, part_ED)):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)
                linear.weight[: weight.shape[0], : weight.shape[1]] = weight
        was_training = self.training
        self.eval()
        self.quantizer.initialize(self.latent(items))
        self.train(was_training)


class Standardize(nn.Module):
    """Centers a source and scales it to total variance 1, by statistics of the training items."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    def set(self, mean_D: Tensor, total_variance: Tensor) -> None:
        """Takes the statistics: the mean [D], and the sum over components of the variance."""
        self.mean_D.copy_(mean_D)
        self.scale.copy_(total_variance.clamp_min(1e-12).rsqrt())

    def forward(self, x_ND: Tensor) -> Tensor:
        return (x_ND - self.mean_D) * self.scale

    def invert(self, x_ND: Tensor) -> Tensor:
        """Back to the source's own scale."""
        return x_ND / self.scale + self.mean_D


class _Perceptron(nn.Module):
    """One hidden layer; starts as zero."""

    def __init__(self, d_in: int, d_out: int, config: VQFusionConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_in, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.hidden_dim, d_out)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        scaled_ND = x_ND * x_ND.shape[1] ** 0.5  # from total variance 1 to variance 1 of each component
        return self.output(self.dropout(nn.functional.gelu(self.hidden(scaled_ND))))


class _Residual(nn.Module):
    """A linear map plus, if the config has hidden units, a perceptron."""

    def __init__(self, d_in: int, d_out: int, config: VQFusionConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)
        self.perceptron = _Perceptron(d_in, d_out, config) if config.hidden_dim else None

    def forward(self, x_ND: Tensor) -> Tensor:
        y_ND = self.linear(x_ND)
        return y_ND if self.perceptron is None else y_ND + self.perceptron(x_ND)
